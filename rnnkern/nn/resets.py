"""Resets inside a sequence, in one of two ways with the same bits.

By the mask, the kernels replace the states of rows before a step. By episodes, a layer's rows are
cut, and run as one packed batch: an ordinary call to the layer. Letters: T steps, B batch rows,
L layers, D directions, N episodes, R width of the state (of h: proj_size, if given).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backend import exporting_to_onnx
from ..episodes import Ends
from ..ops import autograd, library
from ..ops.autograd import OBSERVER
from ..ops.library import BY_MODE, Resets
from ..ops.packing import Packing, later_resets, pack_episodes
from ..precision import autocast_dtype
from . import _tracing

_is_compiling = torch.compiler.is_compiling
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

Call = Callable[[Any, Any], tuple[Any, Any]]


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
    if autograd.NATIVE is not None and not (return_ends or _is_compiling()):
        results = autograd.NATIVE.plain_layer(layer, input, hx, resets, reset_state)
        if results is not None:
            return results
    if isinstance(input, PackedSequence):
        raise ValueError(
            "resets are for padded and unbatched input: in packed data give each episode as a "
            "sequence of its own"
        )
    tracer = None if _is_compiling() else _tracing.fx_tracer(input, hx, resets, reset_state)
    if tracer is not None:
        named = {"resets": resets, "reset_state": reset_state, "return_ends": return_ends}
        return _tracing.fx_leaf(tracer, layer, input, hx, **named)
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return run(input, hx)  # raises torch.nn's error
    if torch._C._get_tracing_state() is not None or exporting_to_onnx():
        raise RuntimeError(
            "resets cannot be recorded by torch.jit.trace or for ONNX: the record would have the "
            "places of this mask"
        )
    given = _Arguments(layer, run, input, hx, resets, reset_state)
    if not _is_compiling():
        masks = (resets, *given.reset_state)
        library.check_memory(input, hx, masks, ("resets", *["reset_state"] * (len(masks) - 1)))
    if return_ends and resets.is_meta:
        raise RuntimeError("the number of ends is in the data of resets, which meta has not")
    way, _ = choose_way(layer, given.input, given.resets, given.batch_first)
    if way == "mask" and not return_ends:
        results = given.masked()
        if results is not None:
            return results
    plan = given.packing()
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
        self.shapes = dict.fromkeys(BY_MODE[layer.mode].states, (layers, layer.hidden_size))
        self.shapes["h"] = (layers, layer.proj_size or layer.hidden_size)
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
        forms: list[tuple[int, ...]] = [(), self.input.shape[:-1]]
        if not self.unbatched:
            forms.insert(1, (self.sizes[1],))
        form = forms[state.dim() - 2] if 2 <= state.dim() < 2 + len(forms) else None
        if form is None or state.shape != (layers, *form, width):
            wanted = " or ".join(str((layers, *map(int, form), width)) for form in forms)
            raise RuntimeError(
                f"{name} of reset_state must have the shape {wanted}, got {tuple(state.shape)}"
            )
        if state.device != self.input.device or state.dtype != like.dtype:
            raise RuntimeError(
                f"{name} of reset_state must be {like.dtype} on {self.input.device}, as the other "
                f"states, got {state.dtype} on {state.device}"
            )
        return state.unsqueeze(2) if self.unbatched and state.dim() == 3 else state

    def masked(self) -> tuple[Any, Any] | None:
        """Output and final state by one call with the mask; None if torch.nn's code has to run."""
        batch_dim = 0 if self.layer.batch_first else 1
        input, mask = self.input, self.resets
        if self.unbatched:
            input, mask = input.unsqueeze(batch_dim), mask.T if batch_dim == 0 else mask
        batch = input.shape[batch_dim]
        fresh = [self._by_row(s, batch) for s in self.reset_state]
        hx = self.layer._result(self.state) if self.state else None
        results: tuple[Any, Any] | None = self.layer._any_call(input, hx, Resets(mask, fresh))
        if results is None or not self.unbatched:
            return results
        output, state = results
        return output.squeeze(batch_dim), self._hx(self._tensors(state))

    def _by_row(self, state: Tensor, batch: int) -> Tensor:
        """(L, B, ·), or (L, T, B, ·), with the layer's batch_first (L, B, T, ·)."""
        if state.dim() == 2:
            return state.unsqueeze(1).expand(-1, batch, -1)
        if state.dim() == 4 and self.unbatched and self.layer.batch_first:
            return state.transpose(1, 2)
        return state

    def packing(self) -> Packing | None:
        """How the rows are packed; None if there is nothing to reset after the first step."""
        steps, batch = self.sizes
        if steps < 2 or not batch:
            return None
        return pack_episodes(self.resets, self.batch_first)

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
        count = plan.rank.shape[0]
        kept = [s.index_select(1, plan.packed_row) for s in self.state]
        fresh = [self._by_episode(s, plan, count) for s in self.reset_state]
        state = _merged(kept, fresh, plan.keeps_hx) if kept or fresh else []
        data = self.input.flatten(0, -2).index_select(0, plan.to_packed)
        data, *state = self._cast([data, *state])
        hx = self.layer._result(state) if state else None
        packed, final = self.run(PackedSequence(data, plan.batch_sizes), hx)
        output = packed.data.index_select(0, plan.from_packed)
        output = output.unflatten(0, self.input.shape[:-1])
        tensors = self._tensors(final)
        state = [s.index_select(1, plan.last) for s in tensors]

        def ends() -> Ends:
            by_row = [s.index_select(1, plan.rank) for s in tensors]
            return Ends(self.layer._result(by_row), plan.row, plan.end)

        return output, self._hx(state), ends

    def _cast(self, tensors: list[Tensor]) -> list[Tensor]:
        """Input and states as autocast has them in a padded call; torch.nn's packed one differs."""
        device = self.input.device.type
        if self.layer.proj_size or not torch.is_autocast_enabled(device):
            return tensors
        dtype = autocast_dtype(self.layer, tensors[0], False, tensors[1:], ())
        return [t.to(dtype) for t in tensors]

    def _by_episode(self, state: Tensor, plan: Packing, count: int) -> Tensor:
        """(L·D, 1 or N, ·) of a state after resets, in packed order."""
        if state.dim() == 4:
            return state.flatten(1, 2).index_select(1, plan.to_packed[:count])
        return state.unsqueeze(1) if state.dim() == 2 else state.index_select(1, plan.packed_row)

    def _hx(self, state: Sequence[Tensor]) -> Any:
        """States (L·D, B, ·) as the layer takes and returns them."""
        return self.layer._result([s.squeeze(1) for s in state] if self.unbatched else state)

    def _tensors(self, state: Any) -> Sequence[Tensor]:
        return state if isinstance(state, tuple) else (state,)


def choose_way(
    layer: Any, input: Tensor, resets: Tensor, batch_first: bool
) -> tuple[str | None, str]:
    """Which way a call goes whose resets are (T, B) or (B, T): "mask" or "episodes", and why.

    None: no row is reset after its first step. A compiler cannot look into the mask, nor a
    transform: there the mask goes to the kernels, or all rows are packed. So it is on a GPU, which
    a look would have to wait for. Where torch.nn's own code has to run, and with `return_ends`,
    only episodes will do.
    """
    if input.device.type not in library.DEVICES:
        refusal = "the kernels of this device take no mask"
    elif layer.bidirectional:
        refusal = "two directions"
    elif getattr(layer, "is_frozen", False):
        refusal = "prepacked weights"
    else:
        refusal = ""
    if _is_compiling() or type(resets) is not Tensor or resets.is_meta or _is_wrapped(resets):
        return ("episodes", refusal) if refusal else ("mask", "the mask is not to be looked into")
    if not refusal and OBSERVER.get() is not None:
        refusal = "an observer"  # it reads what the kernels save as rows of episodes
    if input.is_cuda and not refusal:
        return "mask", "a look into the mask would wait for the GPU"
    count = later_resets(resets, batch_first)
    if not count:
        return None, "no reset after the first step"
    if refusal:
        return "episodes", refusal
    steps, batch = resets.shape[::-1] if batch_first else resets.shape
    return library.plan_resets(steps, batch, layer.hidden_size, batch + count)


def _merged(kept: Sequence[Tensor], fresh: Sequence[Tensor], keeps: Tensor) -> list[Tensor]:
    """(L·D, n, ·): `kept` where `keeps`, (n,), else `fresh`; zeros stand for what is not given."""
    mask = keeps[:, None]
    if not fresh:
        return [torch.where(mask, s, 0.0) for s in kept]
    if not kept:
        return [torch.where(mask, 0.0, s) for s in fresh]
    return [torch.where(mask, k, f) for k, f in zip(kept, fresh, strict=True)]
