"""Shapes, dtypes and strides of the operators' results, for tensors without data.

Letters as in library.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..call_spec import CallSpec
from .library import CELLS, hidden_size


def _sizes(input: Tensor, weights: Sequence[Tensor], spec: CallSpec) -> tuple[int, int]:
    """H and R of a layer."""
    hidden = hidden_size(input, weights, spec)
    return hidden, weights[1].shape[1] if spec.projection else hidden


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernels compute and save in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_devices(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, *weights: Tensor) -> None:
    """A call of real and meta tensors goes to the meta kernel, which would find nothing wrong."""
    names = ("the state h_0", "the state c_0", *["a weight"] * len(weights))
    for name, t in zip(names, (h_0, c_0, *weights), strict=True):
        if t is not None and t.device != input.device:
            raise RuntimeError(f"rnnkern: {name} and input are on different devices")


def _packed_batch(batch_sizes: Tensor, h_0: Tensor | None) -> int | torch.SymInt:
    """B of packed data, which without a state stands only in the values of batch_sizes."""
    if h_0 is not None:
        return h_0.shape[1]
    if isinstance(batch_sizes, FakeTensor):
        return torch.library.get_ctx().new_dynamic_size()
    return int(batch_sizes[0])


def _results(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    spec: CallSpec,
    hidden: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n and c_n of a layer."""
    directions, c_values = spec.directions, len(CELLS[spec.cell].states) - 1
    batch: int | torch.SymInt
    if batch_sizes is None:
        steps, batch = input.shape[:2]
        if spec.batch_first:
            steps, batch = batch, steps
        output = input.new_empty(steps, batch, directions * width)
        if spec.batch_first:
            output = output.transpose(0, 1)
    else:
        output = input.new_empty(input.shape[0], directions * width)
        batch = _packed_batch(batch_sizes, h_0)
    return (
        output,
        input.new_empty(directions, batch, width),
        input.new_empty((directions, batch, c_values * hidden) if c_values else 0),
    )


def _settings(rest: Sequence[Any]) -> tuple[Any, ...]:
    """The spec and what follows its fields; at the end defaults may be missing."""
    count = len(CallSpec._fields)
    return CallSpec(*rest[:count]), *rest[count:]


@torch.library.register_fake("rnnkern::forward")  # type: ignore[untyped-decorator]
def _forward_shapes(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, train, *resets = _settings(rest)
    _check_devices(input, h_0, c_0, *weights, *(t for t in resets if t is not None))
    hidden, width = _sizes(input, weights, spec)
    results = _results(input, batch_sizes, h_0, spec, hidden, width)
    rows = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    units = spec.directions * rows * hidden if train else 0
    cell = CELLS[spec.cell]
    wide = _wide(input.dtype)
    return (
        *results,
        input.new_empty(units * len(cell.saved), dtype=wide if input.is_cuda else input.dtype),
        input.new_empty(units * (len(cell.states) - 1), dtype=wide),
    )


@torch.library.register_fake("rnnkern::prepack")  # type: ignore[untyped-decorator]
def _prepacked_bytes(weights: list[Tensor], *rest: Any) -> Tensor:
    raise RuntimeError("rnnkern: weights without data cannot be packed")


@torch.library.register_fake("rnnkern::forward_prepacked")  # type: ignore[untyped-decorator]
def _prepacked_shapes(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    prepacked: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *fields, hidden, proj = rest
    _check_devices(input, h_0, c_0, prepacked)
    return _results(input, batch_sizes, h_0, CallSpec(*fields), hidden, proj or hidden)


@torch.library.register_fake("rnnkern::backward")  # type: ignore[untyped-decorator]
def _backward_shapes(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    output: Tensor,
    saved: Tensor,
    c_states: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    spec, needs, flow, *resets = _settings(rest)
    after_reset = [s for s in resets[1:3] if s is not None and needs & 8]
    _check_devices(input, h_0, c_0, *weights)
    hidden, width = _sizes(input, weights, spec)
    directions, c_values = spec.directions, len(CELLS[spec.cell].states) - 1
    wide = _wide(input.dtype)
    packed = batch_sizes is not None
    rows = input.shape[0] if packed else input.shape[0] * input.shape[1]
    if not needs & 1:
        grad_input = input.new_empty(0)
    elif spec.batch_first and not packed:
        grad_input = input.new_empty([input.shape[k] for k in (1, 0, 2)]).transpose(0, 1)
    else:
        grad_input = input.new_empty(input.shape)
    batch: int | torch.SymInt
    if not needs & 2:
        batch = 0
    elif batch_sizes is not None:
        batch = _packed_batch(batch_sizes, h_0)
    else:
        batch = input.shape[0 if spec.batch_first else 1]
    return (
        grad_input,
        input.new_empty((directions, batch, width) if needs & 2 else 0),
        input.new_empty((directions, batch, c_values * hidden) if needs & 2 and c_values else 0),
        [w.new_empty(w.shape) for w in weights] if needs & 4 else [],
        input.new_empty((directions, rows, width) if flow else 0, dtype=wide),
        input.new_empty(
            (directions, rows, c_values * hidden) if flow and c_values else 0, dtype=wide
        ),
        input.new_empty(after_reset[0].shape if after_reset else 0),
        input.new_empty(after_reset[1].shape if len(after_reset) > 1 else 0),
    )
