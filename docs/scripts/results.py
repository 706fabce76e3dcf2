"""Turns bench/results/*.json into the performance pages and their plots.

python docs/scripts/results.py                writes docs/img/headline.svg, the README's picture
python docs/scripts/results.py --pages DIR    also writes every page and plot below DIR

`make docs` calls `pages()` through hooks.py, so the site never shows stale figures. Standard
library only: the documents build without torch and without matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
HEADLINE = ROOT / "docs" / "img" / "headline.svg"

# Okabe & Ito (2008): told apart with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PEERS = ("ONNX Runtime", "OpenVINO", "JAX")


@dataclass(frozen=True)
class Machine:
    """What the JSON of a run does not say about it."""

    file: str
    name: str
    processor: str
    state: str  # of the source when it was measured
    whole: bool = True  # False: some groups only, so neither in the summary nor in the picture


MACHINES = (
    Machine(
        "cpu-zen5", "Zen 5",
        "AMD EPYC (Zen 5), AVX-512 with BF16, 48 KB of L1 and 1 MB of L2 per core, 32 MB of L3",
        "commit 54b9042",
    ),
    Machine(
        "cpu-graniterapids", "Granite Rapids",
        "Intel Xeon, presumably Granite Rapids, AVX-512 with AMX, 2 MB of L2 per core, "
        "480 MB of L3",
        "commit 52d1d16; the LSTM's last units did not share vectors yet",
    ),
    Machine(
        "cpu-emeraldrapids", "Emerald Rapids",
        "Intel Xeon (Emerald Rapids), AVX-512 with AMX, 2 MB of L2 per core",
        "27 November 2026, before commit 1977a83 (single steps of more than eight rows)",
    ),
    Machine(
        "cpu-icelake", "Ice Lake",
        "Intel Xeon (Ice Lake), AVX-512 without BF16, 1.25 MB of L2 per core",
        "23 November 2026, before commit 34d352d",
    ),
    Machine(
        "cpu-icelake-peers", "Ice Lake, other libraries", "The same Ice Lake",
        "23 November 2026, before single steps became 1.2 to 1.4 times as fast",
        whole=False,
    ),
)  # fmt: skip
WHOLE = tuple(machine for machine in MACHINES if machine.whole)

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


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# ---- the GPU's rows, by kind ----


@dataclass(frozen=True)
class GpuCall:
    """One result of the GPU benchmark; `call` reads "LSTM T512 B16 I512 H512 bf16 infer"."""

    call: str
    ours: float  # µs
    graph: float
    theirs: float
    steps: int

    def __post_init__(self) -> None:
        if self.precision not in ("fp16", "bf16", "fp32", "tf32"):
            raise ValueError(f"unexpected call {self.call!r}")

    @property
    def cell(self) -> str:
        return self.call.split()[0]

    @property
    def precision(self) -> str:
        return self.call.split()[-2]

    @property
    def units(self) -> int:
        return next(int(word[1:]) for word in self.call.split() if word[0] == "H")

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def kind(self) -> str:
        words = self.call.split()
        if any(word in ("bi", "L2", "packed") for word in words):
            return "bidirectional, two layers, or ragged; H 256"
        if self.units >= 1024 or any(word.startswith("proj") for word in words):
            return "stepwise: H 1024 and 2048, projection"
        if self.precision == "bf16":
            return "bfloat16, H 64–768, B 1–128"
        if self.precision == "fp16":
            return "float16 LSTM, H 128–768" if self.cell == "LSTM" else "float16 GRU and RNN"
        return "float32 and TF32, H 64" if self.units == 64 else "float32 and TF32, H 256 and 512"


GPU_KINDS = (
    "bidirectional, two layers, or ragged; H 256",
    "bfloat16, H 64–768, B 1–128",
    "float16 GRU and RNN",
    "float32 and TF32, H 256 and 512",
    "float16 LSTM, H 128–768",
    "stepwise: H 1024 and 2048, projection",
    "float32 and TF32, H 64",
)


def gpu_calls() -> list[GpuCall]:
    return [
        GpuCall(r["call"], r["ours"], r["graph"], r["theirs"], r["steps"])
        for r in load("gpu-h200")["results"]
        if not r["wrong"]
    ]


# ---- drawing ----


class Svg:
    """An SVG picture on white, readable in light and dark pages."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float) -> None:
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{stroke}" stroke-width="{width}"/>'
        )

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}"/>'
        )

    def dot(self, x: float, y: float, fill: str, title: str) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" fill-opacity="0.85">'
            f"<title>{escape(title)}</title></circle>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        anchor: str = "start",
        fill: str = "#222",
        weight: str = "normal",
    ) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{fill}" font-weight="{weight}">{escape(text)}</text>'
        )

    def __str__(self) -> str:
        w, h = f"{self.width:.0f}", f"{self.height:.0f}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" '
            f'viewBox="0 0 {w} {h}" font-family="system-ui, Segoe UI, Helvetica, sans-serif">'
        )
        return "\n".join([head, f'<rect width="{w}" height="{h}" fill="#fff"/>', *self.parts,
                          "</svg>", ""])  # fmt: skip


@dataclass(frozen=True)
class LogAxis:
    """Ratios on a logarithmic axis from `low` to `high`, drawn between x0 and x1."""

    low: float
    high: float
    x0: float
    x1: float

    def at(self, ratio: float) -> float:
        inside = min(max(ratio, self.low), self.high)
        share = math.log(inside / self.low) / math.log(self.high / self.low)
        return self.x0 + share * (self.x1 - self.x0)

    def draw(self, svg: Svg, top: float, bottom: float, ticks: Iterable[float]) -> None:
        for tick in ticks:
            x, equal = self.at(tick), tick == 1
            svg.line(x, top, x, bottom, "#222" if equal else "#ddd", 1.4 if equal else 1)
            svg.text(x, bottom + 15, f"{tick:g}×", 11, "middle", "#555")


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


def bars(labels: Sequence[str], ratios: Sequence[float], groups: Sequence[str]) -> str:
    """One bar per call, from 1, coloured by group."""
    row, left, width, top = 15, 330, 860, 40
    colours = {
        group: PALETTE[i % len(PALETTE)] for i, group in enumerate(dict.fromkeys(groups))
    }  # fmt: skip
    high = 2 ** math.ceil(math.log2(max(ratios)))
    axis = LogAxis(min(0.5, min(ratios)), high, left, width - 60)
    bottom = top + row * len(labels)
    svg = Svg(width, bottom + 26)
    x = 12.0
    for group, colour in colours.items():
        svg.rect(x, 10, 11, 11, colour)
        svg.text(x + 15, 20, group, 12)
        x += 30 + 7.5 * len(group)
    axis.draw(svg, top - 4, bottom, [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if t <= high])
    for i, (label, ratio, group) in enumerate(zip(labels, ratios, groups, strict=True)):
        y, one, end = top + row * i, axis.at(1), axis.at(ratio)
        svg.text(left - 8, y + 11, label, 11, "end")
        svg.rect(min(one, end), y + 2, abs(end - one), row - 4, colours[group])
        svg.text(max(one, end) + 5, y + 11, f"{ratio:.2f}", 10, fill="#444")
    return str(svg)


# ---- pages ----


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
