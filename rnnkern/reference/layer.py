"""One layer, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..state_dict import Weights
from .cells import CELLS, Array, States
from .checks import check_layer, check_resets, require_shape
from .walk import Direction, walk, walk_back


@dataclass
class Tape:
    """What `forward` did, all that `backward` needs.

    output  (T, B, D·R), or (N, D·R) for packed data
    h_n     (D, B, R);  c_n (D, B, H), None unless LSTM
    """

    mode: str
    input: Array
    sizes: list[int]  # batch rows of each step
    packed: bool
    directions: list[Direction]

    @property
    def output(self) -> Array:
        rows = np.concatenate([d.hidden for d in self.directions], axis=-1)
        return rows if self.packed else rows.reshape(*self.input.shape[:2], -1)

    @property
    def h_n(self) -> Array:
        return np.stack([d.final[0] for d in self.directions])

    @property
    def c_n(self) -> Array | None:
        return np.stack([d.final[1] for d in self.directions]) if self.mode == "LSTM" else None


@dataclass
class Gradients:
    """Derivatives of the loss.

    input   as the input;  h_0 (D, B, R);  c_0 (D, B, H), None unless LSTM
    weights per direction, each as the weight
    flow_h  per direction (N, R): the total derivative by h_t at every step
    flow_c  per direction (N, H): by c_t, along every path, that through h_t too; empty unless LSTM
    after_reset  with resets only: per direction, by each state after resets, (T, B, ·), zero where
                 nothing is reset
    """

    input: Array
    h_0: Array
    c_0: Array | None
    weights: list[Weights]
    flow_h: list[Array]
    flow_c: list[Array]
    after_reset: list[States]


def forward(
    mode: str,
    x: Array,
    weights: Sequence[Weights],
    state: Sequence[Array] = (),
    batch_sizes: Sequence[int] | None = None,
    resets: Array | None = None,
    after_reset: Sequence[Array] = (),
) -> Tape:
    """Runs one layer, in one or both directions, over a batch of sequences.

    mode         "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"
    x            (T, B, I); packed (N, I), the rows of step 0, then of step 1, ...
    weights      one `Weights` per direction, the second walks backward in time
    state        (), (h_0,) or (h_0, c_0), each (D, B, ·); zeros if empty
    batch_sizes  packed data only: how many sequences, sorted by falling length, reach each step
    resets       padded data only: bool (T, B), whether the row's state is replaced before the step.
                 Each episode between resets is a sequence of its own, in both directions; the final
                 states are those of each row's last episode
    after_reset  what replaces it, as state, each (D, T, B, ·); zeros if empty

    Raises ValueError for an unknown mode and for wrong shapes.
    """
    if mode not in CELLS:
        raise ValueError(f"mode must be one of {', '.join(CELLS)}, got {mode!r}")
    x = np.asarray(x, np.float64)
    packed = batch_sizes is not None
    if x.ndim != 3 - packed:
        raise ValueError(f"x must have {3 - packed} dimensions, got {x.ndim}")
    if batch_sizes is None:
        sizes = [x.shape[1]] * x.shape[0]
    else:
        sizes = [int(b) for b in batch_sizes]
    rows = x if packed else x.reshape(-1, x.shape[-1])
    check_layer(CELLS[mode], rows, weights, state, sizes)
    if resets is not None:
        check_resets(CELLS[mode], weights, sizes, packed, resets, after_reset)
    directions = [
        walk(
            CELLS[mode], rows, w, [s[d] for s in state], sizes, bool(d),
            resets, [s[d] for s in after_reset],
        )
        for d, w in enumerate(weights)
    ]  # fmt: skip
    return Tape(mode, x, sizes, packed, directions)


def backward(
    tape: Tape,
    grad_output: Array | None = None,
    grad_h: Array | None = None,
    grad_c: Array | None = None,
) -> Gradients:
    """Backpropagation through time, the adjoint of `forward`: from the derivatives of the loss by
    the output, by h_n and by c_n (each shaped as that result; None means zero)."""
    results = {"output": tape.output, "h_n": tape.h_n, "c_n": tape.c_n}
    for (name, result), grad in zip(results.items(), (grad_output, grad_h, grad_c), strict=True):
        if grad is not None:
            require_shape(f"the gradient of {name}", grad, () if result is None else result.shape)
    rows = tape.input.reshape(-1, tape.input.shape[-1])
    d_rows = np.zeros_like(rows)
    found = []
    for k, direction in enumerate(tape.directions):
        width = direction.hidden.shape[1]
        d_hidden = np.zeros_like(direction.hidden)
        if grad_output is not None:
            d_hidden += grad_output.reshape(len(rows), -1)[:, k * width : (k + 1) * width]
        d_state = [np.zeros_like(s) for s in direction.final]
        for d_s, grad in zip(d_state, (grad_h, grad_c), strict=False):
            if grad is not None:
                d_s += grad[k]
        d_x, *rest = walk_back(
            CELLS[tape.mode], rows, direction, d_hidden, d_state, tape.sizes, bool(k)
        )
        d_rows += d_x
        found.append(rest)
    weights, states, flows, fresh = zip(*found, strict=True)
    h_0, *c_0 = (np.stack(s) for s in zip(*states, strict=True))
    flow_h, *flow_c = (list(f) for f in zip(*flows, strict=True))
    return Gradients(
        d_rows.reshape(tape.input.shape),
        h_0,
        c_0[0] if c_0 else None,
        list(weights),
        flow_h,
        flow_c[0] if flow_c else [],
        [s for s in fresh if s],
    )
