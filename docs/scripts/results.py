"""Turns bench/results/*.json into the performance pages and their plots.

python docs/scripts/results.py                writes docs/img/headline.svg, the README's picture
python docs/scripts/results.py --pages DIR    also writes every page and plot below DIR

`make docs` calls `pages()` through hooks.py, so the site never shows stale figures. Standard
library only: the documents build without torch and without matplotlib.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from runs import GPU_KINDS, MACHINES, RESULTS, ROOT, WHOLE, Machine, gpu_calls, load
from svg import PALETTE, LogAxis, Svg, bars

HEADLINE = ROOT / "docs" / "img" / "headline.svg"
PEERS = ("ONNX Runtime", "OpenVINO", "JAX")

# The README's picture: groups of rows, in the order of the picture.
SHOWN = {
    "course": "the course's tasks, training",
    "tiny": "tiny: B ≤ 8, H ≤ 64",
    "small": "small: B 16–32, H 100–200",
    "large": "large: H ≥ 512",
    "streaming": "streaming: B = 1",
    "packed": "ragged batches, training",
    "bf16": "bfloat16",
    "clients": "layers of known packages",
}


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def headline() -> str:
    """The README's picture: CPU groups by machine, and the H200's kinds of rows."""
    row, left, width = 27, 300, 860
    cpu_top = 74
    gpu_top = cpu_top + row * len(SHOWN) + 52
    bottom = gpu_top + row * len(GPU_KINDS)
    svg = Svg(width, bottom + 30)
    axis = LogAxis(0.2, 20, left, width - 84)
    svg.text(16, 24, "How many times faster than torch.nn", 16, weight="600")
    svg.text(16, 44, "geometric mean per group; the grey tick is the slowest single call", 12,
             fill="#555")  # fmt: skip
    axis.draw(svg, cpu_top - 8, bottom, (0.2, 0.5, 1, 2, 5, 10, 20))

    runs = [(m, load(m.file)["groups"]) for m in WHOLE]
    x: float = left
    svg.text(16, cpu_top - 9, "CPU, 2 threads", 13, weight="600")
    for (machine, _), colour in zip(runs, PALETTE, strict=False):
        svg.dot(x + 5, cpu_top - 13, colour, machine.name)
        svg.text(x + 14, cpu_top - 9, machine.name, 12, fill="#444")
        x += 24 + 7.2 * len(machine.name)
    for i, (group, label) in enumerate(SHOWN.items()):
        y = cpu_top + row * i + 12
        svg.text(left - 14, y + 4, label, 13, "end")
        found = [
            (m, g) for m, groups in runs for g in groups if (g["group"], g["threads"]) == (group, 2)
        ]
        slowest = axis.at(min(g["least"] for _, g in found))
        svg.line(slowest, y, axis.at(max(g["geomean"] for _, g in found)), y, "#ccc", 1)
        svg.line(slowest, y - 5, slowest, y + 5, "#999", 1.5)
        for (machine, g), colour in reversed(list(zip(found, PALETTE, strict=False))):
            svg.dot(axis.at(g["geomean"]), y, colour, f"{machine.name}: {g['geomean']:.2f}×")
        ends = [f"{pick(g['geomean'] for _, g in found):.1f}" for pick in (min, max)]
        svg.text(width - 12, y + 4, "–".join(dict.fromkeys(ends)) + "×", 12, "end", "#444")

    svg.text(16, gpu_top - 9, "H200, against cuDNN", 13, weight="600")
    calls = gpu_calls()
    for i, kind in enumerate(GPU_KINDS):
        y = gpu_top + row * i + 12
        ratios = [c.ratio for c in calls if c.kind == kind]
        mean = geomean(ratios)
        svg.text(left - 14, y + 4, kind, 13 if len(kind) < 38 else 12, "end")
        svg.line(axis.at(min(ratios)), y, axis.at(mean), y, "#ccc", 1)
        svg.line(axis.at(min(ratios)), y - 5, axis.at(min(ratios)), y + 5, "#999", 1.5)
        svg.dot(axis.at(mean), y, PALETTE[0] if mean >= 1 else PALETTE[1], f"{mean:.2f}×")
        svg.text(width - 12, y + 4, f"{mean:.1f}×", 12, "end", "#444")
    return str(svg)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers."""
    marks = [":--" if i < left else "--:" for i in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def number(value: float | None, digits: int = 2, unit: str = "×") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def machine_page(machine: Machine) -> tuple[str, str]:
    """The page of one CPU run, and its plot."""
    run = load(machine.file)
    facts, rows = run["machine"], run["rows"]
    most = max(r["threads"] for r in rows)
    parts = [
        f"# {machine.name}",
        f"{machine.processor}. A virtual machine with {most} cores. "
        "How to read the figures: [Results](index.md).",
        "## Machine and run",
        table(
            ["fact", "value"],
            [
                ["date", facts["date"][:10]],
                ["source", machine.state],
                ["torch", facts["torch"]],
                ["Python", facts["python"]],
                ["instruction set", f"`{facts['rnnkern']['isa']}`"],
                ["calls, all results right", f"{len(rows)}"],
            ],
            2,
        ),
        table(
            ["threads", "fp32 peak, GFLOP/s", "L2 reads, GB/s", "memory copies, GB/s"],
            [
                [str(m["threads"]), f"{m['peak']:.0f}", f"{m['cache']:.0f}", f"{m['memory']:.0f}"]
                for m in facts["limits"]
            ],
        ),
        "## Groups",
        *[group_table(run["groups"], threads) for threads in sorted({r["threads"] for r in rows})],
        f"## Every call, {most} threads",
        f"![torch.nn's time over rnnkern's, by call]({machine.file}.svg)",
        "## Times",
        *[
            folded(group, row_table([r for r in rows if r["group"] == group]))
            for group in dict.fromkeys(r["group"] for r in rows)
        ],
    ]
    shown = [r for r in rows if r["threads"] == most and not r["wrong"]]
    labels = [f"{r['call']} {'train' if r['train'] else 'infer'}" for r in shown]
    plot = bars(labels, [r["ratio"] for r in shown], [r["group"] for r in shown])
    return "\n\n".join(parts) + "\n", plot


def folded(title: str, text: str) -> str:
    """A block that a click opens."""
    return "\n".join([f'??? note "{title}"', "", *("    " + line for line in text.split("\n"))])


def group_table(groups: list[dict[str, Any]], threads: int) -> str:
    mine = [g for g in groups if g["threads"] == threads]
    peers = [p for p in PEERS if any(p in g.get("peers", {}) for g in mine)]
    head = ["group", "calls", "torch.nn", "slowest call", "target", "at the limit", *peers]
    title = f"**{threads} thread{'s' * (threads > 1)}**: their time over rnnkern's."
    return title + "\n\n" + table(
        head,
        [
            [
                g["group"],
                str(g["rows"]),
                number(g["geomean"]),
                number(g["least"]),
                number(g["target"]),
                number(g["ceiling"], 1),
                *(number(g.get("peers", {}).get(p)) for p in peers),
            ]
            for g in mine
        ],
    )  # fmt: skip


def row_table(rows: list[dict[str, Any]]) -> str:
    peers = [p for p in PEERS if any(p in r["peers"] for r in rows)]
    head = ["call", "threads", "rnnkern", "torch.nn", "ratio", "GFLOP/s", "of the limit",
            "kept for backward", "added at the peak", *peers]  # fmt: skip

    def kept(r: dict[str, Any]) -> str:
        saved = r["saved"]
        return f"{saved['ours'] / 2**10:.0f} KB, {saved['theirs'] / 2**10:.0f}" if saved else ""

    def peak(r: dict[str, Any]) -> str:
        added = r["peak"]
        return f"{added['ours'] / 2**20:.1f} MB, {added['theirs'] / 2**20:.1f}" if added else ""

    return table(
        head,
        [
            [
                f"{r['call']} {'train' if r['train'] else 'infer'}"
                + (f" ({r['note']})" if r["note"] else ""),
                str(r["threads"]),
                f"{duration(r['ours'])} ±{r['ours_iqr'] / r['ours']:.0%}",
                f"{duration(r['theirs'])} ±{r['theirs_iqr'] / r['theirs']:.0%}",
                f"{r['ratio']:.2f}",
                f"{r['gflops']:.3g}",
                "" if r["share"] is None else f"{r['share']:.0%}",
                kept(r),
                peak(r),
                *(f"{r['peers'][p] / r['ours']:.2f}" if p in r["peers"] else "" for p in peers),
            ]
            for r in rows
        ],
    )


def summary_table() -> str:
    """Every group on every machine, two threads, for the results' first page."""
    runs = [load(m.file)["groups"] for m in WHOLE]
    groups = list(dict.fromkeys(g["group"] for run in runs for g in run))
    rows = []
    for group in groups:
        found = [
            next((g for g in run if (g["group"], g["threads"]) == (group, 2)), None) for run in runs
        ]
        first = next(g for g in found if g)
        cells = [f"{g['geomean']:.2f} ({g['least']:.2f})" if g else "–" for g in found]
        rows.append([group, first["what"], *cells, f"{first['target']:.2f}"])
    return table(["group", "what", *(m.name for m in WHOLE), "target"], rows, 2)


def gpu_table() -> str:
    calls = gpu_calls()
    rows = []
    for kind in GPU_KINDS:
        mine = [c for c in calls if c.kind == kind]
        rows.append(
            [
                kind,
                str(len(mine)),
                number(geomean([c.ratio for c in mine])),
                number(min(c.ratio for c in mine)),
                number(geomean([c.theirs / c.graph for c in mine])),
            ]
        )
    return table(["calls", "rows", "geometric mean", "slowest", "captured in a graph"], rows)


def gpu_rows() -> str:
    """Every call of the H200 run."""
    head = ["call", "rnnkern, µs", "in a graph, µs", "cuDNN, µs", "µs per step", "ratio",
            "ratio, graph"]  # fmt: skip
    return table(
        head,
        [
            [
                c.call,
                f"{c.ours:.1f}",
                f"{c.graph:.1f}",
                f"{c.theirs:.1f}",
                f"{c.graph / c.steps:.2f}",
                f"{c.ratio:.2f}",
                f"{c.theirs / c.graph:.2f}",
            ]
            for c in gpu_calls()
        ],
    )


def gpu_machine() -> str:
    facts = load("gpu-h200")["machine"]
    return table(
        ["fact", "value"],
        [[name.replace("_", " "), str(value)] for name, value in facts.items()],
        2,
    )


def gpu_plot() -> str:
    calls = gpu_calls()
    order = sorted(calls, key=lambda c: GPU_KINDS.index(c.kind))
    short = {kind: kind.split(",")[0].split(":")[0] for kind in GPU_KINDS}
    names = [f"{short[c.kind]}" for c in order]
    return bars([c.call for c in order], [c.ratio for c in order], names)


#: What a page asks for by name: a line `<!-- results: NAME -->`, indented as its table shall be.
TABLES = {
    "summary": summary_table,
    "gpu-table": gpu_table,
    "gpu-rows": gpu_rows,
    "gpu-machine": gpu_machine,
}


def filled(text: str) -> str:
    """The page with the tables that it asks for."""

    def fill(mark: re.Match[str]) -> str:
        indent, name = mark.groups()
        return "\n".join(indent + line for line in TABLES[name]().split("\n"))

    return re.sub(r"^( *)<!-- results: ([\w-]+) -->$", fill, text, flags=re.MULTILINE)


def pages() -> dict[str, str]:
    """Every generated file by its path below docs/.

    Raises ValueError for a CPU result that MACHINES does not describe.
    """
    shown = {machine.file for machine in MACHINES}
    if unknown := {path.stem for path in RESULTS.glob("cpu-*.json")} - shown:
        raise ValueError(f"MACHINES does not describe {', '.join(sorted(unknown))}")
    files = {"performance/gpu-h200.svg": gpu_plot()}
    for machine in MACHINES:
        page, plot = machine_page(machine)
        files[f"performance/{machine.file}.md"] = page
        files[f"performance/{machine.file}.svg"] = plot
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=Path, help="also write every page and plot below this")
    args = parser.parse_args()
    HEADLINE.write_text(headline(), encoding="utf-8")
    for name, text in pages().items() if args.pages else ():
        path = args.pages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
