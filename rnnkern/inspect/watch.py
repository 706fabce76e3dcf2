"""Traces and gradient flows of every recurrent layer of a model in training."""

import logging
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import count
from threading import Lock, RLock
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..nn.layers import Layer
from ..ops.autograd import OBSERVER, CallObserver
from .record import Layout
from .recorder import OBSERVING, Recorder, why_not_recorded
from .results import Flow, Trace
from .trace import map_tensors

_log = logging.getLogger("rnnkern")
_is_compiling = torch.compiler.is_compiling


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

        Tags read `name/layer 0/gates/forget`, or `name/layer 0 reverse/…`. A histogram has the
        finite values alone; of NaN and infinite ones the number is written, as a scalar with the
        tag `…/gates/forget, not finite`.
        """
        for k, layer in enumerate(self.trace.steps):
            for d, steps in enumerate(layer):
                tag = f"{self.name}/layer {k}{' reverse' * d}"
                values = {f"gates/{gate}": value for gate, value in steps.gates.items()}
                values |= {"states/hidden": steps.hidden}
                if steps.cell is not None:
                    values["states/cell"] = steps.cell
                for name, value in values.items():
                    self._histogram(writer, f"{tag}/{name}", self._valid(value))
                norms = self.flow[k, d]
                for state, norm in (("hidden", norms.hidden), ("cell", norms.cell)):
                    if norm is not None:
                        first, last = self._ends(norm)
                        writer.add_scalar(f"{tag}/gradient/{state}, first step", first, self.step)
                        writer.add_scalar(f"{tag}/gradient/{state}, last step", last, self.step)

    def _histogram(self, writer: Writer, tag: str, values: Tensor) -> None:
        finite = values[values.isfinite()]  # TensorBoard raises for others, and for none at all
        if finite.numel():
            writer.add_histogram(tag, finite, self.step)
        if lost := values.numel() - finite.numel():
            writer.add_scalar(f"{tag}, not finite", lost, self.step)

    def _valid(self, steps: Tensor) -> Tensor:
        """The values inside the sequences, without padding."""
        lengths = self.trace.lengths
        if lengths is None:
            return steps.flatten()
        by_batch = steps if self.trace.batch_first else steps.transpose(0, 1)
        steps = torch.arange(by_batch.shape[1], device=lengths.device)
        return by_batch[(steps < lengths[:, None]).to(by_batch.device)].flatten()

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
    callback  called with an `Observation` when a backward pass through the layer is over, by the
              thread of that pass, without gradients
    writer    an open TensorBoard `SummaryWriter`, or anything with its add_scalar and
              add_histogram; one thread at a time writes

    A training call is one in training mode with gradients enabled; what a checkpoint computes again
    and what `callback`, `rnnkern.trace` and `rnnkern.gradient_flow` call is none. `latest` holds
    the last `Observation` by layer name. A call is reported after its first backward pass. Calls
    that the fused kernels do not take (see `rnnkern.explain`) cannot be recorded: warns once per
    layer. If callback or writer raises, it is warned once, the traceback goes to the logger
    "rnnkern", and that one gets no more observations: the training goes on. A copy of the model is
    not watched. Raises ValueError for a model without rnnkern layers, TypeError for arguments of
    wrong types.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        callback: Callable[[Observation], Any] | None = None,
        writer: Writer | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        if not hasattr(every, "__index__"):
            raise TypeError(f"every must be a whole number, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function, got {type(callback).__name__}")
        if writer is not None and not (
            hasattr(writer, "add_scalar") and hasattr(writer, "add_histogram")
        ):
            raise TypeError(
                f"writer must have add_scalar and add_histogram, got {type(writer).__name__}"
            )
        self.layers = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if isinstance(module, Layer)
        }
        if not self.layers:
            raise ValueError(
                "the model has no rnnkern layer; rnnkern.convert makes them of torch's "
                "(cells cannot be watched)"
            )
        self.every = every
        self.callback = callback
        self.writer = writer
        self.latest: dict[str, Observation] = {}
        self._entered = 0
        self._handles: list[RemovableHandle] = []
        self._failed: set[str] = set()
        self._lock = RLock()  # a writer may itself come to the end of a backward pass

    def __enter__(self) -> "watch":
        self._entered += 1
        if self._entered > 1:
            return self
        for name, layer in self.layers.items():
            hooks = _Hooks(self, name)
            # Close to the layer's own call, with the hooks that are there already outside.
            self._handles += [
                layer.register_forward_pre_hook(hooks.before),
                layer.register_forward_hook(
                    hooks.after, prepend=True, with_kwargs=True, always_call=True
                ),
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if self._entered:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        call = _CALL.get()
        while call is not None and call.hooks.watch is self:  # an interrupt left it open
            call.close()
            call = call.outer

    def report(self, observation: Observation) -> None:
        """Hands an observation on. What callback and writer raise stays here."""
        self.latest[observation.name] = observation
        if self.writer is not None:
            self._hand("writer", partial(self._write, self.writer), observation)
        if self.callback is not None:
            self._hand("callback", self.callback, observation)

    def _write(self, writer: Writer, observation: Observation) -> None:
        with self._lock:
            observation.write(writer)

    def _hand(self, name: str, use: Callable[[Observation], Any], observation: Observation) -> None:
        if name in self._failed:
            return
        observing = OBSERVING.get()
        OBSERVING.set(True)
        try:
            use(observation)
        except Exception as error:
            with self._lock:
                first = name not in self._failed
                self._failed.add(name)
            if first:
                what = f"{type(error).__name__}: {error}"
                _warn(f"the {name} of rnnkern.watch raised {what}; it gets no more", error)
        finally:
            OBSERVING.set(observing)


@dataclass
class _Call:
    """A call of a watched layer that is under way; those of a context make a stack.

    recorder  None if the call is not to be recorded
    step      its number among the layer's training calls
    observer  what was set before
    """

    hooks: "_Hooks"
    recorder: Recorder | None
    step: int
    observer: CallObserver | None
    outer: "_Call | None"

    def close(self) -> None:
        """Takes this call, and those inside it that never came to an end, from the stack."""
        _CALL.set(self.outer)
        complete = isinstance(self.observer, Recorder) and self.observer.complete
        OBSERVER.set(None if complete else self.observer)


# State of a call belongs to its context: threads, tasks and replicas share a layer and its hooks.
_CALL: ContextVar[_Call | None] = ContextVar("rnnkern_watched_call", default=None)

_serial = count()


class _Hooks:
    """Lays a recorder around one layer's calls. Without a watch, as in a copied model: nothing."""

    def __init__(self, watch: watch | None = None, name: str = "") -> None:
        self.watch = watch
        self.name = name
        self.serial = next(_serial)
        self.step = 0
        self.lock = Lock()
        self.warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hooks, ()  # neither the watch nor its writer is part of the model

    def before(self, layer: Layer, args: tuple[Any, ...]) -> None:
        if self.watch is None or _is_compiling() or OBSERVING.get():
            return
        recorder, step, observer = None, -1, OBSERVER.get()
        shared = self._shared(layer, observer)
        if layer.training and torch.is_grad_enabled() and not _recomputes():
            with self.lock:
                step, self.step = self.step, self.step + 1
            if step % self.watch.every == 0:
                recorder = shared or Recorder(layer)
        _CALL.set(_Call(self, recorder, step, observer, _CALL.get()))
        OBSERVER.set(shared or recorder)

    def _shared(self, layer: Layer, observer: CallObserver | None) -> Recorder | None:
        """Another watch's recorder of this very call, if there is one.

        The hooks of one call run in the order in which they were made; any other order says that a
        hook of the layer calls the layer again.
        """
        call = _CALL.get()
        if call is None or call.hooks.serial >= self.serial:
            return None
        if isinstance(observer, Recorder) and observer.layer is layer and not observer.calls:
            return observer
        return None

    def after(self, layer: Layer, args: tuple[Any, ...], *rest: Any) -> None:
        # rest: kwargs, result; no kwargs if another thread removes the hook meanwhile
        if self.watch is None or _is_compiling() or OBSERVING.get():
            return
        call = _CALL.get()
        while call is not None and call.hooks is not self:
            call = call.outer
        if call is None:  # entered or left in the middle of the call
            return
        call.close()
        recorder = call.recorder
        if recorder is None or rest[-1] is None:  # None: the call raised
            return
        try:
            given = dict(zip(("input", "hx", "resets"), args, strict=False))
            given |= rest[0] if len(rest) > 1 else {}
            self._await_backward(layer, recorder, call.step, given, rest[-1])
        except Exception as error:  # of a subclass with arguments or results of its own
            self._cannot(str(error), error)

    def _await_backward(
        self, layer: Layer, recorder: Recorder, step: int, given: dict[str, Any], result: Any
    ) -> None:
        x = given.get("input", next(iter(given.values())))
        if not recorder.complete:
            self._cannot(why_not_recorded(layer, x, given.get("hx")))
            return
        layout = Layout.of(layer, x, given.get("resets"))
        if not (isinstance(result, tuple) and len(result) in (2, 3)):
            raise TypeError("its call returns something else than output, state and ends")
        output, state = map_tensors(Tensor.detach, result[:2])

        def report() -> None:
            try:
                trace, flow = recorder.trace(layout, output, state), recorder.flow(layout)
                observation = Observation(self.name, step, trace, flow)
            except Exception as error:
                self._cannot(str(error), error)
            else:
                if self.watch is not None:
                    self.watch.report(observation)

        recorder.on_backward.append(partial(_at_the_end_of_backward, report))

    def _cannot(self, why: str, error: Exception | None = None) -> None:
        with self.lock:
            first, self.warned = not self.warned, True
        if first:
            _warn(f"{self.name} cannot be watched ({why})", error)


def _warn(text: str, error: Exception | None = None) -> None:
    """Warns, and logs with the traceback what an error made necessary."""
    if error is not None:
        _log.warning("%s", text, exc_info=error)
    try:
        warnings.warn(text, stacklevel=4)
    except Warning:  # where warnings are errors, a user's training goes on all the same
        _log.warning("%s", text)


def _recomputes() -> bool:
    """Whether torch.utils.checkpoint computes a call again: inside a backward pass, which keeps no
    tensors but by the checkpoint's hooks. (Its reentrant form has no hooks, and counts first then.)
    """
    if torch._C._current_graph_task_id() < 0:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    module = getattr(hooks[0], "__module__", None) if hooks else None
    return module == "torch.utils.checkpoint"


# Which layers of a stack the gradient will reach is known only when the pass is over. DDP and FSDP
# wait for it in the same way.
_at_the_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback
