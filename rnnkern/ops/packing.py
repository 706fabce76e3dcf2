"""The operator `rnnkern::pack_episodes`: `episodes.pack` on tensors, for compilers too."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import episodes

_functorch: Any = torch._C._functorch
_is_compiling = torch.compiler.is_compiling


class Packing(NamedTuple):
    """`episodes.Episodes` as tensors: batch_sizes on the CPU, the others on the mask's device."""

    to_packed: Tensor
    from_packed: Tensor
    batch_sizes: Tensor
    packed_row: Tensor
    keeps_hx: Tensor
    rank: Tensor
    row: Tensor
    end: Tensor
    last: Tensor


def _pack(resets: Tensor, batch_first: bool) -> Packing:
    found = episodes.pack(resets.cpu().numpy(), batch_first)
    packed = Packing(*map(torch.from_numpy, found))
    if resets.is_cpu:
        return packed
    moved = Packing(*(t.to(resets.device) for t in packed))
    return moved._replace(batch_sizes=packed.batch_sizes)


_LIBRARY = torch.library.Library("rnnkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_KEY = "CompositeExplicitAutograd"  # any device, nothing to differentiate
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"pack_episodes(Tensor resets, bool batch_first) -> ({', '.join(['Tensor'] * 9)})",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("pack_episodes", _pack, _KEY)  # type: ignore[no-untyped-call]


@torch.library.register_fake("rnnkern::pack_episodes", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shapes(resets: Tensor, batch_first: bool) -> Packing:
    count, longest = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    first, second = resets.shape
    steps = first * second

    def index(size: Any, **options: Any) -> Tensor:
        return resets.new_empty(size, **{"dtype": torch.int64, **options})

    return Packing(
        index(steps), index(steps), index(longest, device="cpu"), index(count),
        index(count, dtype=torch.bool), index(count), index(count), index(count),
        index(first if batch_first else second),
    )  # fmt: skip


def later_resets(resets: Tensor, batch_first: bool) -> int:
    """How often a row is reset after its first step."""
    with torch._C._DisableFuncTorch():
        mask = _plain(resets)
        return int((mask[:, 1:] if batch_first else mask[1:]).count_nonzero())


def pack_episodes(resets: Tensor, batch_first: bool) -> Packing | None:
    """How the rows are packed by episodes; None if no row is reset after its first step.

    A compiler cannot look into the mask: there all rows are packed. Without data none is.
    """
    if _is_compiling() or type(resets) is not Tensor:
        return Packing(*torch.ops.rnnkern.pack_episodes(resets, batch_first))
    if resets.is_meta:
        return None
    if not later_resets(resets, batch_first):
        return None
    with torch._C._DisableFuncTorch():
        return _pack(_plain(resets), batch_first)


def _plain(mask: Tensor) -> Tensor:
    """The mask itself, also inside torch.func.grad and its like."""
    while _functorch.is_functorch_wrapped_tensor(mask):
        if _functorch.is_batchedtensor(mask):
            raise RuntimeError("resets must be the same for all that vmap maps over")
        mask = _functorch.get_unwrapped(mask)
    return mask
