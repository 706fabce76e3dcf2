"""Resets inside a sequence: a layer's rows are cut into episodes, which run as one packed batch.

The layer itself sees an ordinary call. Letters: T steps, B batch rows, L layers, D directions,
N episodes, R width of the state (of h: proj_size, if given).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import episodes
from ..backend import exporting_to_onnx
from ..cell_spec import BY_MODE

_functorch: Any = torch._C._functorch
_is_compiling = torch.compiler.is_compiling

Call = Callable[[Any, Any], tuple[Any, Any]]


class Ends(NamedTuple):
    """The states in which the episodes of a call end, in the order of (row, step).

    state  h (L·D, N, R), for an LSTM the pair (h, c); with two directions the second one's is that
           after the episode's first step, as in h_n
    row    (N,) int64: the episode's batch row
    step   (N,) int64: its last step

    >>> at_ends = torch.zeros(T, B, H).index_put((ends.step, ends.row), ends.state[0])  # layer 0's
    """

    state: Any
    row: Tensor
    step: Tensor


class Packing(NamedTuple):
    """`episodes.Episodes` as tensors: batch_sizes on the CPU, the others on the input's device."""

    to_packed: Tensor
    from_packed: Tensor
    batch_sizes: Tensor
    packed_row: Tensor
    keeps_hx: Tensor
    rank: Tensor
    row: Tensor
    end: Tensor
    last: Tensor


def packing(resets: Tensor, batch_first: bool) -> Packing | None:
    """How the rows are packed by episodes; None if no row is reset after its first step."""
    values = _values(resets)
    if not (values[:, 1:] if batch_first else values[1:]).any():
        return None
    found = map(torch.from_numpy, episodes.pack(values, batch_first))
    plan = Packing(*found)
    if resets.is_cpu:
        return plan
    moved = Packing(*(t.to(resets.device) for t in plan))
    return moved._replace(batch_sizes=plan.batch_sizes)


def _values(resets: Tensor) -> Any:
    """The mask as an array, also from inside torch.func.grad and its like."""
    while _functorch.is_functorch_wrapped_tensor(resets):
        if _functorch.is_batchedtensor(resets):
            raise RuntimeError("resets must be the same for all that vmap maps over")
        resets = _functorch.get_unwrapped(resets)
    return resets.detach().cpu().numpy()


def call(
    layer: Any,
    run: Call,
    input: Any,
    hx: Any,
    resets: Any,
    reset_state: Any,
    return_ends: bool,
) -> Any:
    """`layer(input, hx, resets, reset_state, return_ends)` by calls of `run(input, hx)`.

    layer is one of layers.py, which imports this module.
    """
    if resets is None:
        raise ValueError("reset_state and return_ends belong to a call with resets")
    if isinstance(input, PackedSequence):
        raise ValueError(
            "resets are for padded and unbatched input: in packed data give each episode as a "
            "sequence of its own"
        )
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return run(input, hx)  # raises torch.nn's error
    given = _Arguments(layer, run, input, hx, resets, reset_state)
    steps, batch = given.sizes
    plan = None
    if steps > 1 and batch:  # else the state before the first step is all there is to reset
        if torch._C._get_tracing_state() is not None or exporting_to_onnx():
            raise RuntimeError(
                "resets cannot be recorded by torch.jit.trace or for ONNX: the record would have "
                "the places of this mask"
            )
        plan = packing(given.resets, given.batch_first)
    output, state, ends = given.whole() if plan is None else given.packed(plan)
    return (output, state, ends()) if return_ends else (output, state)


class _Arguments:
    """The checked arguments of a call; an unbatched one's have a batch of one row."""

    def __init__(
        self, layer: Any, run: Call, input: Tensor, hx: Any, resets: Any, reset_state: Any
    ) -> None:
        self.layer, self.run, self.input = layer, run, input
        self.unbatched = input.dim() == 2
        self.batch_first = layer.batch_first and not self.unbatched
        self.resets = self._mask(resets)
        layers = layer.num_layers * (2 if layer.bidirectional else 1)
        widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)
        names = BY_MODE[layer.mode].states
        self.shapes = {n: (layers, w) for n, w in zip(names, widths, strict=False)}
        self.state = self._initial(hx)
        self.reset_state = self._after_reset(reset_state)

    @property
    def sizes(self) -> tuple[int, int]:
        """T and B."""
        first, second = self.resets.shape
        return (second, first) if self.batch_first else (first, second)

    def _mask(self, resets: Any) -> Tensor:
        if not isinstance(resets, Tensor):
            raise TypeError(f"resets must be a tensor, got {type(resets).__name__}")
        wanted = self.input.shape[:-1]
        if resets.shape != wanted:
            raise RuntimeError(
                f"resets must have the shape {tuple(wanted)}, got {tuple(resets.shape)}"
            )
        if resets.dtype != torch.bool:
            raise ValueError(f"resets must be torch.bool, got {resets.dtype}")
        if resets.device != self.input.device:
            raise RuntimeError(
                "Input and resets are not at the same device, found input at "
                f"{self.input.device} and resets at {resets.device}"
            )
        return resets.unsqueeze(1) if self.unbatched else resets

    def _initial(self, hx: Any) -> list[Tensor]:
        """hx as a list of (L·D, B, ·), with torch.nn's errors."""
        state = list(self.layer._state(hx, self.input.dim()))
        input = self.input
        if self.unbatched:
            state = [s.unsqueeze(1) for s in state]
            input = input.unsqueeze(0 if self.layer.batch_first else 1)
        if state:
            self.layer.check_forward_args(input, self.layer._hx(state), None)
        else:
            self.layer.check_input(input, None)
        return state

    def _after_reset(self, reset_state: Any) -> list[Tensor]:
        """reset_state as a list of (L·D, ·), (L·D, B, ·) or (L·D, T, B, ·), laid out as input."""
        if reset_state is None:
            return []
        given = reset_state if isinstance(reset_state, (tuple, list)) else (reset_state,)
        if len(given) != len(self.shapes) or not all(isinstance(s, Tensor) for s in given):
            wanted = "a pair of tensors (h, c)" if len(self.shapes) > 1 else "a tensor"
            raise TypeError(f"reset_state must be {wanted}")
        return [
            self._one_after_reset(name, s, like)
            for name, s, like in zip(self.shapes, given, self.state or given, strict=True)
        ]

    def _one_after_reset(self, name: str, state: Tensor, like: Tensor) -> Tensor:
        layers, width = self.shapes[name]
        rows: list[tuple[int, ...]] = [(), self.input.shape[:-1]]
        if not self.unbatched:
            rows.insert(1, (self.sizes[1],))
        shapes = [(layers, *row, width) for row in rows]
        if state.shape not in shapes:
            raise RuntimeError(
                f"{name} of reset_state must have the shape {' or '.join(map(str, shapes))}, "
                f"got {tuple(state.shape)}"
            )
        if state.device != self.input.device or state.dtype != like.dtype:
            raise RuntimeError(
                f"{name} of reset_state must be {like.dtype} on {self.input.device}, as the other "
                f"states, got {state.dtype} on {state.device}"
            )
        return state.unsqueeze(2) if self.unbatched and state.dim() == 3 else state

    def whole(self) -> tuple[Any, Any, Callable[[], Ends]]:
        """Output, final state and ends of a call without resets after the first step."""
        steps, batch = self.sizes
        if not (self.state or self.reset_state) or not steps:
            hx = None
        else:
            at_start = self.resets[:, 0] if self.batch_first else self.resets[0]
            first = [self._at_first_step(s) for s in self.reset_state]
            hx = self._hx(_merged(self.state, first, ~at_start))
        output, state = self.run(self.input, hx)

        def ends() -> Ends:
            rows = torch.arange(batch, device=self.input.device)
            tensors = [s.unsqueeze(1) if self.unbatched else s for s in self._tensors(state)]
            return Ends(self.layer._result(tensors), rows, torch.full_like(rows, steps - 1))

        return output, state, ends

    def _at_first_step(self, state: Tensor) -> Tensor:
        """(L·D, 1 or B, ·) of a state after resets."""
        if state.dim() == 4:
            return state[:, :, 0] if self.batch_first else state[:, 0]
        return state.unsqueeze(1) if state.dim() == 2 else state

    def packed(self, plan: Packing) -> tuple[Any, Any, Callable[[], Ends]]:
        """Output, final state and ends by one call on the episodes as packed sequences."""
        count = len(plan.rank)
        kept = [s.index_select(1, plan.packed_row) for s in self.state]
        fresh = [self._by_episode(s, plan, count) for s in self.reset_state]
        hx = None
        if kept or fresh:
            hx = self.layer._result(_merged(kept, fresh, plan.keeps_hx))
        data = self.input.flatten(0, -2).index_select(0, plan.to_packed)
        packed, state = self.run(PackedSequence(data, plan.batch_sizes), hx)
        output = packed.data.index_select(0, plan.from_packed)
        output = output.unflatten(0, self.input.shape[:-1])
        tensors = self._tensors(state)
        final = [s.index_select(1, plan.last) for s in tensors]
        if self.unbatched:
            final = [s.squeeze(1) for s in final]

        def ends() -> Ends:
            by_row = [s.index_select(1, plan.rank) for s in tensors]
            return Ends(self.layer._result(by_row), plan.row, plan.end)

        return output, self.layer._result(final), ends

    def _by_episode(self, state: Tensor, plan: Packing, count: int) -> Tensor:
        """(L·D, 1 or N, ·) of a state after resets, in packed order."""
        if state.dim() == 4:
            return state.flatten(1, 2).index_select(1, plan.to_packed[:count])
        return state.unsqueeze(1) if state.dim() == 2 else state.index_select(1, plan.packed_row)

    def _hx(self, state: Sequence[Tensor]) -> Any:
        """The states of a whole call as the layer takes them."""
        return self.layer._result([s.squeeze(1) for s in state] if self.unbatched else state)

    def _tensors(self, state: Any) -> Sequence[Tensor]:
        return state if isinstance(state, tuple) else (state,)


def _merged(kept: Sequence[Tensor], fresh: Sequence[Tensor], keeps: Tensor) -> list[Tensor]:
    """(L·D, n, ·): `kept` where `keeps`, (n,), else `fresh`; zeros stand for what is not given."""
    mask = keeps[:, None]
    if not fresh:
        return [torch.where(mask, s, 0.0) for s in kept]
    if not kept:
        return [torch.where(mask, 0.0, s) for s in fresh]
    return [torch.where(mask, k, f) for k, f in zip(kept, fresh, strict=True)]
