"""The masks of added cells that take some: who draws them, and how a call gets them.

Letters as in layers.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call_spec import CallSpec
from ..ops.autograd import Run
from ..ops.library import BY_MODE, Resets
from ..own_cell import AddedCell

#: A method that draws the masks of a call: (module, shape, like) -> a tensor of like's dtype and
#: device, which is expanded to the shape, (D, T, B, kMasks, H) or as the input is laid out.
Masks = Callable[[Any, tuple[int, ...], Tensor], Tensor]


@dataclass(frozen=True)
class Masked:
    """A run of a layer whose cell takes masks, which are drawn for each call."""

    run: Run
    module: Any

    def __call__(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
        *resets: Resets,
    ) -> tuple[Tensor, ...]:
        kinds = len(BY_MODE[self.module.own.mode].masks)
        shape = (spec.directions, *input.shape[:-1], kinds, self.module.hidden_size)
        if getattr(self.module, "masks_per_row", False):
            masks = _per_row(self.module, shape, input, batch_sizes, spec).expand(shape)
        else:
            masks = self.module.masks(shape, input).expand(shape)
        return self.run(input, batch_sizes, state, weights, spec, *resets, masks=masks)


def _per_row(
    module: Any, shape: tuple[int, ...], input: Tensor, batch_sizes: Tensor | None, spec: CallSpec
) -> Tensor:
    """Masks that are drawn for one step, and are the same in all steps of a row."""
    if batch_sizes is None:
        steps = 2 if spec.batch_first else 1
        one = tuple(1 if i == steps else size for i, size in enumerate(shape))
        drawn: Tensor = module.masks(one, input).expand(one)
        return drawn
    sizes = batch_sizes.tolist()
    rows = torch.cat([torch.arange(size, device=input.device) for size in sizes])
    one = (shape[0], sizes[0], *shape[2:])
    by_row: Tensor = module.masks(one, input).expand(one)
    return by_row.index_select(1, rows)


def masked(run: Run, module: Any) -> Run:
    """`run`, with masks if the module's cell takes some."""
    takes = BY_MODE[module.own.mode].masks and not isinstance(run, Masked)
    return Masked(run, module) if takes else run


def no_masks(self: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The masks of a call; `load` puts what it is given in the place of this method."""
    raise RuntimeError(
        f"{self.own.name} takes masks, and nothing draws them: give load(header, masks=...)"
    )


def constant_masks(module: Any, like: Tensor) -> tuple[Tensor, ...]:
    """Those of all steps and rows in evaluation, (kMasks, H); () of a module without masks.

    Raises ValueError where they differ from step to step or from row to row.
    """
    own = getattr(module, "own", None)
    kinds = len(BY_MODE[own.mode].masks) if isinstance(own, AddedCell) else 0
    if not kinds:
        return ()
    shape = (2, 2, 2, kinds, module.hidden_size)
    masks = module.masks(shape, like).expand(shape)
    first = masks[0, 0, 0]
    if not torch.equal(masks, first.expand(shape)):
        raise ValueError("its masks in evaluation are not the same for all steps and rows")
    return (first,)
