"""What a forward and a backward pass add to the resident set at their peak, gradients included.

Each measurement is a process of its own: in the benchmark's, what calls before have left with the
allocator, and what a library keeps from call to call, would not show. The processes are forked from
a server that has imported everything and called nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from measure import Side
from rows import Row

_PROC = Path("/proc/self")


def available() -> bool:
    """Linux with glibc: the high-water mark can be reset, and free memory be given back."""
    return (
        sys.platform == "linux"
        and hasattr(ctypes.CDLL(None), "malloc_trim")
        and (_PROC / "clear_refs").exists()
    )


def _status() -> dict[str, int]:
    """VmRSS, VmHWM and RssFile in bytes, among others."""
    lines = (line.split() for line in (_PROC / "status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 2**10 for words in lines if words[-1] == "kB"}


def _measure(row: Row, package: str, threads: int, answer: Connection) -> None:
    torch.set_num_threads(threads)
    layers = importlib.import_module(package)
    with row.settings():
        # A small call loads the libraries and starts the threads.
        Side(replace(row, T=4, B=2, I=4, H=4, proj=min(row.proj, 1)), layers).train()
        side = Side(row, layers)
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "clear_refs").write_text("5")
        before = _status()
        side.train()
        after = _status()
    code = after["RssFile"] - before["RssFile"]  # of libraries, read from their files only now
    answer.send(after["VmHWM"] - before["VmRSS"] - code)


def added_at_peak(row: Row, package: str, threads: int) -> int:
    """Bytes that a training call of `row` with the layer of `package` adds, in a new process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["contention", "memory", "report", "rnnkern"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(row, package, threads, sender))
    process.start()
    sender.close()
    try:
        added: int = receiver.recv()
        return added
    finally:
        process.join()
