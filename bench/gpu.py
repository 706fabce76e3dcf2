"""Times rnnkern's layers and torch.nn's (cuDNN) on a GPU, from CUDA events.

python bench/gpu.py                          every row, a few minutes
python bench/gpu.py --match "LSTM.*fp16"     rows whose text this regex is found in
python bench/gpu.py --quick --limit 60       a first look; no row begins after so many seconds
python bench/gpu.py --seconds 0.2            shorter: per row and side

Both sides do the whole layer, input projection included, on the same weights and values. With
resets cuDNN's is a loop over single steps, for an own cell it is a loop of the cell's step. Sides
are called alternately, each time with the L2 cache overwritten before. "graph" is our call captured
in a CUDA graph and replayed: what the GPU alone needs. Writes bench/results/gpu.json and gpu.txt
after every row, so that a run that is cut off leaves what it has; a row that fails says so in its
place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from calls import tensor_of
from measure import Side, relative_error
from rows import Row
from timer import GpuTimer
from torch import Tensor

import rnnkern

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEVICE = "cuda"
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
# Largest error, relative to the largest value, at which the two sides agree.
TOLERANCE = {"fp16": 2e-2, "bf16": 1e-1, "fp32": 1e-4, "tf32": 1e-2}


@dataclass(frozen=True)
class GpuRow:
    """A layer call in one precision; fp32 and tf32 differ only in torch's settings."""

    row: Row
    precision: str

    def __str__(self) -> str:
        shape = str(replace(self.row, dtype=torch.float32))
        return f"{shape} {self.precision} {self.row.mode}"

    @property
    def quick(self) -> bool:
        """Whether it is part of a first look: every kind of row once."""
        row = self.row
        return (row.T, row.B) == (512, 16) and row.H in (256, 512) and self.precision != "fp32"

    def use_precision(self) -> None:
        allowed = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def rows() -> Iterator[GpuRow]:
    """Every row in inference and in training."""

    def both(cell: str, T: int, B: int, H: int, precision: str, **more: Any) -> Iterator[GpuRow]:
        for train in (False, True):
            row = Row(cell, T, B, H, H, train=train, dtype=DTYPES[precision], **more)
            yield GpuRow(row, precision)

    for H in (128, 256, 512, 768, 1024):  # cuDNN's persistent kernels: fp16, H % 128 = 0
        yield from both("LSTM", 512, 16, H, "fp16")
    for precision in ("bf16", "fp32", "tf32"):
        for H in (64, 256, 512, 1024):
            yield from both("LSTM", 512, 16, H, precision)
    for B in (1, 8, 64, 128):
        yield from both("LSTM", 512, B, 512, "bf16")
    for T in (128, 2048):
        yield from both("LSTM", T, 16, 512, "bf16")
    for H in (128, 256, 512, 768, 1024):  # as in the figures that others publish
        yield from both("LSTM", 1024, 16, H, "bf16")
    yield from both("LSTM", 512, 16, 512, "bf16", proj=256)
    yield from both("LSTM", 128, 128, 2048, "bf16")
    yield from both("LSTM", 128, 64, 2048, "tf32")
    for cell in ("GRU", "RNN"):
        for precision in ("fp16", "bf16", "fp32"):
            yield from both(cell, 512, 16, 512, precision)
    for cell in ("LSTM", "GRU"):
        for precision in ("fp16", "tf32"):
            yield from both(cell, 512, 16, 256, precision, bidirectional=True)
            yield from both(cell, 512, 16, 256, precision, L=2)
            yield from both(cell, 512, 16, 256, precision, packed=True)
    for T, B, H, resets in ((512, 16, 256, 256), (128, 64, 512, 256), (2048, 1, 256, 7)):
        yield from both("LSTM", T, B, H, "bf16", resets=resets)
    yield from both("GRU", 128, 16, 512, "fp16", resets=64)
    for cell in ("PeepholeLSTM", "SLSTM", "SRU"):  # beside the loop of the step
        for precision in ("fp16", "fp32"):
            yield from both(cell, 128, 16, 512, precision, group="cells")


@dataclass
class Result:
    """Microseconds per call, median and interquartile range; nan where there is no time.

    `steps` are those that follow each other: of all layers and directions, and back if trained.
    """

    call: str
    ours: float = float("nan")
    ours_iqr: float = float("nan")
    graph: float = float("nan")
    graph_iqr: float = float("nan")
    theirs: float = float("nan")
    theirs_iqr: float = float("nan")
    steps: int = 0
    wrong: str = ""
    notes: list[str] = field(default_factory=list)

    HEADER = (
        f"{'call':46}{'rnnkern µs':>15}{'graph µs':>15}{'cuDNN µs':>15}"
        f"{'µs/step':>9}{'cuDNN/ours':>11}{'/graph':>8}"
    )

    def __str__(self) -> str:
        cells = [(self.ours, self.ours_iqr), (self.graph, self.graph_iqr)]
        cells.append((self.theirs, self.theirs_iqr))
        times = "".join(f"{f'{t:.1f} ±{d / t:.0%}' if t == t else '-':>15}" for t, d in cells)
        ratios = f"{self.theirs / self.ours:11.2f}{self.theirs / self.graph:8.2f}"
        notes = "; ".join([f"WRONG: {self.wrong}"] if self.wrong else self.notes)
        return f"{self.call:46}{times}{self.graph / self.steps:9.2f}{ratios} {notes}"


class GpuSide(Side):
    """One of the two layers on the GPU, with its call ready."""

    def in_double(self) -> GpuSide:
        """The same call in float64."""
        side = GpuSide(replace(self.row, dtype=torch.float64), torch.nn, DEVICE)
        with torch.no_grad():
            for to, value in zip(side.parameters, self.parameters, strict=True):
                to.copy_(value)
            side.leaf.copy_(self.leaf)
            if self.row.train:
                side.gradient.copy_(self.gradient)
        return side

    def __call__(self) -> list[Tensor]:
        """The output and, in training, the gradients of the input and the parameters."""
        if not self.row.train:
            with torch.no_grad():
                return [tensor_of(self.forward()[0])]
        output = tensor_of(self.forward()[0])
        leaves = [self.leaf, *self.parameters]
        return [output, *torch.autograd.grad(output, leaves, self.gradient)]


def relative_errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest differences, each relative to the largest expected value."""
    return [relative_error(a, b) for a, b in zip(results, expected, strict=True)]


def disagreement(ours: GpuSide, theirs: GpuSide, tolerance: float) -> str:
    """The first of our results that is wrong, or nothing. Where one differs from torch.nn's by more
    than the tolerance, those are wrong that err more than theirs and than half the tolerance,
    against float64."""
    found, expected = ours(), theirs()
    if all(d <= tolerance for d in relative_errors(found, expected)):
        return ""
    truth = theirs.in_double()()
    both = zip(relative_errors(found, truth), relative_errors(expected, truth), strict=True)
    for i, (a, b) in enumerate(both):
        if not a <= max(tolerance / 2, b):
            return f"result {i} by {a:.1e}, torch.nn by {b:.1e}"
    return ""


def capture_graph(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compare(gpu_row: GpuRow, seconds: float, timer: GpuTimer) -> Result:
    gpu_row.use_precision()
    row = gpu_row.row
    steps = row.T * row.num_states * (1 + row.train)
    result = Result(str(gpu_row), steps=steps)
    ours, theirs = GpuSide(row, rnnkern, DEVICE), GpuSide(row, torch.nn, DEVICE)
    result.wrong = disagreement(ours, theirs, TOLERANCE[gpu_row.precision])
    calls: list[Callable[[], object]] = [ours, theirs]
    try:
        calls.append(capture_graph(ours))
    except RuntimeError as error:
        result.notes.append(f"no graph: {str(error).partition(chr(10))[0]}")
    timed = timer.alternately(calls, seconds * len(calls))
    measured = [(1e6 * t.median, 1e6 * t.iqr) for t in timed]
    result.ours, result.ours_iqr = measured[0]
    result.theirs, result.theirs_iqr = measured[1]
    if len(measured) == 3:
        result.graph, result.graph_iqr = measured[2]
    return result


def command_output(*command: str) -> str:
    """Standard output of a command, or "unknown" where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(facts: Path | None) -> dict[str, object]:
    """Date, device, driver and versions; `facts` is the output of bench/gpu_facts.cu."""
    properties = torch.cuda.get_device_properties(0)
    environment: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": properties.name,
        "driver": command_output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "rnnkern": rnnkern.__version__,
        "on_chip": os.environ.get("RNNKERN_ON_CHIP", "clusters"),
        "commit": os.environ.get("COMMIT")
        or command_output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }
    if facts and facts.exists():
        environment |= {
            name: int(value) for name, value in map(str.split, facts.read_text().splitlines())
        }
    return environment


def write(out: Path, environment: dict[str, object], results: list[Result], left_out: int) -> None:
    """The table and, with everything in it, the JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{k}: {v}" for k, v in environment.items()]
    lines += ["", Result.HEADER, *map(str, results)]
    lines += [f"{left_out} rows are left out: no time"] if left_out else []
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    finite = [{k: v if v == v else None for k, v in asdict(r).items()} for r in results]
    content = {"machine": environment, "left_out": left_out, "results": finite}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def print_packages() -> None:
    for name in ("torch", "setuptools", "ninja", "numpy", "pytest"):
        try:
            print(name, version(name))
        except PackageNotFoundError:
            print(name, "is not installed")


def main(arguments: list[str] | None = None) -> int:
    """Returns the number of rows that fail or whose results disagree."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only rows whose text this regex is found in")
    parser.add_argument("--quick", action="store_true", help="only the rows of a first look")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all rows")
    parser.add_argument("--seconds", type=float, default=0.4, help="per row and side")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--packages", action="store_true", help="list what is installed and stop")
    parser.add_argument("--facts", type=Path, help="what bench/gpu_facts.cu printed")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu")
    args = parser.parse_args(arguments)
    chosen = [row for row in rows() if re.search(args.match, str(row), re.IGNORECASE)]
    if args.quick:
        chosen = [row for row in chosen if row.quick]
    if args.list or args.packages:
        print_packages() if args.packages else print(*chosen, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU and a torch with CUDA", file=sys.stderr)
        return 1

    environment = machine(args.facts)
    timer = GpuTimer(DEVICE)
    print(*(f"{k}: {v}" for k, v in environment.items()), Result.HEADER, sep="\n", flush=True)
    results: list[Result] = []
    for row in chosen:
        if time.monotonic() - start > args.limit:
            break
        try:
            results.append(compare(row, args.seconds, timer))
        except RuntimeError as error:  # CUDA's errors, out of memory among them
            results.append(Result(str(row), steps=1, wrong=str(error).partition("\n")[0]))
        print(results[-1], flush=True)
        write(args.out, environment, results, len(chosen) - len(results))
    if len(results) < len(chosen):
        print(f"{len(chosen) - len(results)} rows are left out: no time")
    return sum(bool(r.wrong) for r in results)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
