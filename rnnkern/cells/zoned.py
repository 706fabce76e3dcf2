"""zoneout: the classes with zoneout around another layer's cell."""

from typing import Any

from torch import Tensor, nn

from .._cell_library import include_folder
from ..nn import added
from ..nn._torch_twin import CLASSES
from ..nn.added import AddedCellModule, AddedLayer
from ..ops import decomposition, library
from ..ops.decomposition import Step
from ..own_cell import Source, add_source

# Header in the engine's cells/ and struct, by mode.
_BUILT_IN = {
    "LSTM": ("lstm.h", "rnnkern::Lstm"),
    "GRU": ("gru.h", "rnnkern::Gru"),
    "RNN_TANH": ("elman.h", "rnnkern::ElmanTanh"),
    "RNN_RELU": ("elman.h", "rnnkern::ElmanRelu"),
}


def add_zoneout(
    layer: type[nn.RNNBase], nonlinearity: str
) -> tuple[type[AddedLayer], type[AddedCellModule]]:
    """See `rnnkern.cells.zoneout`."""
    mode, header, struct = _cell_of(layer, nonlinearity)
    name = f"Zoneout{mode.partition('@')[0]}"
    own = add_source(Source(header, struct, name, "Zoneout"), library.info()["isa"])
    decomposition.use_step(own.mode, _zoned(mode))
    return added.classes(own)


def _cell_of(layer: Any, nonlinearity: str) -> tuple[str, str, str]:
    """Mode, header and struct of a layer class's cell."""
    if not isinstance(layer, type) or not issubclass(layer, nn.RNNBase):
        raise TypeError(f"zoneout is around the cell of a layer class, got {layer!r}")
    if issubclass(layer, AddedLayer):
        own = layer.own
        if library.BY_MODE[own.mode].masks:
            raise ValueError(f"{own.name} takes masks: zoneout is around a cell without")
        return own.mode, own.header, own.struct
    names = [name for name in ("LSTM", "GRU", "RNN") if issubclass(layer, CLASSES[name])]
    if not names:
        raise TypeError(
            f"zoneout is around the cell of LSTM, GRU, RNN or a loaded one, not {layer}"
        )
    mode = f"RNN_{nonlinearity.upper()}" if names[0] == "RNN" else names[0]
    if mode not in _BUILT_IN:
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    header, struct = _BUILT_IN[mode]
    return mode, str(include_folder() / "cells" / header), struct


def _zoned(mode: str) -> Step:
    """The step with zoneout around that of another cell."""
    cell = library.BY_MODE[mode]
    count, first = len(cell.states), 1 + cell.recurs

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        states, masks = given[first : first + count], given[-count:]
        new = decomposition.required_step(mode)(*given[:-count])
        return tuple(m * s + (1 - m) * n for m, s, n in zip(masks, states, new, strict=True))

    return step
