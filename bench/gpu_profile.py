"""What a call of rnnkern's layers runs on the GPU, kernel by kernel, by torch's profiler.

python bench/gpu_profile.py --match "T1024 .*bf16" --limit 60   rows of bench/gpu.py, and seconds

Per kernel: launches, µs of one and share of the call, grid and block, registers and shared memory,
and the occupancy that these allow. Adds to bench/results/gpu-profile.txt after every row.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu import DEVICE, RESULTS, GpuRow, GpuSide, rows
from torch.profiler import ProfilerActivity, profile

import rnnkern

Event = dict[str, Any]  # of a Chrome trace


HEADER = (
    f"{'µs':>10}{'share':>7}{'count':>7}  {'grid':14}{'block':12}{'regs':>5}"
    f"{'smem KB':>9}{'occ %':>7}  kernel"
)


@dataclass(frozen=True)
class Kernel:
    """A kernel with one grid."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    registers: int
    shared_bytes: int
    occupancy: float  # percent


def short_name(name: str) -> str:
    """Without namespaces, of a template the first 90 characters."""
    return re.sub(r"\(anonymous namespace\)::|\w+::", "", name).removeprefix("void ")[:90]


def kernels(events: list[Event]) -> dict[Kernel, list[float]]:
    """The kernels of a Chrome trace and their times in µs, those that took longest first."""
    times: dict[Kernel, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "kernel":
            continue
        facts = event["args"]
        kernel = Kernel(
            short_name(event["name"]),
            tuple(facts.get("grid", ())),
            tuple(facts.get("block", ())),
            facts.get("registers per thread", 0),
            facts.get("shared memory", 0),
            facts.get("est. achieved occupancy %", 0),
        )
        times[kernel].append(float(event["dur"]))
    return dict(sorted(times.items(), key=lambda item: -sum(item[1])))


def trace(row: GpuRow) -> list[Event]:
    """The events of one call, after one that warms up."""
    row.use_precision()
    call = GpuSide(row.row, rnnkern, DEVICE)
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return events


def report(call: str, found: dict[Kernel, list[float]]) -> str:
    """A line for each of the eight kernels that took longest."""

    def line(kernel: Kernel, times: list[float]) -> str:
        grid, block = ("x".join(map(str, size)) for size in (kernel.grid, kernel.block))
        return (
            f"{median(times):10.1f}{sum(times) / whole:7.1%}{len(times):7}  {grid:14}{block:12}"
            f"{kernel.registers:5}{kernel.shared_bytes / 1024:9.1f}{kernel.occupancy:7.0f}"
            f"  {kernel.name}"
        )

    whole = sum(map(sum, found.values()))
    head = f"{call}: {whole:.0f} µs in {sum(map(len, found.values()))} kernels"
    return "\n".join([head, HEADER, *(line(*item) for item in list(found.items())[:8])])


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--match", default="", help="only rows whose text this regex is found in")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu-profile.txt")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU and a torch with CUDA", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for row in rows():
        if not re.search(args.match, str(row), re.IGNORECASE):
            continue
        if time.monotonic() - start > args.limit:
            break
        text = report(str(row), kernels(trace(row)))
        print(text, flush=True)
        with args.out.open("a") as out:
            out.write(text + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
