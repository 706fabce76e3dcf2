"""Drawing: SVG pictures, a logarithmic axis, bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# Okabe & Ito (2008): told apart with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
