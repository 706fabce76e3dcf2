"""explain and plan: which backend runs a call, and how the engine takes it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backend import FUSED, PLAIN, Backend, tensors_in
from ..nn.cells import Cell
from ..nn.layers import Layer
from ..nn.resets import choose_way
from ..ops import library
from ..ops.packing import pack_episodes
from ..precision import takes_bfloat16

_any_autocast = torch._C._is_any_autocast_enabled

_ROUNDED = Backend(
    "fused", "rnnkern's kernels, factors rounded to bfloat16 as torch's setting allows"
)
_NESTED = Backend("torch", "nested tensor")
_AUTOCAST = Backend("torch", "cells under autocast are torch.nn's")
_IRREGULAR = Backend("torch", "input, hx and weights do not fit together")


def explain(
    layer: nn.Module,
    x: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    resets: Tensor | None = None,
) -> Backend:
    """Says which path `layer(x, hx, resets)` would take here and now (inside vmap, say), and why.

    Where rows are reset after the first step, the reason adds whether the kernels take the mask, or
    rows are packed by episodes.
    What is wrong with the shapes, the call itself says.

    >>> print(rnnkern.explain(rnnkern.LSTM(3, 4), torch.randn(5, 2, 3)))
    fused: rnnkern's kernels
    """
    if not isinstance(layer, (Layer, Cell)):
        return Backend(
            "torch", f"{type(layer).__name__} is not rnnkern's (rnnkern.convert swaps it)"
        )
    if resets is not None and isinstance(layer, Layer) and isinstance(x, Tensor):
        return _explain_resets(layer, x, hx, resets)
    weights = layer.current_weights()
    path = layer.select_backend(x, weights, hx)
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


def _explain_resets(layer: Layer, x: Tensor, hx: Any, resets: Tensor) -> Backend:
    way, rule = _way(layer, x, resets)
    whole = explain(layer, x, hx)
    if way is None:
        return whole
    if way == "mask" and whole.name != "torch":
        return Backend(whole.name, f"{whole.reason}, with the mask of resets ({rule})")
    packed = _by_episodes(layer, x, resets)
    if not isinstance(packed, PackedSequence):
        return whole
    path = explain(layer, packed)  # hx is of other sizes there
    count = packed.batch_sizes[0]
    return Backend(path.name, f"{path.reason}, rows packed by {count} episodes ({rule})")


def _way(layer: Layer, x: Tensor, resets: Tensor) -> tuple[str | None, str]:
    mask = resets.unsqueeze(1) if x.dim() == 2 else resets
    return choose_way(layer, x, mask, layer.batch_first and x.dim() == 3)


def _by_episodes(layer: Layer, x: Tensor, resets: Tensor) -> Tensor | PackedSequence:
    """The input of a call by episodes: packed, if a row is reset after its first step."""
    mask = resets.unsqueeze(1) if x.dim() == 2 else resets
    packing = pack_episodes(mask, layer.batch_first and x.dim() == 3)
    if packing is None:
        return x
    return PackedSequence(x.flatten(0, -2).index_select(0, packing.to_packed), packing.batch_sizes)


def _is_rounded(layer: Layer, x: Any, hx: Any, weights: Sequence[Tensor]) -> bool:
    data = x.data if isinstance(x, PackedSequence) else x
    if not PLAIN.issuperset(map(type, tensors_in(x, hx, weights))) or data.dim() not in (2, 3):
        return False
    state = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    if torch.is_autocast_enabled(data.device.type):
        return False
    return takes_bfloat16(layer, *_unpacked(layer, x), state, weights)


def _unpacked(
    layer: Layer | Cell, x: Tensor | PackedSequence
) -> tuple[Tensor, Tensor | None, bool]:
    """Input (T, B, I), (B, T, I) or (N, I), batch_sizes, and whether the batch is first."""
    if isinstance(x, PackedSequence):
        return x.data, x.batch_sizes, False
    if isinstance(layer, Cell):  # one step
        return (x if x.dim() == 2 else x.unsqueeze(0)).unsqueeze(0), None, False
    return (x, None, layer.batch_first) if x.dim() == 3 else (x.unsqueeze(1), None, False)


def _plannable(layer: Any, x: Any) -> Layer | Cell:
    """The layer, if it is one of rnnkern's that takes x on the fused kernels; else raises."""
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
    regular = data.layout is torch.strided and not data.is_nested  # others need not have a shape
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
    return layer


def plan(
    layer: nn.Module, x: Tensor | PackedSequence, training: bool = False, resets: Any = None
) -> dict[str, Any]:
    """How the engine takes `layer(x)` (its first layer), or with `training` its backward pass.

    On the CPU: threads and what they split ("rows" of the batch, or "units" of the hidden state,
    with a barrier after each step); fused_input: whether the input's product is part of the step;
    unpacked_weights: whether the weights are read in their own layout; row_block, input_chunk,
    wgrad_rows and wgrad_chunk: rows and steps at a time; rule: for each decision the rule that
    fired. Results do not depend on the number of threads.

    On CUDA: schedule, "steps" (a product and a kernel for each step) or "clusters", "grid" or
    "block": the recurrent weights stay on the chip, on `blocks` blocks that exchange h, and each of
    `groups` such groups takes so many `rows` of the batch; directions_at_once: whether both are
    walked at once.

    With resets after the first step, resets: "mask" or "episodes", and its rule; episodes are
    planned as the packed input that they are. A packed input is planned by its longest row and
    largest batch, a cell as a layer's one step. Raises TypeError for a layer that
    is not rnnkern's or an input that is no tensor, ValueError for one of a wrong shape,
    RuntimeError for a call that the kernels do not take (`rnnkern.explain`).

    >>> rnnkern.plan(rnnkern.LSTM(128, 256), torch.randn(100, 32, 128))["split"]
    'rows'
    """
    own = _plannable(layer, x)
    if resets is not None and isinstance(own, Layer) and isinstance(x, Tensor):
        way, rule = _way(own, x, resets)
        found = plan(layer, _by_episodes(own, x, resets) if way == "episodes" else x, training)
        if way is not None:
            found |= {"resets": way, "rule": found.get("rule", {}) | {"resets": rule}}
        return found
    data, batch_sizes, batch_first = call = _unpacked(own, x)
    packed = batch_sizes is not None
    if batch_sizes is not None:
        steps, batch = len(batch_sizes), int(batch_sizes[0])
    else:
        steps, batch = data.shape[1::-1] if batch_first else data.shape[:2]
    mode = cast(str, own._mode) if isinstance(own, Cell) else own.mode  # a fused call has one
    cell, directions = library.BY_MODE[mode].id, 2 if getattr(own, "bidirectional", False) else 1
    sizes = own.hidden_size, own.proj_size
    if data.is_cuda:
        return library.cuda_plan(data, cell, steps, batch, *sizes, directions, packed, training)
    rounded = isinstance(own, Layer) and takes_bfloat16(own, *call)
    dtype = torch.bfloat16 if rounded else data.dtype
    return library.plan(
        cell,
        steps,
        batch,
        own.input_size,
        *sizes,
        directions,
        4 if dtype == torch.float16 else dtype.itemsize,  # float16 is computed in float32
        training,
        torch.get_num_threads(),
        getattr(own, "num_heads", 1),
    )
