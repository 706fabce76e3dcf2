"""Which path a call takes: the fused kernels, the differentiable composite, or torch.nn's own code.

`obstacle` decides, for the layers' forward and for `explain` alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import compiler, ops
from .cells import BY_MODE
from .precision import takes_bfloat16

_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_NONE = type(None)


@dataclass(frozen=True)
class Path:
    """name: "fused", "composite" or "torch"; reason: why, in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


FUSED = Path("fused", "rnnkern's kernels")
_ROUNDED = Path("fused", "rnnkern's kernels, factors rounded to bfloat16 as torch's setting allows")
_TRANSFORM = Path(
    "composite", "inside torch.func or forward-mode AD, which need torch's operations"
)
_JIT = Path("torch", "torch.jit.trace or the ONNX exporter records torch's operators")
_PROJECTION = Path("torch", "the kernels of this device do not cover proj_size yet")
_SIZE = Path("torch", "a size is zero")
_NOT_TENSORS = Path("torch", "input or weights are not tensors")


def obstacle(module: nn.Module, input: Any, weights: Sequence[Any]) -> Path | None:
    """Why the fused kernels do not take this call and who does; None if they do.

    Shapes and the agreement of dtypes are not looked at: they are the same for every path.
    """
    if _functorch_active() or forward_ad._current_level >= 0:
        return _TRANSFORM
    data = input[0] if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or _NONE in map(type, weights):
        return _NOT_TENSORS
    if data.dtype not in ops.DTYPES:
        return Path("torch", f"dtype {data.dtype}")
    if not (data.is_cpu or data.device.type in ops.DEVICES):
        return Path("torch", f"device {data.device}")
    if getattr(module, "proj_size", 0) and data.device.type not in ops.PROJECTION:
        return _PROJECTION
    if not (module.input_size and module.hidden_size):
        return _SIZE
    if _tracing_state() is not None or (_is_compiling() and compiler.exporting_to_onnx()):
        return _JIT
    return None


def explain(
    layer: nn.Module,
    x: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Path:
    """Says which path `layer(x, hx)` would take here and now (inside vmap, say), and why.

    >>> print(rnnkern.explain(rnnkern.LSTM(3, 4), torch.randn(5, 2, 3)))
    fused: rnnkern's kernels
    """
    from .cell_modules import Cell
    from .modules import Layer

    if not isinstance(layer, (Layer, Cell)):
        return Path("torch", f"{type(layer).__name__} is not rnnkern's (rnnkern.convert swaps it)")
    path = layer.obstacle(x, layer.current_weights()) or FUSED
    if path is FUSED and isinstance(layer, Layer) and takes_bfloat16(layer, *_unpacked(layer, x)):
        return _ROUNDED
    return path


def _unpacked(layer: nn.RNNBase, x: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None, bool]:
    """Input (T, B, I), (B, T, I) or (N, I), batch_sizes, and whether the batch is first."""
    if isinstance(x, PackedSequence):
        return x.data, x.batch_sizes, False
    return (x, None, layer.batch_first) if x.dim() == 3 else (x.unsqueeze(1), None, False)


def plan(layer: nn.RNNBase, x: Tensor | PackedSequence, training: bool = False) -> dict[str, Any]:
    """How the engine takes `layer(x)` (its first layer), or with `training` its backward pass.

    On the CPU: threads and what they split ("rows" of the batch, or "units" of the hidden state,
    with a barrier after each step); fused_input: whether the input's product is part of the step;
    unpacked_weights: whether the weights are read in their own layout; row_block, input_chunk,
    wgrad_rows and wgrad_chunk: rows and steps at a time; rule: for each decision the rule that
    fired. Results do not depend on the number of threads.

    On CUDA: schedule, "steps" (a product and a kernel for each step) or "clusters": the recurrent
    weights stay on the chip, on `blocks` blocks that exchange h, and each of `clusters` such
    clusters takes so many `rows` of the batch; directions_at_once: whether both are walked at once.

    A packed input is planned by its longest row and largest batch.

    >>> rnnkern.plan(rnnkern.LSTM(128, 256), torch.randn(100, 32, 128))["split"]
    'rows'
    """
    data, batch_sizes, batch_first = call = _unpacked(layer, x)
    packed = batch_sizes is not None
    if packed:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    else:
        steps, batch = data.shape[1::-1] if batch_first else data.shape[:2]
    cell, directions = BY_MODE[layer.mode].id, 2 if layer.bidirectional else 1
    sizes = layer.hidden_size, layer.proj_size
    if data.is_cuda:
        return ops.cuda_plan(data, cell, steps, batch, *sizes, directions, packed, training)
    dtype = torch.bfloat16 if takes_bfloat16(layer, *call) else data.dtype
    return ops.plan(
        cell,
        steps,
        batch,
        layer.input_size,
        *sizes,
        directions,
        4 if dtype == torch.float16 else dtype.itemsize,  # float16 is computed in float32
        training,
        torch.get_num_threads(),
    )
