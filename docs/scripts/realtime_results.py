"""The tables of docs/performance/real-time.md, from bench/results/realtime-*.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from results import duration, table
from runs import load

#: The columns: forms of a row (bench/realtime.py) by their heading.
FORMS = {
    "torch.nn": "torch.nn",
    "layer": "layer",
    "frozen": "frozen",
    "stream": "stream",
    "bfloat16": "stream bfloat16",
    "int8": "stream int8",
    "ONNX Runtime": "ONNX Runtime",
    "its int8": "ONNX Runtime int8",
    "OpenVINO": "OpenVINO",
}


def steps(run: str, threads: int) -> str:
    """Times of all forms, each with its ratio to ONNX Runtime's where that has one."""
    rows = []
    for row in load(run)["rows"]:
        if row["threads"] != threads:
            continue
        seconds = row["seconds"]
        best = seconds.get("ONNX Runtime")
        cells = []
        for form in FORMS.values():
            time = seconds.get(form)
            ratio = f" ({time / best:.2f})" if time and best and form != "ONNX Runtime" else ""
            cells.append(f"{duration(time)}{ratio}" if time else "–")
        rows.append([row["call"].removesuffix(" hx"), *cells])
    return table(["call", *FORMS], rows)


def tails(run: str) -> str:
    """Single steps one by one: median, p99, p99.9 and worst."""
    rows = []
    for entry in load(run)["tail"]:
        for form, values in entry["seconds"].items():
            call = entry["call"].removesuffix(" hx")
            rows.append([call, form, *(duration(values[k]) for k in PERCENTILES)])
    return table(["call", "form", *PERCENTILES], rows, 2)


PERCENTILES = ("median", "p99", "p99.9", "worst")

TABLES: dict[str, Callable[[], str]] = {
    "realtime-one-thread": partial(steps, "realtime-graniterapids", 1),
    "realtime-two-threads": partial(steps, "realtime-graniterapids", 2),
    "realtime-avx2": partial(steps, "realtime-graniterapids-avx2", 1),
    "realtime-tails": partial(tails, "realtime-graniterapids"),
}
