"""torch's settings for the precision of float32 matrix products, on a CPU.

`torch.set_float32_matmul_precision("medium")`, or "bf16" as
`torch.backends.mkldnn.matmul.fp32_precision`, allows products to round their factors to bfloat16,
and torch.nn's GRU and RNN do. Its LSTM does not, as it has a setting of its own,
`torch.backends.mkldnn.rnn.fp32_precision`. The layers here follow the same settings.
"""

import torch
from torch import Tensor, nn

from . import ops
from .cells import BY_MODE, LSTM

_mkldnn = torch.backends.mkldnn

# Levels of the engine that multiply bfloat16 faster than float32.
_FAST = ops.info()["isa"] in {"avx512_amx", "avx512_bf16"}
# What repays converting weights, input and output: so many steps, units, and multiply-adds.
_STEPS, _UNITS, _WORK = 8, 64, 4_000_000


def takes_bfloat16(
    layer: nn.RNNBase, input: Tensor, batch_sizes: Tensor | None, batch_first: bool
) -> bool:
    """Whether a call with this input (T, B, I), (B, T, I) or packed (N, I) should round to it.

    So if the cell's setting allows it, the processor is faster with it and the call large enough.
    """
    hidden, inputs = layer.hidden_size, layer.input_size
    steps = input.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
    # First what small calls fail.
    if steps < _STEPS or hidden < _UNITS or not _FAST or input.dtype != torch.float32:
        return False
    # Other sizes, and projections, are computed in float32 all the same.
    if not input.is_cpu or layer.proj_size or hidden % 2 or inputs % 2:
        return False
    cell = BY_MODE[layer.mode]
    work = input.numel() // inputs * (inputs + hidden) * hidden * len(cell.gates)
    backend = _mkldnn.rnn if cell is LSTM else _mkldnn.matmul
    return work >= _WORK and backend.fp32_precision == "bf16"
