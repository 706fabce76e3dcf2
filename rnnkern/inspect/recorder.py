"""The observer of a layer's call: it keeps what the kernels save for the backward pass anyway."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..call_spec import CallSpec
from ..nn.layers import Layer
from ..ops.autograd import OBSERVER, CallObserver
from ..ops.library import CELLS
from .explain import explain
from .record import Input, Layout, RecordedCall
from .results import Flow, Norms, Trace

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
    calls: list[RecordedCall] = field(default_factory=list)
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
        self.calls.append(
            RecordedCall(spec, self.layer.hidden_size, output, batch_sizes, saved, c_states)
        )
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

    def trace(self, layout: Layout, output: Input, state: Any) -> Trace:
        return Trace(self.layer.mode, output, state, layout, self.calls)

    def flow(self, layout: Layout) -> Flow:
        norms: list[list[Norms]] = []
        for k, call in enumerate(self.calls):
            # A layer that the loss does not depend on is not reached.
            flow_h, flow_c = self.flows.get(k) or call.zero_flow()
            flows = [flow_h, *(torch.split(flow_c, call.units, -1) if flow_c.numel() else ())]
            names = CELLS[call.spec.cell].states
            norms.append([])
            for by_state in zip(*(flow.norm(dim=-1) for flow in flows), strict=True):
                shown = dict(zip(names, map(layout.over_time, by_state), strict=True))
                norms[-1].append(Norms(shown["h"], shown.get("c"), shown))
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


def why_not_recorded(layer: Layer, x: Any, hx: Any) -> str:
    """Why a call that has just been made did not reach its recorder."""
    path = explain(layer, x, hx)
    if path.name == "fused":
        return "this call reaches the kernels through torch's dispatcher (a tensor subclass)"
    return f"this call does not run fused ({path})"
