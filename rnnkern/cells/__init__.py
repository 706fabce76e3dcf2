"""Cells that are not built in: a header of one's own, compiled at its first use, and a shelf.

>>> Mine, MineCell = rnnkern.cells.load("mine.h", step=step)  # a layer and a cell class
>>> rnnkern.cells.check(Mine)                                 # against autograd of the step
>>> output, state = Mine(128, 256, num_layers=2)(x)

>>> ZoneoutLSTM, ZoneoutLSTMCell = rnnkern.cells.zoneout(rnnkern.LSTM)
>>> output, (h_n, c_n) = ZoneoutLSTM(128, 256, zoneout=(0.05, 0.5))(x)

>>> rnnkern.cells.list()
['BatchNormLiGRU', 'CIFG', 'IndRNN', 'LayerNormLSTM', 'LiGRU', 'MGU', 'MinGRU', 'MinLSTM',
 'PeepholeLSTM', 'RecurrentDropoutLSTM', 'SLSTM', 'SRU']
>>> output, (h_n, c_n) = rnnkern.cells.CIFG(128, 256)(x)
"""

import builtins
from pathlib import Path
from typing import Any

from torch import nn

from .. import _cell_library
from .checking import check
from .loading import Loaded, load
from .normalized import BatchNormLiGRU, LayerNormLSTM
from .shelf import FOLDER, MASKED, SHELF
from .zoned import add_variational_dropout, add_zoneout

__all__ = [
    "BatchNormLiGRU",
    "LayerNormLSTM",
    "Loaded",
    "check",
    "include_folder",
    "list",
    "load",
    "variational_dropout",
    "zoneout",
]


_ALL = SHELF | MASKED


def zoneout(layer: type[nn.RNNBase], *, nonlinearity: str = "tanh") -> Loaded:
    """A layer class and a cell class with zoneout (Krueger et al. 2017) around another's cell.

    layer         LSTM, GRU, RNN, or a layer class of `load` or of the shelf
    nonlinearity  "tanh" or "relu", for an RNN

    Their constructors take one argument more, `zoneout`: the rate of all states, or of each in
    their order, 0.1 by default; the paper has (0.05, 0.5) for LSTM's h and c. In training a unit
    keeps a state from the step before with that probability, drawn by torch's generator for each
    unit, row and step. In evaluation the state is the mean of both. Parameters are those of the
    layer. Double backward, torch.func and a GPU without nvcc need the cell's step.

    Raises TypeError for another class, ValueError for a nonlinearity that RNN has not and for a
    cell that takes masks, and what `load` raises.
    """
    return Loaded(*add_zoneout(layer, nonlinearity))


def variational_dropout(layer: type[nn.RNNBase], *, nonlinearity: str = "tanh") -> Loaded:
    """A layer class and a cell class with variational dropout (Gal & Ghahramani 2016) on h.

    layer         LSTM, GRU, RNN, or a layer class of `load` or of the shelf, with a W_hh
    nonlinearity  "tanh" or "relu", for an RNN

    Their constructors take one argument more, `recurrent_dropout`, 0.25 by default: in training
    W_hh multiplies h times a mask, 0 with that rate and else 1 / (1 - rate). A call of a layer
    draws one for each row, layer and direction, which is the same in all steps; a call of a cell
    draws its own. In evaluation nothing is dropped. Parameters are those of the layer.

    Raises TypeError for another class, ValueError for a nonlinearity that RNN has not, for a cell
    without a W_hh and for one that takes masks, and what `load` raises.
    """
    return Loaded(*add_variational_dropout(layer, nonlinearity))


def include_folder() -> Path:
    """The folder of the headers, for an editor or a compiler of one's own."""
    return _cell_library.include_folder()


def list() -> builtins.list[str]:
    """The names of the cells on the shelf: `rnnkern.cells.CIFG` is a layer class, `CIFGCell` its
    cell class. BatchNormLiGRU and LayerNormLSTM are layers alone."""
    return sorted([*_ALL, "BatchNormLiGRU", "LayerNormLSTM"])


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
