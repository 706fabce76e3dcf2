"""The walk over time that serves every cell, and the walk back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..state_dict import Weights
from .cells import Array, Cell, States
from .episodes import Episodes


@dataclass
class Direction:
    """All that one direction of a layer computed. Row n is step t and batch row b: in padded data
    n = t·B + b. `raw` is h before the projection, h itself without one."""

    weights: Weights
    prev: States  # states before each step, each (N, ·)
    after: States  # states after each step: h (N, R), c (N, H)
    raw: Array  # (N, H)
    saved: dict[str, Array]  # gates by name, each (N, H)
    final: States  # states after the row's last step, each (B, ·)
    episodes: Episodes | None

    @property
    def hidden(self) -> Array:
        return self.after[0]

    @property
    def cell(self) -> Array | None:
        return self.after[1] if len(self.after) > 1 else None


def _steps(sizes: Sequence[int], reverse: bool) -> list[tuple[int, slice]]:
    """The number of batch rows of each step and where they lie, in the order of the walk."""
    begin = np.cumsum([0, *sizes])
    steps = [(b - a, slice(a, b)) for a, b in pairwise(begin)]
    return steps[::-1] if reverse else steps


def walk(
    cell: Cell,
    x: Array,
    given: Weights,
    state: Sequence[Array],
    sizes: Sequence[int],
    reverse: bool,
    resets: Array | None,
    after_reset: Sequence[Array],
) -> Direction:
    w = given.map(lambda a: np.asarray(a, np.float64))
    hidden = w.w_ih.shape[0] // cell.gates
    widths = (w.w_hh.shape[1], hidden)[: cell.states]
    # A sequence that has ended (or, walking backward, not begun) keeps its state.
    now = [np.zeros((sizes[0], width)) for width in widths]
    for s, s_0 in zip(now, state, strict=False):
        s += s_0
    prev, after = (tuple(np.empty((len(x), width)) for width in widths) for _ in range(2))
    raw = np.empty((len(x), hidden))
    saved: dict[str, Array] = {}
    episodes, final = None, now
    if resets is not None:
        fresh = after_reset or [np.zeros((*np.shape(resets), width)) for width in widths]
        episodes = Episodes.of(np.asarray(resets, bool), tuple(now), tuple(fresh), reverse)
        final = [np.empty_like(s) for s in now]
    for active, rows in _steps(sizes, reverse):
        if episodes is not None:
            now = episodes.enter(rows.start // active, now)
        before = tuple(s[:active].copy() for s in now)
        p, q = x[rows] @ w.w_ih.T, before[0] @ w.w_hh.T
        if w.b_ih is not None:
            p, q = p + w.b_ih, q + w.b_hh
        (raw[rows], *rest), gates = cell.step(p, q, before)
        h = raw[rows] if w.w_hr is None else raw[rows] @ w.w_hr.T
        for k, s in enumerate((h, *rest)):
            prev[k][rows], after[k][rows], now[k][:active] = before[k], s, s
        for name, gate in gates.items():
            saved.setdefault(name, np.empty_like(raw))[rows] = gate
        if episodes is not None:
            left = episodes.ends[rows.start // active]
            for whole, s in zip(final, now, strict=True):
                whole[left] = s[left]
    return Direction(w, prev, after, raw, saved, tuple(final), episodes)


def walk_back(
    cell: Cell,
    x: Array,
    done: Direction,
    d_hidden: Array,
    d_state: list[Array],
    sizes: Sequence[int],
    reverse: bool,
) -> tuple[Array, Weights, States, States, States]:
    """d_x, d_weights, the derivatives by the initial states, the total ones at every step, and
    those by the states after resets."""
    w = done.weights
    d_weights = w.map(np.zeros_like)
    d_x = np.zeros_like(x)
    flow = tuple(np.empty_like(s) for s in done.after)
    episodes, d_final = done.episodes, d_state
    if episodes is not None:
        d_state = [np.zeros_like(d) for d in d_final]
        d_begins = [np.zeros_like(s) for s in episodes.initial]
    for active, rows in reversed(_steps(sizes, reverse)):
        if episodes is not None:
            episodes.add_final(rows.start // active, d_state, d_final)
        d_after = [d[:active] for d in d_state]
        d_h = d_after[0] + d_hidden[rows]  # h_t acts through the next step and through the output
        flow[0][rows] = d_h
        if w.w_hr is not None and d_weights.w_hr is not None:
            d_weights.w_hr[:] += d_h.T @ done.raw[rows]
            d_h = d_h @ w.w_hr
        saved = {name: gate[rows] for name, gate in done.saved.items()}
        prev = tuple(s[rows] for s in done.prev)
        after = (done.raw[rows], *(s[rows] for s in done.after[1:]))
        d_p, d_q, d_prev, total = cell.adjoint(saved, prev, after, (d_h, *d_after[1:]))
        if cell.states > 1:
            flow[1][rows] = total[1]
        d_x[rows] = d_p @ w.w_ih
        d_weights.w_ih[:] += d_p.T @ x[rows]
        d_weights.w_hh[:] += d_q.T @ prev[0]
        if d_weights.b_ih is not None and d_weights.b_hh is not None:
            d_weights.b_ih[:] += d_p.sum(axis=0)
            d_weights.b_hh[:] += d_q.sum(axis=0)
        through_q = d_q @ w.w_hh
        d_state[0][:active] = through_q if w.w_hr is not None else through_q + d_prev[0]
        for d, d_s in zip(d_state[1:], d_prev[1:], strict=True):
            d[:active] = d_s
        if episodes is not None:
            episodes.cut(rows.start // active, d_state, d_begins)
    if episodes is None:
        return d_x, d_weights, tuple(d_state), flow, ()
    h_0, fresh = episodes.gradients(d_begins)
    return d_x, d_weights, h_0, flow, fresh
