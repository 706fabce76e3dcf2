"""Cells that are not built in: a header of one's own, compiled at its first use, and a shelf.

>>> Mine, MineCell = rnnkern.cells.load("mine.h", step=step)  # a layer and a cell class
>>> rnnkern.cells.check(Mine)                                 # against autograd of the step
>>> output, state = Mine(128, 256, num_layers=2)(x)

>>> ZoneoutLSTM, ZoneoutLSTMCell = rnnkern.cells.zoneout(rnnkern.LSTM)
>>> output, (h_n, c_n) = ZoneoutLSTM(128, 256, zoneout=(0.05, 0.5))(x)

>>> rnnkern.cells.list()
['CIFG', 'IndRNN', 'LiGRU', 'MGU', 'MinGRU', 'MinLSTM', 'PeepholeLSTM', 'RecurrentDropoutLSTM',
 'SLSTM', 'SRU']
>>> output, (h_n, c_n) = rnnkern.cells.CIFG(128, 256)(x)
"""

import builtins
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .. import own_cell
from ..nn import added
from ..nn.masks import Masks
from ..ops import decomposition, library
from ..ops.decomposition import Step
from .checking import check
from .shelf import FOLDER, MASKED, SHELF
from .zoned import add_zoneout

__all__ = ["Loaded", "check", "include_folder", "list", "load", "zoneout"]


_ALL = SHELF | MASKED


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
    headers, and is compiled anew only when one changes.

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


def zoneout(layer: type[nn.RNNBase], *, nonlinearity: str = "tanh") -> Loaded:
    """A layer class and a cell class with zoneout (Krueger et al. 2017) around another's cell.

    layer         LSTM, GRU, RNN, or a layer class of `load` or of the shelf
    nonlinearity  "tanh" or "relu", for an RNN

    Their constructors take one argument more, `zoneout`: the rate of all states, or of each in
    their order, 0.1 by default; the paper has (0.05, 0.5) for LSTM's h and c. In training a unit
    keeps a state from the step before with that probability, drawn by torch's generator for each
    unit, row and step. In evaluation the state is the mean of both. Parameters are those of the
    layer. A GPU, double backward and torch.func need the cell's step.

    Raises TypeError for another class, ValueError for a nonlinearity that RNN has not and for a
    cell that takes masks, and what `load` raises.
    """
    return Loaded(*add_zoneout(layer, nonlinearity))


def include_folder() -> Path:
    """The folder of the headers, for an editor or a compiler of one's own."""
    return own_cell.include_folder()


def list() -> builtins.list[str]:
    """The names of the cells on the shelf: `rnnkern.cells.CIFG` is a layer class, `CIFGCell` its
    cell class."""
    return sorted(_ALL)


def __getattr__(name: str) -> Any:
    kind = name if name in _ALL else name.removesuffix("Cell")
    if kind not in _ALL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    entry = _ALL[kind]
    layer, cell = load(FOLDER / entry.header, name=kind, step=entry.step)
    globals().update({kind: layer, f"{kind}Cell": cell})
    return globals()[name]


def __dir__() -> builtins.list[str]:
    return sorted([*__all__, *_ALL, *(f"{name}Cell" for name in _ALL)])
