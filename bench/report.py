"""What a run is turned into: a table on the terminal, a JSON file and a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from measure import Machine, Result, processor
from peers import PEERS
from rich.console import Console
from rich.table import Table
from rows import TARGETS, geomean

PEER_TITLES = [title for title, *_ in PEERS.values()]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def timing(median: float, iqr: float) -> str:
    return f"{duration(median)} ±{iqr / median:.0%}"


def header(peers: Iterable[str]) -> str:
    """The titles over `line`."""
    return (
        f"{'group':10}{'call':38}{'mode':6}{'thr':>3}{'rnnkern':>15}{'torch.nn':>15}{'ratio':>8}"
        f"{''.join(f'{title:>16}' for title in peers)}"
        f"{'GFLOP/s':>9}{'limit':>7}  {'saved for backward':30}added at the peak"
    )


def line(r: Result, peers: Iterable[str]) -> str:
    """One result under `header`, with rich's colours; printed as soon as it is there."""
    head = f"{r.row.group:10}{r.row!s:38}{r.row.mode:6}{r.threads:>3}"
    if r.wrong:
        return f"{head}  [red]results disagree:[/] {r.wrong}"
    colour = "green" if r.ratio >= 1 else "red"
    share = "" if r.share is None else f"{r.share:.0%}"
    others = ""
    for title in peers:
        if title in r.peers:
            text = f"{duration(r.peers[title])} {r.peers[title] / r.ours:.2f}×"
        else:
            text = "disagrees" if title in r.peers_wrong else "–"
        others += f"{text:>16}"
    saved = peak = ""
    if r.saved:
        mine, other = r.saved["ours"], r.saved["theirs"]
        saved = f"{mine / 2**10:.0f} KB = {mine / max(other, 1):.2f} × torch.nn's"
        saved = f"[red]{saved:30}[/]" if r.keeps_more else f"{saved:30}"
        peak = "–"
    if r.peak:
        peak = f"{r.peak['ours'] / 2**20:.1f} MB, torch.nn {r.peak['theirs'] / 2**20:.1f}"
    return (
        f"{head}{timing(r.ours, r.ours_iqr):>15}{timing(r.theirs, r.theirs_iqr):>15}"
        f"[{colour}]{r.ratio:8.2f}[/]{others}{r.gflops:9.3g}{share:>7}  {saved}{peak}"
    )


def groups(results: list[Result]) -> list[dict[str, Any]]:
    """Per group and number of threads: geometric mean, least ratio, target, means of the peers."""
    out = []
    for group, (target, what) in TARGETS.items():
        for threads in sorted({r.threads for r in results}):
            mine = [r for r in results if group in r.row.subgroups and r.threads == threads]
            ratios = [r.ratio for r in mine if not r.wrong]
            if ratios:
                out.append(
                    {
                        "group": group,
                        "what": what,
                        "threads": threads,
                        "rows": len(ratios),
                        "wrong": len(mine) - len(ratios),
                        "geomean": geomean(ratios),
                        "least": min(ratios),
                        "ceiling": geomean(ceilings)
                        if (ceilings := [r.ceiling for r in mine if not r.wrong and r.ceiling])
                        else None,
                        "target": target,
                        "peers": {
                            title: geomean([r.peers[title] / r.ours for r in timed])
                            for title in PEER_TITLES
                            if (timed := [r for r in mine if title in r.peers])
                        },
                    }
                )
    return out


def summary(results: list[Result]) -> Table:
    """The groups against their targets; last the peers' times over ours, where they take part."""
    found = groups(results)
    peers = [title for title in PEER_TITLES if any(title in g["peers"] for g in found)]
    out = Table(title="geometric means")
    out.add_column("group")
    out.add_column("what")
    for name in ("threads", "rows", "geomean", "target", "least", "at the limit", *peers):
        out.add_column(name, justify="right")
    for g in found:
        colour = "green" if g["geomean"] >= g["target"] else "red"
        out.add_row(
            g["group"],
            g["what"],
            str(g["threads"]),
            str(g["rows"]) + (f", {g['wrong']} wrong" if g["wrong"] else ""),
            f"[{colour}]{g['geomean']:.2f}[/]",
            f"{g['target']:.2f}",
            f"{g['least']:.2f}",
            "–" if g["ceiling"] is None else f"{g['ceiling']:.1f}",
            *(f"{g['peers'][title]:.2f}" if title in g["peers"] else "–" for title in peers),
        )
    return out


def memory_summary(results: list[Result]) -> str:
    """The rows that keep more for backward than torch.nn does."""
    training = [r for r in results if r.saved]
    more = {f"  {r.row.group}: {r.row}": r.saved for r in training if r.keeps_more}
    if not training or not more:
        return "no row keeps more for backward than torch.nn" if training else ""
    lines = [f"{text} {s['ours'] / s['theirs']:.2f} ×" for text, s in more.items()]
    return "\n".join(["keep more for backward than torch.nn:", *lines])


def machine_facts(machines: list[Machine]) -> dict[str, Any]:
    ops = torch.ops.rnnkern
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkern": json.loads(ops.info()) if hasattr(ops, "info") else {"isa": "not loaded"},
        "limits": [asdict(m) for m in machines],
    }


def show_machine(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"{facts['processor']}, torch {facts['torch']}, {facts['rnnkern']['isa']}")
    for m in facts["limits"]:
        peak = "not measured" if m["peak"] is None else f"{m['peak']:.0f} GFLOP/s"
        console.print(
            f"{m['threads']} threads: fp32 peak {peak}, L2 reads {m['cache']:.0f} GB/s, "
            f"memory copies {m['memory']:.0f} GB/s"
        )


def write_json(path: Path, facts: dict[str, Any], results: list[Result]) -> None:
    rows = []
    for r in results:
        call = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(r.row).items()}
        times = {k: v for k, v in asdict(r).items() if k not in ("row", "machine")}
        times |= {"threads": r.threads, "limit": r.limit}
        derived = (
            {}
            if r.wrong
            else {"ratio": r.ratio, "gflops": r.gflops, "share": r.share, "ceiling": r.ceiling}
        )
        rows.append({"call": str(r.row), **call, **times, **derived})
    document = {"machine": facts, "groups": groups(results), "rows": rows}
    # A row that disagrees has NaN times, which JSON has no word for.
    text = json.dumps(document, indent=1).replace("NaN", "null")
    path.write_text(text + "\n")


def plot(path: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """One bar per row: how many times faster, on a logarithmic scale, coloured by group."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    threads = max(r.threads for r in results)
    shown = [r for r in results if not r.wrong and r.threads == threads]
    colours = {g: f"C{i}" for i, g in enumerate(dict.fromkeys(r.row.group for r in shown))}
    fig, ax = plt.subplots(figsize=(9, 1.5 + 0.19 * len(shown)), layout="constrained")
    for i, r in enumerate(shown):
        ax.barh(i, r.ratio - 1, left=1, color=colours[r.row.group])
        ax.text(max(r.ratio, 1) * 1.02, i, f"{r.ratio:.2f}", va="center", fontsize=6)
    ax.set_yticks(range(len(shown)), [f"{r.row} {r.row.mode}" for r in shown], fontsize=6)
    ax.set_xscale("log")
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("times faster than torch.nn")
    ax.set_title(f"{facts['processor']}, {threads} threads", fontsize=9)
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
    ax.legend(handles, list(colours), fontsize=7, loc="lower right")
    fig.savefig(path, dpi=150)
    plt.close(fig)
