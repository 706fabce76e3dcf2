"""The CPU engine on NumPy arrays (csrc/bindings/numpy_module.cpp); one dtype T per call.

Letters as in rnnkern/numpy.py.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .call_spec import CallSpec

T = TypeVar("T", np.float32, np.float64)

def forward(
    input: NDArray[T],
    batch_sizes: Sequence[int] | None,
    state: Sequence[NDArray[T]],
    weights: Sequence[NDArray[T]],
    spec: CallSpec,
    train: bool,
) -> tuple[NDArray[T], NDArray[T], NDArray[T], NDArray[T], NDArray[T]]:
    """(output, h_n (D, B, R), c_n (D, B, H), saved, c_states): see saved_layout.py."""

def backward(
    grad_output: NDArray[T] | None,
    grad_h: NDArray[T] | None,
    grad_c: NDArray[T] | None,
    input: NDArray[T],
    batch_sizes: Sequence[int] | None,
    state: Sequence[NDArray[T]],
    weights: Sequence[NDArray[T]],
    output: NDArray[T],
    saved: NDArray[T],
    c_states: NDArray[T],
    spec: CallSpec,
) -> tuple[NDArray[T], NDArray[T], NDArray[T], list[NDArray[T]], NDArray[T], NDArray[T]]:
    """Gradients of input, h_0, c_0 and the weights; flow_h (D, N, R) and flow_c (D, N, H)."""

def math(name: str, x: NDArray[T]) -> NDArray[T]:
    """The engine's "exp", "sigmoid" or "tanh"."""

def cells() -> str:
    """The compiled table of cells, as JSON."""

def isas() -> list[str]:
    """The instruction-set levels that this processor runs, lowest first."""

def isa() -> str:
    """The level in use."""

def set_isa(name: str) -> None:
    """Raises ValueError for a level that this processor does not have."""

def set_threads(threads: int) -> None: ...
