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

_setting = torch._C._get_fp32_precision_getter  # of a backend and a kind of operation

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
    cell = BY_MODE[layer.mode]
    setting = _setting("mkldnn", "rnn" if cell is LSTM else "matmul")
    if setting != "bf16" or not _FAST or input.dtype != torch.float32 or not input.is_cpu:
        return False
    hidden, inputs = layer.hidden_size, layer.input_size
    if layer.proj_size or hidden % 2 or inputs % 2:  # where bfloat16 is multiplied as float32
        return False
    steps = input.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
    work = input.numel() // inputs * (inputs + hidden) * hidden * len(cell.gates)
    return steps >= _STEPS and hidden >= _UNITS and work >= _WORK
