"""Errors against float64 of rnnkern's layers at each instruction-set level, and of torch.nn's.

python bench/numerics.py           writes bench/results/numerics.json
python bench/numerics.py --check   compares with it instead: only rnnkern, at this CPU's levels

An error is the root mean square of the difference from torch.nn's float64 results, over that of the
results themselves. Inputs and weights are numbers of bfloat16, so that every dtype has the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from calls import LayerCall
from measure import processor
from torch import Tensor

import rnnkern
from rnnkern import _numpy

KEPT = Path(__file__).parent / "results" / "numerics.json"
#: Cells whose gradients are continuous. In bfloat16 a ReLU unit near zero is on or off at random.
CELLS = {
    torch.float32: ("LSTM", "GRU", "RNN_TANH", "RNN_RELU"),
    torch.bfloat16: ("LSTM", "GRU", "RNN_TANH"),
}
#: T, B, I and H. At the large size, 10,000 steps would take a minute by themselves.
SIZES = (
    (1, 8, 16, 32),
    (100, 8, 16, 32),
    (10_000, 2, 16, 32),
    (1, 8, 128, 256),
    (100, 8, 128, 256),
)
#: A check allows so much more than the kept error, and a part of the dtype's rounding: what other
#: CPUs of a level round differently.
FACTOR, ALLOWANCE = 1.25, 0.05

Results = dict[str, Tensor]


def levels(dtype: torch.dtype) -> list[str]:
    """Those of this CPU whose code differs in that dtype."""
    native = ("_bf16", "_amx")
    return [
        level for level in _numpy.isas() if dtype == torch.bfloat16 or not level.endswith(native)
    ]


def results(call: LayerCall, package: object, dtype: torch.dtype) -> Results:
    """Outputs, final states and every gradient, of random weights of all results."""
    torch.manual_seed(0)
    layer = call.layer(package, torch.float32).to(torch.bfloat16).to(dtype)
    x, states = call.inputs()
    leaves = [t.to(dtype).requires_grad_() for t in (x, *states)]
    output, final = layer(*call.arguments(leaves[0], leaves[1:]))
    finals = final if call.has_c else (final,)
    outputs = {"output": output} | dict(zip(("h_n", "c_n"), finals, strict=False))
    inputs = dict(zip(("input", "h_0", "c_0"), leaves, strict=False)) | dict(
        layer.named_parameters()
    )
    weights = [call.normal(10 + i, *t.shape).to(dtype) for i, t in enumerate(outputs.values())]
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights)
    gradients = {f"grad {name}": g for name, g in zip(inputs, grads, strict=True)}
    return {name: t.detach().double() for name, t in (outputs | gradients).items()}


def errors(found: Results, truth: Results) -> dict[str, float]:
    def rms(t: Tensor) -> float:
        return float(t.square().mean().sqrt())

    return {name: rms(found[name] - truth[name]) / rms(truth[name]) for name in truth}


def measured(with_torch: bool) -> Iterator[dict[str, Any]]:
    """A row for each call and dtype: errors by the name of what was computed, by who did."""
    for T, B, I, H in SIZES:
        for cell in CELLS[torch.float32] if T <= 100 else CELLS[torch.bfloat16]:
            call = LayerCall(cell, T, B, I, H, hx=True, dtype=torch.bfloat16)
            truth = results(call, torch.nn, torch.float64)
            for dtype in (d for d, cells in CELLS.items() if cell in cells):
                found = {}
                if with_torch:
                    found["torch.nn"] = errors(results(call, torch.nn, dtype), truth)
                for level in levels(dtype):
                    _numpy.set_isa(level)  # of the engine, which torch's operators share
                    found[level] = errors(results(call, rnnkern, dtype), truth)
                name = str(replace(call, dtype=torch.float32).words()[0])
                yield {
                    "cell": name, "T": T, "B": B, "I": I, "H": H,
                    "dtype": str(dtype).removeprefix("torch."), "errors": found,
                }  # fmt: skip


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("cell", "T", "B", "I", "H", "dtype"))


def worse(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> Iterator[str]:
    """What is less exact than it was. Levels that either side does not have are passed over."""
    before = {key(row): row["errors"] for row in kept}
    for row in rows:
        rounding = torch.finfo(getattr(torch, row["dtype"])).eps
        for level, found in row["errors"].items():
            for name, error in found.items():
                allowed = before[key(row)].get(level, {}).get(name, float("inf"))
                if not error <= FACTOR * allowed + ALLOWANCE * rounding:
                    yield f"{key(row)} {level} {name}: {error:.3g}, was {allowed:.3g}"


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    found = {
        who: {name: float(f"{error:.3g}") for name, error in errors.items()}
        for who, errors in row["errors"].items()
    }
    return row | {"errors": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the kept file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [rounded(row) for row in measured(with_torch=not options.check)]
    if not options.check:
        facts = {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "cpu": processor(),
            "torch": torch.__version__,
        }
        KEPT.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        return
    found = list(worse(rows, json.loads(KEPT.read_text(encoding="utf-8"))["rows"]))
    print("\n".join(found) or f"{len(rows)} rows, none less exact than those kept")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
