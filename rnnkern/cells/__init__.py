"""Cells that are not built in: a header of one's own, compiled at its first use, and a shelf.

>>> Mine, MineCell = rnnkern.cells.load("mine.h", step=step)  # a layer and a cell class
>>> rnnkern.cells.check(Mine)                                 # against autograd of the step
>>> output, state = Mine(128, 256, num_layers=2)(x)

>>> rnnkern.cells.list()
['CIFG', 'IndRNN', 'LiGRU', 'MGU', 'MinGRU', 'MinLSTM', 'PeepholeLSTM', 'SLSTM', 'SRU']
>>> output, (h_n, c_n) = rnnkern.cells.CIFG(128, 256)(x)
"""

import builtins
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from .. import own_cell
from ..nn import added
from ..ops import decomposition, library
from ..ops.decomposition import Step
from .checking import check
from .shelf import FOLDER, SHELF

__all__ = ["Loaded", "check", "include_folder", "list", "load"]


class Loaded(NamedTuple):
    """The classes of an added cell: a stack of layers, as torch.nn.LSTM, and one step."""

    layer: type[added.AddedLayer]
    cell: type[added.AddedCellModule]


def load(
    header: str | PathLike[str], *, name: str | None = None, step: Step | None = None
) -> Loaded:
    """Compiles the header of a cell and returns its layer class and its cell class.

    header  a file with a struct that derives from rnnkern::CellDefaults; docs/guide/own-cell.md
            has a template
    name    of the struct, where the file has several
    step    one step in torch's operations, step(x, y, *states, *params) -> tuple of the states
            after, where x = W_ih x + b_ih and y = W_hh h + b_hh, (B, G·H) in the order of the
            gates, each state (B, H) and each learned value per unit (H); of a cell without W_hh
            step(x, *states, *params). It serves double backward, torch.func, forward-mode AD and
            devices without kernels

    The library is compiled with $CXX or Python's compiler for this machine's instruction-set level.
    It is kept in the user's cache (RNNKERN_CACHE names another folder), by the contents of all
    headers, and is compiled anew only when one changes.

    Raises FileNotFoundError, ValueError where `name` is needed, RuntimeError without a compiler,
    for a header that does not compile (with the compiler's words), and for a folder of the cache
    that others can write.
    """
    cell = own_cell.add(header, library.info()["isa"], name)
    classes = Loaded(*added.classes(cell))
    if step is not None:
        decomposition.use_step(cell.mode, step)
    return classes


def include_folder() -> Path:
    """The folder of the headers, for an editor or a compiler of one's own."""
    return own_cell.include_folder()


def list() -> builtins.list[str]:
    """The names of the cells on the shelf: `rnnkern.cells.CIFG` is a layer class, `CIFGCell` its
    cell class."""
    return sorted(SHELF)


def __getattr__(name: str) -> Any:
    kind = name if name in SHELF else name.removesuffix("Cell")
    if kind not in SHELF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    entry = SHELF[kind]
    layer, cell = load(FOLDER / entry.header, name=kind, step=entry.step)
    globals().update({kind: layer, f"{kind}Cell": cell})
    return globals()[name]


def __dir__() -> builtins.list[str]:
    return sorted([*__all__, *SHELF, *(f"{name}Cell" for name in SHELF)])
