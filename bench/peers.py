"""Peers beside torch.nn, where they are installed: pip install 'rnnkern[peers]'.

A peer is a class made with (row, threads), whose `call` runs the row and whose `results` names what
came out, as measure.Side does. All take the calls that they have a standard form for: float32, not
packed; ONNX Runtime and OpenVINO only inference, and no projection. torch.compile takes the cells
that torch.nn has not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Protocol

import torch
from rows import Row
from torch import Tensor

# name: (title, packages that it needs, module that has its class Peer)
PEERS = {
    "onnxruntime": ("ONNX Runtime", ("onnx", "onnxruntime", "onnxscript"), "peer_onnxruntime"),
    "openvino": ("OpenVINO", ("onnx", "openvino", "onnxscript"), "peer_openvino"),
    "jax": ("JAX", ("jax",), "peer_jax"),
    "compile": ("torch.compile", (), "peer_compile"),
}
#: Those that are there but take minutes before they run.
SLOW = ("compile",)


class Peer(Protocol):
    """One row, ready to be timed."""

    def __init__(self, row: Row, threads: int) -> None: ...

    @property
    def call(self) -> Callable[[], object]:
        """Runs the row once and waits for its end."""

    def results(self) -> dict[str, Tensor]:
        """Every result of the row by name, for comparison."""


def installed() -> list[str]:
    """The names of the peers whose packages are here."""
    return [name for name, (_, needs, _) in PEERS.items() if all(map(find_spec, needs))]


def load(names: Iterable[str]) -> dict[str, type[Peer]]:
    """The classes by title."""
    return {PEERS[name][0]: importlib.import_module(PEERS[name][2]).Peer for name in names}


def takes(title: str, row: Row) -> bool:
    """Whether the peer has a standard form for this call."""
    if (title == "torch.compile") != (row.group == "cells"):
        return False
    plain = row.precision is torch.float32 and not (row.packed or row.resets)
    return plain and (title in ("JAX", "torch.compile") or not (row.train or row.proj))
