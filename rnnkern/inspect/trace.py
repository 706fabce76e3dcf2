"""What happens inside a layer: every gate and state of a call, and the gradient at every step.

The fused kernels save all of it for the backward pass anyway; here it is handed out, by name and in
the layer's own layout.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..nn.layers import Layer
from .record import Input, Layout
from .recorder import Recorder, recording, why_not_recorded
from .results import Flow, Trace


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


def _requires_two(function: Callable[..., Any]) -> bool:
    """Whether a call needs two positional arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # torch.sum and its like have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 2
