"""Traces and gradient flows of every recurrent layer of a model in training."""

import warnings
from collections.abc import Callable
from contextvars import Token
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .autograd import TAP
from .modules import Layer
from .path import explain
from .trace import Flow, Recorder, Trace


class Writer(Protocol):
    """The part of torch.utils.tensorboard.SummaryWriter that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None: ...


@dataclass(frozen=True)
class Observation:
    """One training step of one layer: its forward pass, and the gradient of the loss in it.

    name   the layer's name in the model
    step   how many training calls of that layer came before
    trace  gates and states (trace.py); its output and state are without autograd
    flow   ‖∂L/∂h_t‖ and ‖∂L/∂c_t‖
    """

    name: str
    step: int
    trace: Trace
    flow: Flow

    def write(self, writer: Writer) -> None:
        """Histograms of gates and states, and the gradient's norm at both ends of time.

        Tags read `name/layer 0/gates/forget`, or `name/layer 0 reverse/…`.
        """
        for k, layer in enumerate(self.trace.steps):
            for d, steps in enumerate(layer):
                tag = f"{self.name}/layer {k}{' reverse' * d}"
                values = {f"gates/{gate}": value for gate, value in steps.gates.items()}
                values |= {"states/hidden": steps.hidden}
                if steps.cell is not None:
                    values["states/cell"] = steps.cell
                for name, value in values.items():
                    writer.add_histogram(f"{tag}/{name}", self._valid(value), self.step)
                norms = self.flow[k, d]
                for state, norm in (("hidden", norms.hidden), ("cell", norms.cell)):
                    if norm is not None:
                        first, last = self._ends(norm)
                        writer.add_scalar(f"{tag}/gradient/{state}, first step", first, self.step)
                        writer.add_scalar(f"{tag}/gradient/{state}, last step", last, self.step)

    def _valid(self, steps: Tensor) -> Tensor:
        """The values inside the sequences, without padding."""
        lengths = self.trace.lengths
        if lengths is None:
            return steps.flatten()
        by_batch = steps if self.trace.batch_first else steps.transpose(0, 1)
        return by_batch[torch.arange(by_batch.shape[1]) < lengths[:, None]].flatten()

    def _ends(self, norm: Tensor) -> tuple[float, float]:
        """The batch's mean at the first step, and at each sequence's last one."""
        if self.flow.lengths is None:
            last = norm[-1]
        else:
            last = norm.gather(0, self.flow.lengths.to(norm.device)[None] - 1)
        return norm[0].mean().item(), last.mean().item()


class watch:
    """Records every n-th training step of every rnnkern layer of a model, without changing results.

    >>> with rnnkern.watch(model, every=100, writer=SummaryWriter()):
    ...     train(model)
    >>> with rnnkern.watch(model, callback=print) as w:
    ...     model(x).sum().backward()
    >>> w.latest["encoder"].flow

    every     record each layer's training calls 0, every, 2·every, ...
    callback  called with an `Observation` when a backward pass through the layer is over
    writer    an open TensorBoard `SummaryWriter`, or anything with its add_scalar and add_histogram

    A training call is one in training mode with gradients enabled. `latest` holds the last
    `Observation` by layer name. A call is reported after its first backward pass. Calls that the
    fused kernels do not take (see `rnnkern.explain`) cannot be recorded: warns once per layer.
    Raises ValueError for a model without rnnkern layers.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        callback: Callable[[Observation], Any] | None = None,
        writer: Writer | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.layers = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if isinstance(module, Layer)
        }
        if not self.layers:
            raise ValueError(
                "the model has no rnnkern layer; rnnkern.convert makes them of torch's"
            )
        self.every = every
        self.callback = callback
        self.writer = writer
        self.latest: dict[str, Observation] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "watch":
        for name, layer in self.layers.items():
            hooks = _Hooks(self, name)
            self._handles += [
                layer.register_forward_pre_hook(hooks.before),
                layer.register_forward_hook(hooks.after, with_kwargs=True, always_call=True),
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def report(self, observation: Observation) -> None:
        self.latest[observation.name] = observation
        if self.writer is not None:
            observation.write(self.writer)
        if self.callback is not None:
            self.callback(observation)


class _Hooks:
    """Lays a recorder around one layer's calls."""

    def __init__(self, watch: watch, name: str) -> None:
        self.watch = watch
        self.name = name
        self.step = 0
        self.warned = False
        self.recorder: Recorder | None = None
        self.token: Token | None = None

    def before(self, layer: Layer, args: tuple[Any, ...]) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        if self.step % self.watch.every == 0 and TAP.get() is None:
            self.recorder = Recorder()
            self.token = TAP.set(self.recorder)
        self.step += 1

    def after(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        recorder, token = self.recorder, self.token
        if token is None:
            return
        TAP.reset(token)
        self.recorder = self.token = None
        if result is None:  # the call raised
            return
        call = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        x, hx = call["input"], call.get("hx")
        if not recorder.calls:
            if not self.warned:
                path = explain(layer, x, hx)
                warnings.warn(f"{self.name} cannot be watched ({path})", stacklevel=2)
            self.warned = True
            return
        step, x, result = self.step - 1, _detached(x), _detached(result)

        def report(recorder: Recorder) -> None:
            trace, flow = recorder.trace(layer, x, *result), recorder.flow(layer, x)
            self.watch.report(Observation(self.name, step, trace, flow))

        def wait(recorder: Recorder) -> None:
            recorder.on_backward = None
            _at_the_end_of_backward(partial(report, recorder))

        recorder.on_backward = wait


# Which layers of a stack the gradient will reach is known only when the pass is over. DDP and FSDP
# wait for it in the same way.
_at_the_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback


def _detached(value: Any) -> Any:
    """Without autograd: a tensor, a packed sequence, or a tuple of them."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        parts = [_detached(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
