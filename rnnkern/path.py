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
from .module_weights import PLAIN, foreign, tensors_in
from .precision import takes_bfloat16

_any_autocast = torch._C._is_any_autocast_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_NONE = type(None)
_DTYPES = ops.DTYPES
_STRIDED = torch.strided


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
_NESTED = Path("torch", "nested tensor")
_AUTOCAST = Path("torch", "cells under autocast are torch.nn's")
_IRREGULAR = Path("torch", "input, hx and weights do not fit together")


def obstacle(
    module: nn.Module, input: Any, weights: Sequence[Any], hx: Any = None, usual: bool = False
) -> Path | None:
    """Why the fused kernels do not take this call and who does; None if they do.

    Shapes and the agreement of dtypes are not looked at: they are the same for every path. `usual`
    says that every tensor of the call is known to be a plain one (`registered_weights`).
    """
    if _functorch_active() or forward_ad._current_level >= 0:
        return _TRANSFORM
    data = input[0] if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or (not usual and _NONE in map(type, weights)):
        return _NOT_TENSORS
    if not usual:
        found = foreign(tensors_in(input, hx, weights))
        if found is not None:
            cls, sees_functions = found
            name = "torch" if sees_functions else "composite"
            return Path(name, f"{cls.__name__} may know torch's operators only")
    if data.dtype not in _DTYPES:
        return Path("torch", f"dtype {data.dtype}")
    if data.layout is not _STRIDED:  # sparse and the like: torch.nn's cells take some of them
        return Path("torch", f"layout {data.layout}")
    if not (data.is_cpu or data.device.type in ops.DEVICES):
        return Path("torch", f"device {data.device}")
    if module.proj_size and data.device.type not in ops.PROJECTION:
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

    What is wrong with the shapes, the call itself says.

    >>> print(rnnkern.explain(rnnkern.LSTM(3, 4), torch.randn(5, 2, 3)))
    fused: rnnkern's kernels
    """
    from .cell_modules import Cell
    from .modules import Layer

    if not isinstance(layer, (Layer, Cell)):
        return Path("torch", f"{type(layer).__name__} is not rnnkern's (rnnkern.convert swaps it)")
    weights = layer.current_weights()
    path = layer.obstacle(x, weights, hx)
    if path is None and (x.data if isinstance(x, PackedSequence) else x).is_nested:
        return _NESTED
    if isinstance(layer, Cell):
        if path is not None and path.name == "torch":
            return path
        if _any_autocast():
            return _AUTOCAST
        if isinstance(x, PackedSequence) or not layer._regular(x, x.dim(), hx, weights):
            return _IRREGULAR
        return path or FUSED
    if path is None and _is_rounded(layer, x, hx, weights):
        return _ROUNDED
    return path or FUSED


def _is_rounded(layer: nn.RNNBase, x: Any, hx: Any, weights: Sequence[Tensor]) -> bool:
    data = x.data if isinstance(x, PackedSequence) else x
    if not PLAIN.issuperset(map(type, tensors_in(x, hx, weights))) or data.dim() not in (2, 3):
        return False
    state = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    return (
        not torch.is_autocast_enabled(data.device.type)
        and takes_bfloat16(layer, *_unpacked(layer, x))
        and all(t.dtype == data.dtype for t in (*state, *weights))
    )


def _unpacked(layer: nn.Module, x: Tensor | PackedSequence) -> tuple[Tensor, Tensor | None, bool]:
    """Input (T, B, I), (B, T, I) or (N, I), batch_sizes, and whether the batch is first."""
    if isinstance(x, PackedSequence):
        return x.data, x.batch_sizes, False
    if isinstance(layer, nn.RNNCellBase):  # one step
        return (x if x.dim() == 2 else x.unsqueeze(0)).unsqueeze(0), None, False
    return (x, None, layer.batch_first) if x.dim() == 3 else (x.unsqueeze(1), None, False)


def _require_plannable(layer: Any, x: Any) -> None:
    from .cell_modules import Cell
    from .modules import Layer

    if not isinstance(layer, (Layer, Cell)):
        raise TypeError(
            f"expected a layer or cell of rnnkern, got {type(layer).__name__}; "
            "rnnkern.convert makes them of torch.nn's"
        )
    packed = isinstance(x, PackedSequence) and isinstance(layer, Layer)
    if not (packed or isinstance(x, Tensor)):
        raise TypeError(
            f"x must be the input that {type(layer).__name__} takes, got {type(x).__name__}"
        )
    data = x.data if packed else x
    ranks = (2,) if packed else (2, 3) if isinstance(layer, Layer) else (1, 2)
    regular = data.layout is _STRIDED and not data.is_nested  # others need not have a shape
    if regular and (
        data.dim() not in ranks or data.shape[-1] != layer.input_size or not data.numel()
    ):
        wanted = " or ".join(f"{rank}-D" for rank in ranks)
        raise ValueError(
            f"x must be {wanted}, not empty, with {layer.input_size} features, "
            f"got the shape {tuple(data.shape)}"
        )
    path = explain(layer, x)  # of a cell it asks for more
    if path.name != "fused":
        raise RuntimeError(f"there is no plan, this call does not run fused ({path})")


def plan(layer: nn.Module, x: Tensor | PackedSequence, training: bool = False) -> dict[str, Any]:
    """How the engine takes `layer(x)` (its first layer), or with `training` its backward pass.

    On the CPU: threads and what they split ("rows" of the batch, or "units" of the hidden state,
    with a barrier after each step); fused_input: whether the input's product is part of the step;
    unpacked_weights: whether the weights are read in their own layout; row_block, input_chunk,
    wgrad_rows and wgrad_chunk: rows and steps at a time; rule: for each decision the rule that
    fired. Results do not depend on the number of threads.

    On CUDA: schedule, "steps" (a product and a kernel for each step) or "clusters": the recurrent
    weights stay on the chip, on `blocks` blocks that exchange h, and each of `clusters` such
    clusters takes so many `rows` of the batch; directions_at_once: whether both are walked at once.

    A packed input is planned by its longest row and largest batch, a cell as a layer's one step.
    Raises TypeError for a layer that is not rnnkern's or an input that is no tensor, ValueError for
    one of a wrong shape, RuntimeError for a call that the kernels do not take (`rnnkern.explain`).

    >>> rnnkern.plan(rnnkern.LSTM(128, 256), torch.randn(100, 32, 128))["split"]
    'rows'
    """
    _require_plannable(layer, x)
    data, batch_sizes, batch_first = call = _unpacked(layer, x)
    packed = batch_sizes is not None
    if packed:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    else:
        steps, batch = data.shape[1::-1] if batch_first else data.shape[:2]
    mode = layer._mode if isinstance(layer, nn.RNNCellBase) else layer.mode
    cell, directions = BY_MODE[mode].id, 2 if getattr(layer, "bidirectional", False) else 1
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
