"""What a call of the reference refuses: every error is a ValueError that names the array."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..state_dict import Weights
from .cells import Array, Cell


def require_shape(name: str, array: Array, wanted: tuple[int, ...]) -> None:
    if np.shape(array) != wanted:
        raise ValueError(f"{name} must have the shape {wanted}, got {np.shape(array)}")


def check_layer(
    cell: Cell,
    x: Array,
    weights: Sequence[Weights],
    state: Sequence[Array],
    sizes: Sequence[int],
) -> None:
    if not all(isinstance(w, Weights) for w in weights):
        raise ValueError("weights must be a list with one Weights per direction")
    if any(after > before for before, after in pairwise(sizes)) or sum(sizes) != len(x):
        raise ValueError(f"batch_sizes must not grow and add up to the {len(x)} rows of x")
    for w in weights:
        width, hidden = np.shape(w.w_hh)[-1], len(w.w_ih) // cell.gates
        shapes: list[tuple[int, ...]] = [(cell.gates * hidden, n) for n in (x.shape[1], width)]
        shapes += [(cell.gates * hidden,)] * 2 + [(width, hidden), (0, hidden)]  # no params
        for name, array, shape in zip(w._fields, w, shapes, strict=True):
            if array is not None:
                require_shape(name, array, shape)
        if w.w_hr is None and width != hidden:
            raise ValueError(f"w_hh must have {hidden} columns, got {width}")
    if len(state) not in (0, cell.states):
        raise ValueError(f"state must be empty or have {cell.states} arrays, got {len(state)}")
    for name, s, n in zip(("h_0", "c_0"), state, (width, hidden), strict=False):
        require_shape(name, s, (len(weights), sizes[0], n))


def check_resets(
    cell: Cell,
    weights: Sequence[Weights],
    sizes: Sequence[int],
    packed: bool,
    resets: Array,
    after_reset: Sequence[Array],
) -> None:
    if packed:
        raise ValueError("resets are for padded data")
    by_step = (len(sizes), sizes[0])
    require_shape("resets", resets, by_step)
    if len(after_reset) not in (0, cell.states):
        raise ValueError(f"after_reset must be empty or have {cell.states} arrays")
    widths = np.shape(weights[0].w_hh)[-1], len(weights[0].w_ih) // cell.gates
    for s, width in zip(after_reset, widths, strict=False):
        require_shape("a state after resets", s, (len(weights), *by_step, width))
