"""One layer call with its gradient: the fused operators behind torch's autograd.

`layer_call` is what the modules use: a C++ function where one was built for this very torch
(csrc/bindings/autograd.cpp), else, and under an observer, the same in Python. The backward formula
is also registered on the operator itself, for those who reach it through the dispatcher:
torch.compile, torch.export, subclasses.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call_spec import CallSpec
from . import decomposition, library, native
from .library import Resets

#: How one layer is run: `layer_call`, or what takes its arguments.
Run = Callable[..., tuple[Tensor, ...]]

_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by autograd.grad(is_grads_batched=True)
_function_modes = torch._C._len_torch_function_stack  # they see calls of operators from Python
_requires_grad = attrgetter("requires_grad")


def _vjp(*args: Any) -> list[Tensor | None]:
    """`decomposition.vjp` for C++, which hands over the spec's fields."""
    grads, input, batch_sizes, state, weights, fields, mask, reset_state, masks, needed = args
    spec = CallSpec(*fields)
    resets = None if mask is None else Resets(mask, reset_state)
    return decomposition.vjp(grads, input, batch_sizes, state, weights, spec, needed, resets, masks)


def _connected() -> native.Native | None:
    functions = native.load()
    if functions is None:
        return None
    functions.use_decomposition(_vjp)
    # Without this set nobody could tell that a kernel was replaced: every call is the dispatcher's.
    replaced = getattr(torch.library, "_impls", None)
    if replaced is not None:
        functions.use_replaced_kernels(replaced)
    return functions


#: The C++ functions, if the package was built with this version of torch; else None.
NATIVE: native.Native | None = _connected()


class CallObserver(Protocol):
    """Receives what a fused layer call computes besides its results; set through `OBSERVER`.

    `forward` is called once per layer call, in order of the layers, with the tensors of the
    operator's call: input (T, B, I), or (B, T, I) with batch_first, or packed (N, I) with
    batch_sizes (rows in sorted order); state [], [h_0] or [h_0, c_0], (D, B, R) and (D, B, H);
    output laid out as input; h_n (D, B, R); c_n (D, B, H), empty without a cell state;
    saved and c_states what the kernels keep for the backward pass, the values named in Cell.saved
    and all c_t (empty without a cell state), opaque: saved_layout.py reads them by name. They and
    output serve the backward pass as well: read, do not write. They are without autograd and may be
    kept; input, state, h_n and c_n are only to be looked at (kept, they would keep the graph).

    `backward` is called when the gradient of that layer call is computed by the kernels (not under
    create_graph), with flow_h = dL/dh_t (D, rows, R) and flow_c = dL/dc_t (D, rows, H), the total
    derivatives at every step, rows = T·B in time-major order (row t·B + b) or N; flow_c is empty
    without a cell state. `key` is what `forward` returned.
    """

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
    ) -> Any: ...

    def backward(self, key: Any, flow_h: Tensor, flow_c: Tensor) -> None: ...


#: The observer of the calls made in this context, if any. Other backends do not reach it.
OBSERVER: ContextVar[CallObserver | None] = ContextVar("rnnkern_observer", default=None)


def _forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: CallSpec,
    train: bool,
    resets: Resets | None,
    masks: Tensor | None,
) -> tuple[Tensor, ...]:
    after = library.step_arguments(resets, masks)
    try:
        return library.forward(
            input, batch_sizes, *library.optional(state), weights, *spec, train, *after
        )
    except RuntimeError as error:
        raise library.typed(error) from None


def _gradients(
    ctx: Any,
    tensors: Sequence[Any],
    grads: tuple[Tensor | None, ...],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (input, *state, *weights, *states after resets), from what a forward pass left
    on `ctx`, and saved."""
    spec, states, train, observer, key = ctx.call
    input, *rest, output, saved, c_states, batch_sizes, mask, masks = tensors
    end = states + spec.directions * library.weights_per_direction(spec)
    state, weights = rest[:states], _as_input(input, rest[states:end])
    resets = None if mask is None else Resets(mask, rest[end:])
    if (
        not train
        or torch.is_grad_enabled()
        or _functorch_active()
        or any(g is not None and _is_batched(g) for g in grads)
    ):
        return decomposition.vjp(
            grads, input, batch_sizes, state, weights, spec, needed, resets, masks
        )
    grad_output, grad_h, grad_c = grads
    needs = (
        needed[0]
        + 2 * any(needed[1 : 1 + states])
        + 4 * any(needed[1 + states : 1 + end])
        + 8 * any(needed[1 + end :])
    )  # operator's bits
    after = library.step_arguments(resets, masks)
    try:
        grad_input, grad_h0, grad_c0, grad_weights, flow_h, flow_c, *of_reset = library.backward(
            grad_output, grad_h, grad_c, input, batch_sizes, *library.optional(state), weights,
            output, saved, c_states, *spec, needs, observer is not None, *after,
        )  # fmt: skip
    except RuntimeError as error:
        raise library.typed(error) from None
    if observer is not None:
        observer.backward(key, flow_h, flow_c)
    of_weights: Sequence[Tensor | None] = grad_weights or [None] * len(weights)
    found = [grad_input, *(grad_h0, grad_c0)[:states], *of_weights, *of_reset[: len(rest) - end]]
    return [g if need else None for g, need in zip(found, needed, strict=True)]


def _as_input(input: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights in the input's dtype, cast anew in either pass: no copy is kept in between."""
    return [w if w.dtype == input.dtype else w.to(input.dtype) for w in weights]


class _Layer(torch.autograd.Function):
    """`rnnkern::forward` for eager mode where the C++ function cannot be used."""

    @staticmethod
    def forward(
        ctx: Any,
        observer: CallObserver | None,
        batch_sizes: Tensor | None,
        states: int,
        spec: CallSpec,
        cast_weights: bool,
        mask: Tensor | None,
        masks: Tensor | None,
        input: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        state, weights, resets = tensors[:states], tensors[states:], None
        if mask is not None:
            count = spec.directions * library.weights_per_direction(spec)
            weights, resets = weights[:count], Resets(mask, weights[count:])
        with _below_autograd():
            taken = _as_input(input, weights) if cast_weights else weights
            output, h_n, c_n, saved, c_states = _forward(
                input, batch_sizes, state, taken, spec, True, resets, masks
            )
        key = None
        if observer is not None:
            key = observer.forward(
                spec, input, batch_sizes, state, output.detach(), h_n, c_n, saved, c_states
            )
        # In the order of the C++ node: a checkpoint may save for one and recompute for the other.
        ctx.save_for_backward(input, *tensors, output, saved, c_states, batch_sizes, mask, masks)
        ctx.call = (spec, states, True, observer, key)
        ctx.set_materialize_grads(False)
        return _returned(spec, (output, h_n, c_n))

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[7:]
        grads = (grad_output, grad_h, grad_c)
        saved = ctx.saved_tensors
        found = _gradients(ctx, saved, grads, needed)
        leaves = saved[: len(found)]
        found = [g if g is None else g.to(t.dtype) for g, t in zip(found, leaves, strict=True)]
        return (*[None] * 7, *found)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, h_0, c_0, weights, *fields, train, mask, reset_h, reset_c, masks = inputs
    state, fresh = ([s for s in two if s is not None] for two in ((h_0, c_0), (reset_h, reset_c)))
    # In the order of `_Layer`, for a checkpoint.
    kept = (output[0], output[3], output[4], batch_sizes, mask, masks)
    ctx.save_for_backward(input, *state, *weights, *fresh, *kept)
    ctx.call = (CallSpec(*fields), len(state), train, None, None)
    ctx.set_materialize_grads(False)


def _operator_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    spec, states, *_ = ctx.call
    input_needed, _, *state_needed, weights_needed = ctx.needs_input_grad[:5]
    settings = [None] * (len(spec) + 2)  # the spec's fields, train and resets
    count = 1 + states + len(weights_needed)  # of gradients but those of states after resets
    tensors = ctx.saved_tensors
    reset_needed = ctx.needs_input_grad[5 + len(settings) :][: len(tensors) - count - 6]
    needed = [input_needed, *state_needed[:states], *weights_needed, *reset_needed]
    grad_c = grads[2] if len(library.CELLS[spec.cell].states) > 1 else None
    found = _gradients(ctx, tensors, (grads[0], grads[1], grad_c), needed)
    of_state = library.optional(found[1 : 1 + states])
    of_reset = library.optional(found[count:])
    result = (found[0], None, *of_state, found[1 + states : count], *settings, *of_reset, None)
    return result[: len(ctx.needs_input_grad)]  # the dispatcher leaves out defaults at the end


torch.library.register_autograd("rnnkern::forward", _operator_backward, setup_context=_save)


def layer_call(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: CallSpec,
    resets: Resets | None = None,
    cast_weights: bool = False,
    masks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Runs one layer by the fused kernels in eager mode; differentiable.

    Tensors as `rnnkern::forward` takes them, with [], [h_0] or [h_0, c_0] for the state.
    With `cast_weights` the weights may be wider than the input and are rounded to its dtype. masks,
    (D, T, B, kMasks, H) or as the input is laid out, are for a cell that takes some.
    Returns (output, h_n, c_n); without a cell state (output, h_n). What the kernels saved goes to
    `OBSERVER`, if set.
    """
    observer = OBSERVER.get()
    if observer is None and NATIVE is not None and not _function_modes():
        args = input, batch_sizes, state, weights, spec, cast_weights
        if masks is not None:
            mask, fresh = (None, ()) if resets is None else resets
            return NATIVE.layer(*args, mask, fresh, masks)
        return NATIVE.layer(*args) if resets is None else NATIVE.layer(*args, *resets)
    fresh = () if resets is None else resets.state
    if torch.is_grad_enabled() and (
        input.requires_grad or any(map(_requires_grad, (*state, *weights, *fresh)))
    ):
        results: tuple[Tensor, ...] = _Layer.apply(  # type: ignore[no-untyped-call]
            observer,
            batch_sizes,
            len(state),
            spec,
            cast_weights,
            None if resets is None else resets.mask,
            masks,
            input,
            *state,
            *weights,
            *fresh,
        )
        return results
    with _below_autograd():
        if cast_weights:
            weights = _as_input(input, weights)
        train = observer is not None
        results = _forward(input, batch_sizes, state, weights, spec, train, resets, masks)
    if observer is not None:
        observer.forward(spec, input, batch_sizes, state, *results)
    return _returned(spec, results)


def _returned(spec: CallSpec, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """output and the final states, of the operator's results."""
    return results[: 3 if len(library.CELLS[spec.cell].states) > 1 else 2]


def step_call(
    input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], spec: CallSpec
) -> tuple[Tensor, ...]:
    """One step by the fused kernels in eager mode: input (B, I), states (B, H) -> the next states.

    For the cells.
    """
    if NATIVE is not None and not _function_modes():
        return NATIVE.step(input, state, weights, spec)
    lifted = [s.unsqueeze(0) for s in state]
    _, *states = layer_call(input.unsqueeze(0), None, lifted, weights, spec)
    return tuple(without_first(s) for s in states)


def without_first(t: Tensor) -> Tensor:
    """t without its first dimension, of size one; not a view of t, as torch.nn's cells return none:
    a view out of a custom function could not be changed in place."""
    copy: Tensor = torch.ops.aten._unsafe_view(t, t.shape[1:])
    return copy


def operator_call(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: CallSpec,
    resets: Resets | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`layer_call` through the dispatcher, for compilers, modes and tensor subclasses."""
    tensors = (input, *state, *weights, *(() if resets is None else resets.state))
    train = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    results = _forward(input, batch_sizes, state, list(weights), spec, train, resets, masks)
    return _returned(spec, results)


def prepacked_call(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    prepacked: Tensor,
    spec: CallSpec,
    hidden_size: int,
    proj_size: int,
) -> tuple[Tensor, ...]:
    """`operator_call` with the weights as `library.prepack` packed them; without a gradient."""
    results = library.forward_prepacked(
        input, batch_sizes, *library.optional(state), prepacked, *spec, hidden_size, proj_size
    )
    return _returned(spec, results)


def frozen_call(
    input: Tensor,
    batch_sizes: Tensor | None,
    state: Sequence[Tensor],
    prepacked: Tensor,
    spec: CallSpec,
    hidden_size: int,
    proj_size: int,
    is_step: bool = False,
) -> tuple[Tensor, ...]:
    """`prepacked_call`, or with is_step `step_call` likewise; of padded data in C++, if built."""
    if NATIVE is not None and batch_sizes is None and not _function_modes():
        return NATIVE.frozen(input, state, prepacked, spec, hidden_size, proj_size, is_step)
    if not is_step:
        return prepacked_call(input, batch_sizes, state, prepacked, spec, hidden_size, proj_size)
    lifted = [s.unsqueeze(0) for s in state]
    _, *states = prepacked_call(
        input.unsqueeze(0), None, lifted, prepacked, spec, hidden_size, proj_size
    )
    return tuple(without_first(s) for s in states)
