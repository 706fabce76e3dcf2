"""Reference recurrent cells in NumPy and float64, forward and backward: ground truth of the tests.

Written to be read beside a textbook, not to be fast. Every cell is a class with two functions:
`step`, its equations, and `adjoint`, their derivative. One walk over time serves them all.

    >>> tape = forward("LSTM", x, [Weights(w_ih, w_hh, b_ih, b_hh)])   # x is (T, B, I)
    >>> tape.output, tape.h_n, tape.c_n, tape.directions[0].saved["forget"]
    >>> gradients = backward(tape, grad_output=np.ones_like(tape.output))
    >>> gradients.input, gradients.weights[0].w_hh, gradients.flow_c[0]

Letters: T steps, B batch rows, I inputs, H hidden units, R width of h (H, or P with a projection),
D directions, N rows of all steps together: T·B, or the length of packed data. p = W_ih x + b_ih and
q = W_hh h + b_hh are the two products of a step, with the gates in torch.nn's order along their
last axis. d_ before a name is the derivative of the loss by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .state_dict import Weights

__all__ = ["CELLS", "Direction", "Gradients", "Tape", "Weights", "backward", "forward"]

Array = np.ndarray
States = tuple[Array, ...]  # (h,) or (h, c), each (B, H)


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows


class RNN:
    """Elman's network (1990), the course's SimpleRNN: h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""

    gates = 1
    states = 1

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        """States after the step, and the gates (none here) by name."""
        return (np.tanh(p + q),), {}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        """(d_p, d_q, d_prev, total): d_prev leaves out what flows through q = W_hh h + b_hh; total
        are the derivatives by the states after the step along every path."""
        (d_h,) = d_after
        d_sum = d_h * (1 - after[0] ** 2)
        return d_sum, d_sum, (np.zeros_like(d_h),), (d_h,)


class ReluRNN(RNN):
    """Elman's network with a rectifier: h' = max(0, W_ih x + b_ih + W_hh h + b_hh)."""

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        return (np.maximum(p + q, 0),), {}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        (d_h,) = d_after
        d_sum = np.where(after[0] <= 0, 0, d_h)
        return d_sum, d_sum, (np.zeros_like(d_h),), (d_h,)


class LSTM:
    """Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber &
    Cummins 2000), the course's SimpleLSTM.

    i, f, o = σ(p + q)     input, forget and output gate
    g       = tanh(p + q)  cell gate, the course's C̃
    c'      = f c + i g    cell state
    h'      = o tanh(c')   hidden state
    """

    gates = 4
    states = 2

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        i, f, g, o = np.split(p + q, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        c = f * prev[1] + i * g
        return (o * np.tanh(c), c), {"input": i, "forget": f, "cell": g, "output": o}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        i, f, g, o = (saved[name] for name in ("input", "forget", "cell", "output"))
        d_h, d_c = d_after
        tanh_c = np.tanh(after[1])
        d_c = d_c + d_h * o * (1 - tanh_c**2)  # c' acts through the next step and through h'
        d_i = d_c * g * i * (1 - i)
        d_f = d_c * prev[1] * f * (1 - f)
        d_g = d_c * i * (1 - g**2)
        d_o = d_h * tanh_c * o * (1 - o)
        d_sum = np.concatenate([d_i, d_f, d_g, d_o], axis=-1)
        # The path from c to c' is a product with f alone: where f is near 1 no gradient is lost.
        return d_sum, d_sum, (np.zeros_like(d_h), d_c * f), (d_h, d_c)


class GRU:
    """Gated recurrent unit (Cho et al. 2014) as torch.nn.GRU has it: the reset gate acts after the
    recurrent product, so the new gate's share of q, called q_n, is kept apart.

    r, z = σ(p + q)           reset and update gate
    n    = tanh(p + r q_n)    new gate
    h'   = (1 - z) n + z h
    """

    gates = 3
    states = 1

    @staticmethod
    def step(p: Array, q: Array, prev: States) -> tuple[States, dict[str, Array]]:
        (p_r, p_z, p_n), (q_r, q_z, q_n) = np.split(p, 3, axis=-1), np.split(q, 3, axis=-1)
        r, z = sigmoid(p_r + q_r), sigmoid(p_z + q_z)
        n = np.tanh(p_n + r * q_n)
        return ((1 - z) * n + z * prev[0],), {"reset": r, "update": z, "new": n, "q": q_n}

    @staticmethod
    def adjoint(
        saved: dict[str, Array], prev: States, after: States, d_after: States
    ) -> tuple[Array, Array, States, States]:
        r, z, n, q_n = (saved[name] for name in ("reset", "update", "new", "q"))
        (d_h,) = d_after
        d_n = d_h * (1 - z) * (1 - n**2)
        d_z = d_h * (prev[0] - n) * z * (1 - z)
        d_r = d_n * q_n * r * (1 - r)
        d_p = np.concatenate([d_r, d_z, d_n], axis=-1)
        d_q = np.concatenate([d_r, d_z, d_n * r], axis=-1)
        return d_p, d_q, (d_h * z,), (d_h,)


Cell = type[RNN] | type[LSTM] | type[GRU]
#: By torch.nn's mode.
CELLS: dict[str, Cell] = {"LSTM": LSTM, "GRU": GRU, "RNN_TANH": RNN, "RNN_RELU": ReluRNN}


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
    episodes: "Episodes | None"

    @property
    def hidden(self) -> Array:
        return self.after[0]

    @property
    def cell(self) -> Array | None:
        return self.after[1] if len(self.after) > 1 else None


@dataclass
class Episodes:
    """Where one direction begins and ends a row's episodes; padded data only.

    resets       (T, B): whether the state is replaced before the step
    first        (T, B): first step of the episode that the step belongs to
    begins, ends (T, B): whether the walk enters the step with an initial state; leaves its row's
                 last episode after it
    initial      states with which the step's episode begins, each (T, B, ·)
    """

    resets: Array
    first: Array
    begins: Array
    ends: Array
    initial: States

    @classmethod
    def of(cls, resets: Array, h_0: States, after_reset: States, reverse: bool) -> "Episodes":
        """h_0 (B, ·) and the states after resets, each (T, B, ·)."""
        steps, rows = np.indices(resets.shape)
        first = np.maximum.accumulate(np.where(resets, steps, 0))
        last_step = steps == len(resets) - 1
        begins, ends = resets | (steps == 0), last_step
        if reverse:  # from the end of each episode to its first step
            begins = np.concatenate([resets[1:], last_step[-1:]])
            ends = steps == first[-1]
        at_first = resets[first, rows][..., None]
        initial = tuple(
            np.where(at_first, s[first, rows], h) for h, s in zip(h_0, after_reset, strict=True)
        )
        return cls(resets, first, begins, ends, initial)

    def enter(self, step: int, states: Sequence[Array]) -> list[Array]:
        """The states before a step."""
        begins = self.begins[step][:, None]
        return [np.where(begins, new[step], s) for new, s in zip(self.initial, states, strict=True)]

    def add_final(self, step: int, d_states: Sequence[Array], d_final: Sequence[Array]) -> None:
        """Adds the derivatives by the final states to those by the states after a step."""
        ends = self.ends[step]
        for d, d_end in zip(d_states, d_final, strict=True):
            d[ends] += d_end[ends]

    def cut(self, step: int, d_states: Sequence[Array], d_begins: Sequence[Array]) -> None:
        """Moves the derivatives by the states before a step to `d_begins`, (T, B, ·), where an
        episode begins."""
        begins = self.begins[step]
        for d, d_begin in zip(d_states, d_begins, strict=True):
            d_begin[step, begins] = d[begins]
            d[begins] = 0

    def gradients(self, d_begins: Sequence[Array]) -> tuple[States, States]:
        """Derivatives by h_0 (B, ·) and by the states after resets (T, B, ·), from those by the
        initial state of the episode that begins at a step."""
        rows = np.indices(self.resets.shape)[1]
        by_first = tuple(np.zeros_like(d) for d in d_begins)
        for total, d in zip(by_first, d_begins, strict=True):
            np.add.at(total, (self.first, rows), d)
        reset = self.resets[..., None]
        h_0 = tuple(np.where(reset, 0, total)[0] for total in by_first)
        return h_0, tuple(np.where(reset, total, 0) for total in by_first)


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
    _check(CELLS[mode], rows, weights, state, sizes)
    if resets is not None:
        _check_resets(CELLS[mode], weights, sizes, packed, resets, after_reset)
    directions = [
        _walk(
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
            _require_shape(f"the gradient of {name}", grad, () if result is None else result.shape)
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
        d_x, *rest = _walk_back(
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


def _require_shape(name: str, array: Array, wanted: tuple[int, ...]) -> None:
    if np.shape(array) != wanted:
        raise ValueError(f"{name} must have the shape {wanted}, got {np.shape(array)}")


def _check(
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
                _require_shape(name, array, shape)
        if w.w_hr is None and width != hidden:
            raise ValueError(f"w_hh must have {hidden} columns, got {width}")
    if len(state) not in (0, cell.states):
        raise ValueError(f"state must be empty or have {cell.states} arrays, got {len(state)}")
    for name, s, n in zip(("h_0", "c_0"), state, (width, hidden), strict=False):
        _require_shape(name, s, (len(weights), sizes[0], n))


def _check_resets(
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
    _require_shape("resets", resets, by_step)
    if len(after_reset) not in (0, cell.states):
        raise ValueError(f"after_reset must be empty or have {cell.states} arrays")
    widths = np.shape(weights[0].w_hh)[-1], len(weights[0].w_ih) // cell.gates
    for s, width in zip(after_reset, widths, strict=False):
        _require_shape("a state after resets", s, (len(weights), *by_step, width))


def _steps(sizes: Sequence[int], reverse: bool) -> list[tuple[int, slice]]:
    """The number of batch rows of each step and where they lie, in the order of the walk."""
    begin = np.cumsum([0, *sizes])
    steps = [(b - a, slice(a, b)) for a, b in pairwise(begin)]
    return steps[::-1] if reverse else steps


def _walk(
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


def _walk_back(
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
