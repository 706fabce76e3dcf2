"""The CPU engine on NumPy arrays (csrc/bindings/numpy_module.cpp); one dtype T per call.

Letters as in rnnkern/numpy/__init__.py.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

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
    masks: NDArray[T] | None = None,
) -> tuple[NDArray[T], NDArray[T], NDArray[T], NDArray[T], NDArray[T]]:
    """(output, h_n (D, B, R), c_n (D, B, H), saved, c_states): see saved_layout.py.

    masks: (kMasks, H), those of all steps and rows, for a cell that takes some.
    """

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

def prepack(
    weights: Sequence[NDArray[T]], spec: CallSpec, format: int, masks: NDArray[T] | None = None
) -> NDArray[np.uint8]:
    """The weights of one layer, packed once for the level in use; opaque. Masks as in forward.

    format: 0 the weights' own type, 1 bfloat16, 2 int8 (both of float32 weights).
    """

def forward_prepacked(
    input: NDArray[T],
    batch_sizes: Sequence[int] | None,
    state: Sequence[NDArray[T]],
    prepacked: NDArray[np.uint8],
    spec: CallSpec,
    hidden_size: int,
    proj_size: int,
) -> tuple[NDArray[T], NDArray[T], NDArray[T]]:
    """(output, h_n (D, B, R), c_n (D, B, H))."""

class Stream:
    """The states of a batch and the prepacked weights of a stack, which it keeps alive."""

    address: int  # of the engine's object
    batch: int
    input_size: int
    width: int  # R
    hidden_size: int
    layers: int
    c_width: int
    dtype: str  # "float32", "float64" or "bfloat16"
    h_address: int  # of h (L, B, R) in that type
    c_address: int  # of c (L, B, H), float64 or float32; 0 without c

    def __init__(self, layers: Sequence[NDArray[np.uint8]], batch: int, threads: int) -> None: ...
    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """(B, I) -> (B, R), one step, or (T, B, I) -> (T, B, R)."""

    def run_at(self, x_address: int, steps: int, y_address: int) -> None:
        """The same on contiguous memory of any type."""

    def reset(self, row: int) -> None:
        """Sets the states of a row to zero."""

    def reset_all(self) -> None: ...

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
