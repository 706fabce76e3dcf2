"""load: a layer class and a cell class from the header of a cell."""

from os import PathLike
from typing import NamedTuple

from .. import own_cell
from ..nn import added
from ..nn.masks import Masks
from ..ops import decomposition, library
from ..ops.decomposition import Step


class Loaded(NamedTuple):
    """The classes of an added cell: a stack of layers, as torch.nn.LSTM, and one step."""

    layer: type[added.AddedLayer]
    cell: type[added.AddedCellModule]


def load(
    header: str | PathLike[str],
    *,
    name: str | None = None,
    step: Step | None = None,
    masks: Masks | None = None,
) -> Loaded:
    """Compiles the header of a cell and returns its layer class and its cell class.

    header  a file with a struct that derives from rnnkern::CellDefaults; docs/guide/own-cell.md
            has a template
    name    of the struct, where the file has several
    step    one step in torch's operations, step(x, y, *states, *params, *masks) -> tuple of the
            states after, where x = W_ih x + b_ih and y = W_hh h + b_hh, (B, G·H) in the order of
            the gates, each state (B, H), each learned value per unit (H) and each mask (B, H); of a
            cell without W_hh step(x, *states, *params, *masks). It serves double backward,
            torch.func, forward-mode AD and devices without kernels
    masks   for a cell that takes some: a method of the classes, masks(self, shape, like), which
            draws them in each call of a layer, in like's dtype and on its device. The shape is
            (D, T, B, kMasks, H), with batch_first (D, B, T, kMasks, H), packed (D, N, kMasks, H);
            what it returns is expanded to that

    The library is compiled with $CXX or Python's compiler for this machine's instruction-set level.
    It is kept in the user's cache (RNNKERN_CACHE names another folder), by the contents of all
    headers, and is compiled anew only when one changes. Where torch sees a GPU and there is nvcc,
    its CUDA kernels are compiled too, for the GPUs here.

    Raises FileNotFoundError, ValueError where `name` is needed, RuntimeError without a compiler,
    for a header that does not compile (with the compiler's words), and for a folder of the cache
    that others can write.
    """
    cell = own_cell.add(header, library.info()["isa"], name)
    classes = Loaded(*added.classes(cell))
    if step is not None:
        decomposition.use_step(cell.mode, step)
    if masks is not None:
        for kind in classes:
            kind.masks = masks  # type: ignore[assignment]
    return classes
