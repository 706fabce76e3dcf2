"""The tables and the plot of docs/performance/numerics.md, from bench/results/numerics.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from results import folded, table
from runs import load
from svg import PALETTE, LogAxis, Svg

RUN = "numerics"
#: Distance from 1 to the next number of the dtype: the unit of every error on the page.
ROUNDING = {"float32": 2**-23, "bfloat16": 2**-7}
TORCH = "torch.nn"


def rows(dtype: str) -> list[dict[str, Any]]:
    return [row for row in load(RUN)["rows"] if row["dtype"] == dtype]


def call(row: dict[str, Any]) -> str:
    return f"{row['cell']} T{row['T']} B{row['B']} I{row['I']} H{row['H']}"


def largest(row: dict[str, Any], who: str, gradients: bool) -> float:
    """Of the outputs and states or of all gradients, in roundings."""
    errors = row["errors"][who]
    chosen = [errors[name] for name in errors if name.startswith("grad ") == gradients]
    return float(max(chosen)) / ROUNDING[row["dtype"]]


def levels(row: dict[str, Any]) -> list[str]:
    return [who for who in row["errors"] if who != TORCH]


def span(values: list[float]) -> str:
    """The values' range, or the one that they share."""
    ends = [f"{pick(values):.2f}" for pick in (min, max)]
    return "–".join(dict.fromkeys(ends))


def summary(dtype: str) -> str:
    """The largest error of a call's results and of its gradients, rnnkern's over all levels."""
    lines = []
    for row in rows(dtype):
        cells = [call(row)]
        for gradients in (False, True):
            cells += [
                f"{largest(row, TORCH, gradients):.2f}",
                span([largest(row, level, gradients) for level in levels(row)]),
            ]
        lines.append(cells)
    head = ["call", "results: torch.nn", "rnnkern", "gradients: torch.nn", "rnnkern"]
    return table(head, lines)


def everything(dtype: str) -> str:
    """Each quantity at each level, a folded table per call."""
    blocks = []
    for row in rows(dtype):
        errors = row["errors"]
        lines = [
            [f"`{name}`", *(f"{found[name] / ROUNDING[dtype]:.2f}" for found in errors.values())]
            for name in errors[TORCH]
        ]
        blocks.append(folded(call(row), table(["", *errors], lines)))
    return "\n\n".join(blocks)


def plot() -> str:
    """The largest error of each call's gradients on a logarithmic axis."""
    line, left, width, top = 19, 300, 860, 46
    shown = [row for dtype in ROUNDING for row in rows(dtype)]
    svg = Svg(width, top + line * len(shown) + 34)
    axis = LogAxis(0.1, 100, left, width - 40)
    svg.text(12, 22, "Largest error of the gradients, in roundings of the dtype", 15, weight="600")
    for x, colour, name in ((500, PALETTE[1], TORCH), (600, PALETTE[0], "rnnkern, each level")):
        svg.dot(x, 17, colour, name)
        svg.text(x + 10, 21, name, 12, fill="#444")
    axis.draw(svg, top - 8, top + line * len(shown), (0.1, 1, 10, 100))
    for i, row in enumerate(shown):
        y = top + line * i + 8
        svg.text(left - 12, y + 4, f"{row['dtype']}  {call(row)}", 11, "end")
        for who in (TORCH, *levels(row)):
            value = largest(row, who, True)
            svg.dot(axis.at(value), y, PALETTE[who == TORCH], f"{who}: {value:.2f}")
    return str(svg)


def machine() -> str:
    run = load(RUN)
    return f"{run['cpu']}, torch {run['torch']}, {run['date']}."


TABLES: dict[str, Callable[[], str]] = {
    "numerics-machine": machine,
    **{f"numerics-{dtype}": partial(summary, dtype) for dtype in ROUNDING},
    **{f"numerics-{dtype}-all": partial(everything, dtype) for dtype in ROUNDING},
}
PAGES: dict[str, Callable[[], str]] = {"performance/numerics.svg": plot}
