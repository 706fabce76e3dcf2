"""Which dtype a call is computed in: torch's settings for float32 products, and autocast.

On a CPU, `torch.set_float32_matmul_precision("medium")`, or "bf16" as
`torch.backends.mkldnn.matmul.fp32_precision`, allows products to round their factors to bfloat16,
and torch.nn's GRU and RNN do. Its LSTM does not, as it has a setting of its own,
`torch.backends.mkldnn.rnn.fp32_precision`. The layers here follow the same settings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops import library
from .ops.autograd import NATIVE

_mkldnn: Any = torch.backends.mkldnn  # torch types neither its rnn nor its matmul

# Levels of the engine that multiply bfloat16 faster than float32.
_FAST = library.info()["isa"] in {"avx512_amx", "avx512_bf16"}
# What repays converting weights, input and output: so many steps, units, and multiply-adds.
_STEPS, _UNITS, _WORK = 8, 64, 4_000_000


def takes_bfloat16(
    layer: nn.RNNBase,
    input: Tensor,
    batch_sizes: Tensor | None,
    batch_first: bool,
    state: Sequence[Tensor] = (),
    weights: Sequence[Tensor] = (),
) -> bool:
    """Whether a call with this input (T, B, I), (B, T, I) or packed (N, I) should round to it.

    So if the cell's setting allows it, the processor is faster with it and the call large enough.
    Not if a state or weight has another dtype than the input, which the kernels refuse.
    """
    hidden, inputs = layer.hidden_size, layer.input_size
    steps = input.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
    # First what small calls fail.
    if steps < _STEPS or hidden < _UNITS or not _FAST or input.dtype != torch.float32:
        return False
    if getattr(layer, "is_frozen", False):  # its name says what is rounded
        return False
    # Other sizes, and projections, are computed in float32 all the same.
    if not input.is_cpu or layer.proj_size or hidden % 2 or inputs % 2:
        return False
    gates = library.BY_MODE[layer.mode].gates
    work = input.numel() // inputs * (inputs + hidden) * hidden * len(gates)
    backend = _mkldnn.rnn if layer.mode == "LSTM" else _mkldnn.matmul
    if work < _WORK or backend.fp32_precision != "bf16":
        return False
    return all(t.dtype == input.dtype for t in (*state, *weights))


def autocast_dtype(
    layer: nn.RNNBase,
    input: Tensor,
    packed: bool,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> torch.dtype:
    """The dtype of torch.nn's results under autocast, for a layer's call (on a CPU: irregular).

    Raises RuntimeError where float64 meets other dtypes.
    """
    double = [t.dtype == torch.float64 for t in (input, *state, *weights)]
    if all(double):
        return torch.float64
    if any(double):
        raise RuntimeError("float64 does not mix with other dtypes under autocast")
    lower = torch.get_autocast_dtype(input.device.type)
    if input.device.type != "cpu":
        return lower
    # torch.nn's LSTM is oneDNN's, which casts everything, but for packed and for float16 input.
    whole = layer.mode == "LSTM" and (
        layer.proj_size or not (packed or input.dtype == lower == torch.float16)
    )
    if whole or layer.mode in ("RNN_TANH", "RNN_RELU"):
        return lower
    return state[0].dtype if state else input.dtype


def _cast_once(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as an operator has it that autocast casts arguments for.

    Python has no other way to torch's cache of casts. The product has no columns.
    """
    if not (weight.is_leaf and weight.requires_grad and weight.dim() == 2):
        return weight.to(dtype)
    with torch.enable_grad():
        product = torch.mm(weight, weight.new_empty(weight.shape[1], 0, requires_grad=True))
    node: Any = product.grad_fn
    saved: Tensor = node._saved_self
    return saved


def cast_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in this dtype, within a block of autocast.

    torch casts a leaf that needs a gradient once in such a block; so does this. A cast in each call
    would take the time of a small call and stay in memory until that call's backward pass.
    """
    if NATIVE is not None:
        return NATIVE.cast_weights(list(weights), dtype)
    lower = torch.get_autocast_dtype(weights[0].device.type)
    once = dtype == lower and torch.is_autocast_cache_enabled()
    return [_cast_once(w, dtype) if once and w.dtype != dtype else w.to(dtype) for w in weights]
