"""Times single steps and short chunks in inference in every form that they can take.

python bench/realtime.py                         the rows, one thread and two
python bench/realtime.py --threads 1 --match H64 some of them
python bench/realtime.py --tail 100000           also each of so many steps: median, p99, worst
RNNKERN_CPU=avx2 python bench/realtime.py        at a lower instruction-set level

The forms: torch.nn's layer; rnnkern's layer, frozen layer (`rnnkern.freeze`) and stream, with the
weights' own type, bfloat16 and int8; ONNX Runtime in float32 and dynamically quantised, and
OpenVINO, where they are installed. All run in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from measure import AGREE, Side, disagreement, processor
from report import duration
from rich.console import Console
from rows import Row, rows
from timer import CpuTimer
from torch import Tensor

import rnnkern
from rnnkern.ops import library

Call = Callable[[], object]
#: Largest difference from torch.nn's results relative to the largest: a wrong kernel shows.
TOLERANCE = {"bfloat16": 3e-2, "int8": 1e-1}


PEERS = ("ONNX Runtime", "OpenVINO")


def chosen() -> Iterator[Row]:
    """Single steps and short chunks, in one direction: what streams take."""
    for row in rows():
        if row.group in ("streaming", "clients") and not row.train and row.T <= 8:
            yield row
    for cell in ("LSTM", "GRU", "RNN"):
        yield Row(cell, 1, 1, 1024, 1024, hx=True, group="streaming")
        for steps in (4, 8):
            for hidden in (64, 512):
                yield Row(cell, steps, 1, hidden, hidden, hx=True, group="streaming")


@dataclass
class Form:
    """One way to run a row."""

    call: Call
    results: Callable[[], dict[str, Tensor]]
    tolerance: str = ""  # of TOLERANCE; else float32's


class Frozen(Side):
    """The row's layer, frozen."""

    def __init__(self, row: Row, weights: str) -> None:
        super().__init__(row, rnnkern)
        self.module = rnnkern.freeze(self.module, weights)


class Stream:
    """A stream of the row's frozen layer, which goes on from call to call."""

    def __init__(self, row: Row, weights: str, threads: int) -> None:
        side = Frozen(row, weights)
        x = side.leaf.clone()
        self.x, self.hx = x[0] if row.T == 1 else x, side.hx
        frozen: Any = side.module
        self.stream: rnnkern.Stream = frozen.stream(row.B, threads)

    def call(self) -> Tensor:
        output: Tensor = self.stream(self.x)
        return output

    def results(self) -> dict[str, Tensor]:
        self.stream.reset()
        if self.hx is not None:
            self.stream.state = self.hx
        output = self.call()
        state = self.stream.state
        h, *c = state if isinstance(state, tuple) else (state,)
        named = {"output": output if output.dim() == 3 else output[None], "h_n": h}
        return named | ({"c_n": c[0]} if c else {})


def forms(row: Row, threads: int) -> dict[str, Form]:
    """The forms of a row by name; the first is the measure of all others."""
    sides: dict[str, Any] = {"torch.nn": Side(row, torch.nn), "layer": Side(row, rnnkern)}
    for weights in ("float32", "bfloat16", "int8"):
        suffix = "" if weights == "float32" else f" {weights}"
        sides[f"frozen{suffix}"] = Frozen(row, weights)
        sides[f"stream{suffix}"] = Stream(row, weights, threads)
    for title, peer in peers.load({"onnxruntime", "openvino"} & {*peers.installed()}).items():
        if peers.takes(title, row):
            sides[title] = peer(row, threads)
            if title == "ONNX Runtime" and row.cell == "LSTM":
                sides[f"{title} int8"] = peer(row, threads, quantized=True)  # type: ignore[call-arg]
    return {
        # A side's own call would enter inference mode each time.
        name: Form(getattr(side, "forward", side.call), side.results, name.rpartition(" ")[2])
        for name, side in sides.items()
    }


def wrong(form: Form, expected: dict[str, Tensor]) -> str:
    """What a form's results differ in; empty if in nothing."""
    limit = TOLERANCE.get(form.tolerance, AGREE[torch.float32])
    return disagreement(form.results(), expected, limit)


@torch.inference_mode()
def measure(row: Row, threads: int, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds per call by form, in turn; and what disagrees, which gets no time.

    With several threads the peers come last, each alone: their threads spin after a call.
    """
    torch.set_num_threads(threads)
    ready = forms(row, threads)
    expected = ready["torch.nn"].results()
    bad = {name: text for name, form in ready.items() if (text := wrong(form, expected))}
    names = [name for name in ready if name not in bad]
    alone = [[name] for name in names if threads > 1 and name.startswith(PEERS)]
    together = [name for name in names if [name] not in alone]
    times: dict[str, float] = {}
    for group in (together, *alone):
        timed = CpuTimer(threads).least_noisy([ready[n].call for n in group], seconds * len(group))
        times |= {name: t.median for name, t in zip(group, timed, strict=True)}
    return times, bad


@torch.inference_mode()
def tail(row: Row, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of single calls by form: median, p99, p99.9 and worst of `steps` calls in a row."""
    torch.set_num_threads(1)
    found = {}
    for name, form in forms(row, 1).items():
        taken = np.empty(steps)
        for i in range(-100, steps):
            start = time.perf_counter()
            form.call()
            taken[i] = time.perf_counter() - start
        values = np.percentile(taken, [50, 99, 99.9, 100])
        found[name] = dict(zip(("median", "p99", "p99.9", "worst"), values.tolist(), strict=True))
    return found


def show(console: Console, row: Row, threads: int, times: dict[str, float]) -> None:
    ours = times.get("stream", float("nan"))
    each = (f"{name} {duration(t)} ({t / ours:.2f})" for name, t in times.items())
    console.print(f"{row!s:34} {threads}  {'  '.join(each)}", highlight=False, soft_wrap=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only rows whose text this regex is found in")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--seconds", type=float, default=0.3, help="per row and form")
    parser.add_argument("--tail", type=int, default=0, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest-rt")
    return parser.parse_args()


def main() -> int:
    """Returns the number of rows in which a form disagrees."""
    args, console = arguments(), Console()
    level = library.info()["isa"]
    console.print(f"{processor()}, {level}; in brackets: relative to the stream")
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": processor(),
        "isa": level,
        "torch": torch.__version__,
        "rows": [],
        "tail": [],
    }
    disagreeing = 0
    for threads in map(int, args.threads.split(",")):
        for row in chosen():
            if not re.search(args.match, f"{row} {row.note}", re.IGNORECASE):
                continue
            times, bad = measure(row, threads, args.seconds)
            for name, text in bad.items():
                console.print(f"[red]{row} {name}: {text}")
            disagreeing += bool(bad)
            show(console, row, threads, times)
            named = {"call": str(row), "note": row.note, "threads": threads, "seconds": times}
            result["rows"].append(named | {"wrong": bad})
    for hidden in (64, 256) if args.tail else ():
        row = Row("LSTM", 1, 1, hidden, hidden, hx=True)
        found = tail(row, args.tail)
        result["tail"].append({"call": str(row), "steps": args.tail, "seconds": found})
        for name, values in found.items():
            text = "  ".join(f"{k} {duration(v)}" for k, v in values.items())
            console.print(f"{row!s:34} {name:22} {text}", highlight=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return disagreeing


if __name__ == "__main__":
    raise SystemExit(main())
