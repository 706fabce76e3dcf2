"""A layer from torch's own differentiable operations: slow, but every transform goes through it.

It serves double backward, forward-mode AD, vmap and whatever else the fused kernels do not reach,
with the operators' meaning of the arguments (see library.py), so that one can stand for the other.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..call_spec import CallSpec
from ..cell_spec import Cell
from . import library
from .library import CELLS, Resets, weights_per_direction

# One step: x = W_ih x + b_ih, or given sums, and, if there is a W_hh, y = W_hh h + b_hh (B, G·H),
# the states before, and learned values per unit (H) and masks of the step (B, H) that the cell has
# -> the states after.
# The equations are torch.nn.LSTM's, GRU's and RNN's own (see their documentation).


def _lstm(x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + y).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
    x_r, x_z, x_n = x.chunk(3, -1)
    y_r, y_z, y_n = y.chunk(3, -1)
    z = torch.sigmoid(x_z + y_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + y_r) * y_n)
    return (n + z * (h - n),)


def _rnn_tanh(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
    return (torch.tanh(x + y),)


def _rnn_relu(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
    return (torch.relu(x + y),)


Step = Callable[..., tuple[Tensor, ...]]

_STEPS: dict[str, Step] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _rnn_tanh,
    "RNN_RELU": _rnn_relu,
}


def use_step(mode: str, step: Step) -> None:
    """The step of an added cell: step(x, y, *states, *params, *masks) -> the states after; no y
    without a W_hh."""
    _STEPS[mode] = step


def step_of(mode: str) -> Step | None:
    """A cell's step, if there is one."""
    return _STEPS.get(mode)


def required_step(mode: str) -> Step:
    """A cell's step; RuntimeError where there is none."""
    if mode not in _STEPS:
        raise RuntimeError(
            f"{mode.partition('@')[0]} has no step in torch's operations, which double backward, "
            "torch.func and forward-mode AD need: give one, rnnkern.cells.load(header, step=step)"
        )
    return _STEPS[mode]


def layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: CallSpec,
    resets: Resets | None = None,
    step: Step | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Runs one layer; returns (output, h_n) or, with a cell state, (output, h_n, c_n).

    step is the cell's own, if None. Shapes, dtypes and strides are those of `rnnkern::forward`
    (library.py).
    """
    kind = CELLS[spec.cell]
    step = step or required_step(kind.mode)
    if batch_sizes is None:
        by_step = (input.transpose(0, 1) if spec.batch_first else input).unbind(0)
        sizes = None
        batch = by_step[0].shape[0]
    else:
        sizes = batch_sizes.tolist()
        by_step = input.split(sizes)  # type: ignore[no-untyped-call]
        batch = sizes[0]
    masks_by_step = _masks_by_step(masks, sizes, spec)

    outputs, finals = [], []
    for direction in range(spec.directions):
        own = _of_direction(weights, direction, spec)
        hidden_size = library.hidden_size(input, weights, spec)
        states = _initial([s[direction] for s in state], own, kind, input, batch, hidden_size)
        order = range(len(by_step)) if direction == 0 else range(len(by_step) - 1, -1, -1)
        hidden: list[Tensor] = [input] * len(by_step)
        for t in order:
            if resets is not None:
                states = _after_resets(states, resets, t, spec)
            # Rows whose sequence has ended (or, backwards, not begun) keep their state.
            now = states if sizes is None else [s[: sizes[t]] for s in states]
            given = masks_by_step[t][direction].unbind(-2) if masks_by_step else ()
            seen = now[0] * given[-1] if kind.masks_hidden else now[0]
            y = [] if own.w_hh is None else [_recurrent(seen, own.w_hh, own.b_hh)]
            x = _input_sums(by_step[t], own, direction, spec)
            new = list(step(x, *y, *now, *own.params, *given))
            if own.w_hr is not None:
                new[0] = linear(new[0], own.w_hr)
            hidden[t] = new[0]
            if sizes is not None and sizes[t] < batch:
                new = [torch.cat([n, s[sizes[t] :]]) for n, s in zip(new, states, strict=True)]
            states = new
        outputs.append(torch.stack(hidden) if sizes is None else torch.cat(hidden))
        joined = [states[0], torch.cat(states[1:], -1)] if len(states) > 2 else states
        finals.append(joined)

    output = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    if spec.batch_first and batch_sizes is None:
        output = output.transpose(0, 1)
    return output, *(torch.stack(s) for s in zip(*finals, strict=True))


class _Weights(NamedTuple):
    """Those of one direction."""

    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    params: Sequence[Tensor]


def _of_direction(weights: Sequence[Tensor], direction: int, spec: CallSpec) -> _Weights:
    kind, each = CELLS[spec.cell], weights_per_direction(spec)
    own = weights[direction * each : (direction + 1) * each]
    there = (not kind.given_sums, kind.recurs)
    left = iter(own)
    w_ih, w_hh = (next(left) if is_there else None for is_there in there)
    b_ih, b_hh = (next(left) if is_there and spec.bias else None for is_there in kind.biases)
    w_hr = own[-1] if spec.projection else None
    params = own[-1].unbind(0) if kind.params else ()
    return _Weights(w_ih, w_hh, b_ih, b_hh, w_hr, params)


def _input_sums(x: Tensor, own: _Weights, direction: int, spec: CallSpec) -> Tensor:
    """W_ih x + b_ih (B, G·H) of a step, or a direction's columns of sums that are given."""
    if own.w_ih is None:
        return x.chunk(spec.directions, -1)[direction]
    return linear(x, own.w_ih, own.b_ih)


def _initial(
    state: list[Tensor],
    own: _Weights,
    kind: Cell,
    input: Tensor,
    batch: int,
    hidden_size: int,
) -> list[Tensor]:
    """All states one by one, zeros if none are given."""
    others = len(kind.states) - 1
    if state:
        return [state[0], *state[1].chunk(others, -1)] if others > 1 else state
    width = hidden_size if own.w_hr is None else own.w_hr.shape[0]
    return [input.new_zeros(batch, n) for n in (width, *[hidden_size] * others)]


def _recurrent(h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """W_hh h + b_hh, (B, G·H), of a W_hh (G·H, R) or in heads (heads, G·H/heads, H/heads)."""
    if w_hh.dim() == 2:
        return linear(h, w_hh, b_hh)
    heads, _, units = w_hh.shape
    by_head = torch.einsum("bnj,nij->bni", torch.unflatten(h, -1, (heads, units)), w_hh)
    y = torch.unflatten(by_head, -1, (-1, units)).transpose(1, 2).flatten(1)
    return y if b_hh is None else y + b_hh


def _masks_by_step(
    masks: Tensor | None, sizes: list[int] | None, spec: CallSpec
) -> Sequence[Tensor] | None:
    """(D, B, kMasks, H) of each step."""
    if masks is None:
        return None
    if sizes is not None:
        found: Sequence[Tensor] = masks.split(sizes, 1)  # type: ignore[no-untyped-call]
        return found
    return masks.unbind(2 if spec.batch_first else 1)


def _after_resets(
    states: Sequence[Tensor], resets: Resets, step: int, spec: CallSpec
) -> list[Tensor]:
    """The states (B, ·) before a step, in the one direction that there is."""
    by_step = 1 if spec.batch_first else 0
    reset = resets.mask.select(by_step, step)[:, None]
    fresh = [s[0].select(by_step, step) if s.dim() == 4 else s[0] for s in resets.state]
    if len(states) > 2 and fresh:
        fresh = [fresh[0], *fresh[1].chunk(len(states) - 1, -1)]
    if not fresh:
        return [torch.where(reset, 0.0, s) for s in states]
    return [torch.where(reset, new, s) for new, s in zip(fresh, states, strict=True)]


def vjp(
    grads: Sequence[Tensor | None],
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: CallSpec,
    needed: Sequence[bool],
    resets: Resets | None = None,
    masks: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of (input, *state, *weights, *states after resets) where `needed`, as a
    differentiable function of all.

    grads are those of what `layer` returns (None: zero). Every tensor is passed through a view of
    itself, so that a gradient is the partial one even if, say, input itself depends on a weight.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh = () if resets is None else resets.state
        own = [t.view_as(t) for t in (input, *state, *weights, *fresh)]
        n = 1 + len(state)
        end = n + len(weights)
        own_resets = None if resets is None else Resets(resets.mask, own[end:])
        results = layer(own[0], batch_sizes, own[1:n], own[n:end], spec, own_resets, masks=masks)
        pairs = [
            (r, g)
            for r, g in zip(results, grads, strict=False)
            if g is not None and r.requires_grad
        ]
        wanted = [t for t, need in zip(own, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
    return [next(found) if need else None for need in needed]
