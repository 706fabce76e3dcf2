"""How much slower a layer gets while another process keeps every core busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from measure import Machine, compare
from rich.table import Table
from rows import Row


@contextmanager
def busy_cores() -> Iterator[None]:
    """One spinning process per core, ended on leaving."""
    spin = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def slowdowns(
    rows: list[Row], machines: list[Machine], ours: ModuleType, theirs: ModuleType, seconds: float
) -> Table:
    """Busy time over quiet time, ours and torch.nn's."""
    out = Table(title="slowdown with every core kept busy")
    for name in ("call", "mode", "threads", "rnnkern", "torch.nn", "ratio quiet", "ratio busy"):
        out.add_column(name)
    for machine in machines:
        for row in rows:
            quiet = compare(row, machine, ours, theirs, seconds)
            with busy_cores():
                busy = compare(row, machine, ours, theirs, seconds)
            out.add_row(
                str(row),
                row.mode,
                str(machine.threads),
                f"{busy.ours / quiet.ours:.2f}",
                f"{busy.theirs / quiet.theirs:.2f}",
                f"{quiet.ratio:.2f}",
                f"{busy.ratio:.2f}",
            )
    return out
