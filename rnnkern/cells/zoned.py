"""zoneout and variational_dropout: the classes with either around another layer's cell."""

from typing import Any

from torch import Tensor, nn

from ..nn import added
from ..nn._torch_twin import CLASSES
from ..nn.added import AddedCellModule, AddedLayer
from ..ops import decomposition, library
from ..ops.decomposition import Step
from ..own_cell import Source, add_source, built_in_source


def add_zoneout(
    layer: type[nn.RNNBase], nonlinearity: str
) -> tuple[type[AddedLayer], type[AddedCellModule]]:
    """See `rnnkern.cells.zoneout`."""
    mode, inner = _cell_of(layer, nonlinearity, "zoneout")
    own = add_source(inner.inside("Zoneout"), library.info()["isa"])
    decomposition.use_step(own.mode, _zoned(mode))
    return added.classes(own)


def add_variational_dropout(
    layer: type[nn.RNNBase], nonlinearity: str
) -> tuple[type[AddedLayer], type[AddedCellModule]]:
    """See `rnnkern.cells.variational_dropout`."""
    mode, inner = _cell_of(layer, nonlinearity, "variational dropout")
    if not library.BY_MODE[mode].recurs:
        raise ValueError(f"{mode.partition('@')[0]} has no W_hh, before which h could be dropped")
    own = add_source(inner.inside("VariationalDropout"), library.info()["isa"])

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        return decomposition.required_step(mode)(*given[:-1])

    decomposition.use_step(own.mode, step)
    return added.classes(own)


def _cell_of(layer: Any, nonlinearity: str, what: str) -> tuple[str, Source]:
    """Mode and source of a layer class's cell."""
    if not isinstance(layer, type) or not issubclass(layer, nn.RNNBase):
        raise TypeError(f"{what} is around the cell of a layer class, got {layer!r}")
    if issubclass(layer, AddedLayer):
        own = layer.own
        if library.BY_MODE[own.mode].masks:
            raise ValueError(f"{own.name} takes masks: {what} is around a cell without")
        return own.mode, own
    names = [name for name in ("LSTM", "GRU", "RNN") if issubclass(layer, CLASSES[name])]
    if not names:
        raise TypeError(f"{what} is around the cell of LSTM, GRU, RNN or a loaded one, not {layer}")
    mode = f"RNN_{nonlinearity.upper()}" if names[0] == "RNN" else names[0]
    if mode not in library.BY_MODE:
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return mode, built_in_source(mode)


def _zoned(mode: str) -> Step:
    """The step with zoneout around that of another cell."""
    cell = library.BY_MODE[mode]
    count, first = len(cell.states), 1 + cell.recurs

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        states, masks = given[first : first + count], given[-count:]
        new = decomposition.required_step(mode)(*given[:-count])
        return tuple(m * s + (1 - m) * n for m, s, n in zip(masks, states, new, strict=True))

    return step
