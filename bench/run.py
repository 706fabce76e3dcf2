"""Times rnnkern's layers and torch.nn's alternately and reports how they compare.

python bench/run.py                        everything
python bench/run.py --quick                the shorter rows, a fraction of the time
python bench/run.py --group tiny --match "GRU.*train" --threads 1
python bench/run.py --peers onnxruntime    beside torch.nn only this one
python bench/run.py --peers none           only torch.nn
python bench/run.py --group cells --peers compile
python bench/run.py --busy --group small   with every core kept busy by another process
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from pathlib import Path

from contention import slowdowns
from measure import Machine, compare
from memory import added_at_peak, available
from peers import PEERS, SLOW, installed
from peers import load as load_peers
from report import (
    header,
    line,
    machine_facts,
    memory_summary,
    plot,
    show_machine,
    summary,
    write_json,
)
from rich.console import Console
from rows import TARGETS, Row, rows

QUICK_FLOPS = 8e9


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", action="append", choices=list(TARGETS), help="only this group")
    parser.add_argument("--match", default="", help="only rows whose text this regex is found in")
    parser.add_argument("--threads", help="comma-separated; default: 1 and all")
    parser.add_argument("--seconds", type=float, help="per row, both sides; default 2.5")
    parser.add_argument("--quick", action="store_true", help="short rows, all threads, 0.6 s each")
    parser.add_argument("--busy", action="store_true", help="the slowdown while other work runs")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    parser.add_argument("--ours", default="rnnkern", help="package that has LSTM, GRU and RNN")
    parser.add_argument("--theirs", default="torch.nn", help="package to compare with")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[*PEERS, "none"],
        help="default: those that are installed, without compile",
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=available(),
        help="what training adds to the resident set, in two new processes per row",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest")
    args = parser.parse_args(given)
    if args.peers is None:
        args.peers = [name for name in installed() if name not in SLOW]
    elif "none" in args.peers:
        if len(args.peers) > 1:
            parser.error("argument --peers: none excludes the others")
        args.peers = []
    if missing := sorted({*args.peers} - {*installed()}):
        parser.error(f"argument --peers: not installed: {', '.join(missing)}")
    try:
        re.compile(args.match)
    except re.error as error:
        parser.error(f"argument --match: {error}")
    try:
        valid = min(thread_counts(args)) > 0
    except ValueError:
        valid = False
    if not valid:
        parser.error(f"argument --threads: numbers or 'all', got {args.threads!r}")
    return args


def selected(args: argparse.Namespace) -> list[Row]:
    text = "{0.group} {0} {0.mode} {0.note}".format
    return [
        row
        for row in rows()
        if (not args.group or set(args.group) & set(row.subgroups))
        and re.search(args.match, text(row), re.IGNORECASE)
        and not (args.quick and row.flops() > QUICK_FLOPS)
    ]


def thread_counts(args: argparse.Namespace) -> list[int]:
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    if args.threads:
        return [cores if t == "all" else int(t) for t in args.threads.split(",")]
    return [cores] if args.quick else sorted({1, cores})


def main() -> int:
    """Returns the number of rows whose results disagree, ours or a peer's."""
    args = arguments()
    console = Console()
    chosen = selected(args)
    if not chosen:  # rather than an empty report over the last one
        sys.exit("no row fits --group, --match and --quick")
    if args.list:
        for row in chosen:
            print(f"{row.group:10}{row!s:42}{row.mode:6} {row.note}")
        return 0
    ours, theirs = importlib.import_module(args.ours), importlib.import_module(args.theirs)
    _ = ours.LSTM  # rnnkern loads its library on first use, and the library measures the peak
    seconds = args.seconds or (0.6 if args.quick else 2.5)
    machines = [Machine.measure(n) for n in thread_counts(args)]
    show_machine(console, machine_facts(machines))
    if args.busy:
        console.print(slowdowns(chosen, machines, ours, theirs, seconds))
        return 0

    peers = load_peers(args.peers)
    results = []
    console.print(header(peers), style="bold", soft_wrap=True)
    for machine in machines:
        for row in chosen:
            result = compare(row, machine, ours, theirs, seconds, peers)
            if args.memory and row.train and machine is machines[-1]:
                result.peak = {
                    "ours": added_at_peak(row, args.ours, machine.threads),
                    "theirs": added_at_peak(row, args.theirs, machine.threads),
                }
            results.append(result)
            console.print(line(result, peers), highlight=False, soft_wrap=True)
    facts = machine_facts(machines)  # with the highest limits that were seen
    show_machine(console, facts)
    console.print(summary(results))
    console.print(memory_summary(results), highlight=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out.with_suffix(".json"), facts, results)
    plot(args.out.with_suffix(".png"), facts, results)
    return sum(bool(r.wrong or r.peers_wrong) for r in results)


if __name__ == "__main__":
    sys.exit(main())
