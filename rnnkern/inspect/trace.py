"""What happens inside a layer: every gate and state of a call, and the gradient at every step.

The fused kernels save all of it for the backward pass anyway; here it is handed out, by name and in
the layer's own layout. Letters: T steps, B batch rows, H hidden units (of h: proj_size, if given).
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils.hooks import RemovableHandle

from ..call_spec import CallSpec
from ..nn.layers import Layer
from ..ops.autograd import OBSERVER, CallObserver
from ..ops.library import CELLS
from ..ops.packing import pack_episodes
from ..saved_layout import saved_values
from .explain import explain

Input = Tensor | PackedSequence
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Steps:
    """One direction of one layer, step by step: each tensor (T, B, H), or (B, T, H) with
    batch_first, or (T, H) without a batch.

    hidden  h_t
    cell    c_t, None unless LSTM
    gates   by name: LSTM "input", "forget", "cell", "output"; GRU "reset", "update", "new"; RNN {}
    """

    hidden: Tensor
    cell: Tensor | None
    gates: dict[str, Tensor]


@dataclass(repr=False)
class Trace:
    """One call of a layer: `trace[layer, direction]` are its `Steps`.

    output, state  what the layer returned
    lengths        of a packed batch's sequences, (B,), in the batch's order; what lies beyond them
                   is zero. None for a padded batch
    batch_first    whether the steps are (B, T, H)
    """

    mode: str
    output: Input
    state: Any
    _layout: "Layout"
    _calls: "list[_Call]"

    # Looking is lazy, so that a trace of a short call costs little more than the call.
    @cached_property
    def steps(self) -> list[list[Steps]]:
        """By layer and direction."""
        return [call.steps(self._layout.present) for call in self._calls]

    @property
    def lengths(self) -> Tensor | None:
        return self._layout.lengths

    @property
    def batch_first(self) -> bool:
        return self._layout.batch_first

    def __getitem__(self, layer_and_direction: tuple[int, int]) -> Steps:
        return _pick(self.steps, layer_and_direction)

    @property
    def hidden(self) -> Tensor:
        """h_t of the last layer's forward direction."""
        return self[-1, 0].hidden

    @property
    def cell(self) -> Tensor | None:
        """c_t of the last layer's forward direction; None unless LSTM."""
        return self[-1, 0].cell

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates of the last layer's forward direction."""
        return self[-1, 0].gates

    def __repr__(self) -> str:
        shape, gates = tuple(self.hidden.shape), ", ".join(self.gates) or "none"
        layers, directions = len(self.steps), len(self.steps[0])
        return f"Trace({self.mode}, {layers=}, {directions=}, hidden {shape}, gates: {gates})"


@dataclass(frozen=True)
class Norms:
    """One direction of one layer: the Euclidean norm, over the hidden units, of the loss's total
    derivative by the state at every step, each (T, B), or (T,) without a batch.

    hidden  ‖∂L/∂h_t‖
    cell    ‖∂L/∂c_t‖, along every path, that through h_t too; None unless LSTM
    """

    hidden: Tensor
    cell: Tensor | None


@dataclass(frozen=True)
class Flow:
    """The gradient on its way back through time: `flow[layer, direction]` are its `Norms`.

    lengths  of a packed batch's sequences, as in `Trace`
    """

    mode: str
    lengths: Tensor | None
    norms: list[list[Norms]]

    def __getitem__(self, layer_and_direction: tuple[int, int]) -> Norms:
        return _pick(self.norms, layer_and_direction)

    @property
    def hidden(self) -> Tensor:
        """‖∂L/∂h_t‖ of the last layer's forward direction."""
        return self[-1, 0].hidden

    @property
    def cell(self) -> Tensor | None:
        """‖∂L/∂c_t‖ of the last layer's forward direction; None unless LSTM."""
        return self[-1, 0].cell

    def __repr__(self) -> str:
        layers, directions = len(self.norms), len(self.norms[0])
        return f"Flow({self.mode}, {layers=}, {directions=}, norms {tuple(self.hidden.shape)})"


def trace(
    layer: Layer, x: Input, hx: Any = None, resets: Tensor | None = None, reset_state: Any = None
) -> Trace:
    """Runs `layer(x, hx, resets, reset_state)` and hands out every gate and state of it.

    >>> trace = rnnkern.trace(lstm, x)                # x as the layer takes it: (T, B, I), ...
    >>> trace.gates["forget"], trace[0, 1].hidden     # last layer forward; layer 0, reverse

    The values are detached; `trace.output` and `trace.state` carry gradients as the layer's results
    do. Raises TypeError for a layer that is not rnnkern's or an input that is no tensor,
    RuntimeError for a call that the fused kernels do not take (`rnnkern.explain` says why).
    """
    _require_layer(layer)
    _require_input(x)
    with recording(layer) as recorder:
        output, state = layer(x, hx, **_with_resets(resets, reset_state))
    _require_fused(recorder, layer, x, hx)
    return recorder.trace(Layout.of(layer, x, resets), output, state)


def _with_resets(resets: Tensor | None, reset_state: Any) -> dict[str, Any]:
    """The arguments of a call that a layer without resets need not know."""
    given = {"resets": resets, "reset_state": reset_state}
    return {name: value for name, value in given.items() if value is not None}


def gradient_flow(
    layer: Layer,
    x: Input,
    loss_fn: Callable[..., Tensor],
    hx: Any = None,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> Flow:
    """How much of the loss's gradient arrives at each step: ‖∂L/∂h_t‖ and ‖∂L/∂c_t‖.

    >>> flow = rnnkern.gradient_flow(lstm, x, lambda output: output[-1].square().sum())
    >>> flow.hidden[0] / flow.hidden[-1]              # what is left of it at the first step

    `loss_fn(output)` returns a scalar; if it requires two arguments it is called as
    `loss_fn(output, state)`. No gradient is stored in any parameter. Steps that the loss does not
    depend on have the norm 0. A reset ends the flow: the step before has what its own output gets.
    Errors as for `trace`, and ValueError if the loss is not a scalar, or depends on nothing that
    the layer returned.
    """
    _require_layer(layer)
    _require_input(x)
    with torch.inference_mode(False), torch.enable_grad(), recording(layer) as recorder:
        x, hx, reset_state = map_tensors(_savable, (x, hx, reset_state))
        leaf = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
        own = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf
        output, state = layer(own, hx, **_with_resets(resets, reset_state))
        _require_fused(recorder, layer, x, hx)
        loss = loss_fn(output, state) if _requires_two(loss_fn) else loss_fn(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        found = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else [None]
    if found[0] is None:
        raise ValueError(
            "the loss does not depend on the layer's output or state, so no gradient flows: "
            "loss_fn must compute it from its arguments, without detach, argmax and the like"
        )
    return recorder.flow(Layout.of(layer, x, resets))


@dataclass
class _Call:
    """One layer with its directions, as the kernels left it (`CallObserver` in ops/autograd.py)."""

    spec: CallSpec
    units: int
    output: Tensor  # as the layer's caller sees it
    batch_sizes: Tensor | None
    saved: Tensor
    c_states: Tensor

    def steps(self, present: Callable[[Tensor], Tensor]) -> list[Steps]:
        cell = CELLS[self.spec.cell]
        states = self._by_name(self.c_states, cell.states[1:])
        saved = self._by_name(self.saved, cell.saved)
        return [
            Steps(
                present(hidden),
                present(states[d]["c"]) if "c" in states[d] else None,
                {name: present(saved[d][name]) for name in cell.gates if name in saved[d]},
            )
            for d, hidden in enumerate(self.by_direction)
        ]

    def _by_name(self, workspace: Tensor, names: Sequence[str]) -> list[dict[str, Tensor]]:
        if self.batch_sizes is not None:
            sizes = self.batch_sizes.tolist()
        else:
            batch, steps = self.output.shape[:2][:: 1 if self.by_batch else -1]
            sizes = [batch] * steps
        return saved_values(
            workspace, names, self.spec.directions, self.units, sizes,
            blocked=workspace.device.type == "cpu", as_index=torch.from_numpy,
        )  # fmt: skip

    @property
    def by_batch(self) -> bool:
        """Whether output is (B, T, D·R)."""
        return self.spec.batch_first and self.batch_sizes is None

    @property
    def by_direction(self) -> Tensor:
        """h as (D, rows, H), row t·B + b or packed."""
        steps = self.output.transpose(0, 1) if self.by_batch else self.output
        rows = steps.detach().flatten(0, -2)
        return torch.unflatten(rows, 1, (self.spec.directions, -1)).transpose(0, 1)

    def zero_flow(self) -> tuple[Tensor, Tensor]:
        """flow_h and flow_c of a loss that does not depend on the layer."""
        by_h = torch.zeros_like(self.by_direction)
        by_c = torch.zeros_like(self.c_states)
        return by_h, by_c.reshape(*by_h.shape[:2], self.units) if len(by_c) else by_c


#: Whether an observer itself is at work in this context; its calls are no training steps.
OBSERVING: ContextVar[bool] = ContextVar("rnnkern_observing", default=False)


@dataclass
class Recorder:
    """A `CallObserver` that keeps what every layer call of one module call computed.

    layer        the module that is called
    outer        the observer that was set before; set again when the module call is complete
    on_backward  each is called once, in the first backward pass through the call
    """

    layer: Layer
    outer: CallObserver | None = None
    calls: list[_Call] = field(default_factory=list)
    flows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    on_backward: list[Callable[[], None]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.calls) >= self.layer.num_layers

    def forward(
        self,
        spec: CallSpec,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        output: Tensor,
        h_n: Tensor,
        c_n: Tensor,
        saved: Tensor,
        c_states: Tensor,
    ) -> int:
        self.calls.append(_Call(spec, self.layer.hidden_size, output, batch_sizes, saved, c_states))
        if self.complete:  # what hooks call after the module is not part of it
            OBSERVER.set(self.outer)
        return len(self.calls) - 1

    def backward(self, key: int, flow_h: Tensor, flow_c: Tensor) -> None:
        self.flows[key] = flow_h, flow_c
        while self.on_backward:
            try:
                first = self.on_backward.pop(0)
            except IndexError:  # another thread's backward pass took it
                return
            first()

    def trace(self, layout: "Layout", output: Input, state: Any) -> Trace:
        return Trace(self.layer.mode, output, state, layout, self.calls)

    def flow(self, layout: "Layout") -> Flow:
        norms = []
        for k, call in enumerate(self.calls):
            # A layer that the loss does not depend on is not reached.
            flow_h, flow_c = self.flows.get(k) or call.zero_flow()
            by_h = [layout.over_time(by) for by in flow_h.norm(dim=-1)]
            by_c: Iterable[Tensor | None] = repeat(None)
            if flow_c.numel():
                by_c = [layout.over_time(by) for by in flow_c.norm(dim=-1)]
            norms.append([Norms(*one) for one in zip(by_h, by_c, strict=False)])
        return Flow(self.layer.mode, layout.lengths, norms)


class recording:
    """Records the next fused call of the layer. (A generator would double its cost.)"""

    def __init__(self, layer: Layer) -> None:
        self.recorder = Recorder(layer, OBSERVER.get())
        self.handle: RemovableHandle | None = None

    def __enter__(self) -> Recorder:
        self.observing = OBSERVING.get()
        OBSERVING.set(True)
        if self.recorder.layer._forward_pre_hooks:  # they may call layers of their own: after them
            self.thread = get_ident()  # others may be calling the layer too
            self.handle = self.recorder.layer.register_forward_pre_hook(self._start)
        else:
            OBSERVER.set(self.recorder)
        return self.recorder

    def _start(self, *_: object) -> None:
        if get_ident() == self.thread and not self.recorder.calls:
            OBSERVER.set(self.recorder)

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.remove()
        OBSERVER.set(self.recorder.outer)
        OBSERVING.set(self.observing)


@dataclass
class Layout:
    """How a module's caller sees steps, from the rows that the kernels write."""

    batch: int
    batch_first: bool
    unbatched: bool
    packed: PackedSequence | None
    from_episodes: Tensor | None  # of rows packed by episodes: where row t·B + b is

    @classmethod
    def of(cls, layer: Layer, x: Input, resets: Tensor | None = None) -> "Layout":
        if isinstance(x, PackedSequence):
            indices = x._replace(data=x.batch_sizes[:0])  # rather than keep the data alive
            return cls(int(x.batch_sizes[0]), layer.batch_first, False, indices, None)
        unbatched = x.dim() == 2
        batch_first = layer.batch_first and not unbatched
        episodes = None
        if resets is not None:
            by_step = resets.T if batch_first else resets.unsqueeze(1) if unbatched else resets
            packing = pack_episodes(by_step, False)
            episodes = None if packing is None else packing.from_packed
        return cls(
            1 if unbatched else x.shape[not batch_first], batch_first, unbatched, None, episodes
        )

    @cached_property
    def lengths(self) -> Tensor | None:
        if self.packed is None:
            return None
        data = torch.empty(int(self.packed.batch_sizes.sum()), device="cpu")
        return pad_packed_sequence(self.packed._replace(data=data))[1]

    def over_time(self, rows: Tensor) -> Tensor:
        """(rows, ...) as (T, B, ...), or (T, ...) without a batch."""
        if self.packed is not None:
            return pad_packed_sequence(self.packed._replace(data=rows))[0]
        if self.from_episodes is not None:
            rows = rows.index_select(0, self.from_episodes)
        return rows if self.unbatched else torch.unflatten(rows, 0, (-1, self.batch))

    def present(self, rows: Tensor) -> Tensor:
        """(rows, H) in the layer's own layout."""
        steps = self.over_time(rows)
        return steps.transpose(0, 1) if self.batch_first else steps


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A tensor, a packed sequence, or a tuple or list of them, with the function's results."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _savable(value: Tensor) -> Tensor:
    """What inference mode has made, in a form that a backward pass can keep."""
    return value.clone() if value.is_inference() else value


def _pick(parts: list[list[_Part]], layer_and_direction: Any) -> _Part:
    """One direction of one layer, by their numbers; negative ones count from the end."""
    layers, directions = len(parts), len(parts[0])
    if not (isinstance(layer_and_direction, tuple) and len(layer_and_direction) == 2):
        raise TypeError(f"expected [layer, direction], got [{layer_and_direction!r}]")
    layer, direction = layer_and_direction
    if not (-layers <= layer < layers and -directions <= direction < directions):
        raise IndexError(
            f"no layer {layer}, direction {direction} in {layers} layer(s) of "
            f"{directions} direction(s)"
        )
    return parts[layer][direction]


def _require_layer(layer: Any) -> None:
    if not isinstance(layer, Layer):
        hint = "rnnkern.convert makes them of torch.nn's"
        if isinstance(layer, nn.Module) and not isinstance(layer, nn.RNNBase):
            hint = "of a model give the layer itself; cells have no record"
        raise TypeError(f"expected rnnkern.LSTM, GRU or RNN, got {type(layer).__name__}; {hint}")


def _require_input(x: Any) -> None:
    if not isinstance(x, (Tensor, PackedSequence)):
        raise TypeError(f"x must be a tensor or a PackedSequence, got {type(x).__name__}")


def _require_fused(recorder: Recorder, layer: Layer, x: Input, hx: Any) -> None:
    if not recorder.complete:
        raise RuntimeError(f"nothing was recorded, {why_not_recorded(layer, x, hx)}")


def why_not_recorded(layer: Layer, x: Any, hx: Any) -> str:
    """Why a call that has just been made did not reach its recorder."""
    path = explain(layer, x, hx)
    if path.name == "fused":
        return "this call reaches the kernels through torch's dispatcher (a tensor subclass)"
    return f"this call does not run fused ({path})"


def _requires_two(function: Callable[..., Any]) -> bool:
    """Whether a call needs two positional arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # torch.sum and its like have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2
