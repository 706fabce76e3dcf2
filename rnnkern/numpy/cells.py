"""Which cell an array layer has, and the masks of one that takes some."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..cell_spec import Cell, exported
from ..own_cell import Source, add_source
from ..state_dict import Weights
from .library import CELLS, _numpy


def added_cell(source: Source) -> Cell:
    id = add_source(source, _numpy.isa()).id
    return exported(_numpy.cells())[id]


def zoneout_masks(cell: Cell, zoneout: float | Sequence[float], masks: Any) -> np.ndarray:
    """Zoneout's masks in evaluation, (states, 1), around this cell."""
    if cell.masks or masks is not None:
        raise ValueError("zoneout is around a cell without masks")
    rates = np.asarray(zoneout, np.float64)
    if rates.shape not in ((), (len(cell.states),)):
        raise ValueError(
            f"zoneout must be a number or one for each of {', '.join(cell.states)}, got {zoneout}"
        )
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"zoneout must be between 0 and 1, got {zoneout}")
    return np.broadcast_to(rates, (len(cell.states),))[:, None]


def constant_masks(cell: Cell, masks: Any, units: int, dtype: Any) -> np.ndarray | None:
    """The masks (kMasks, H) of all steps and rows, for a cell that takes some."""
    if masks is None:
        if cell.masks:
            raise ValueError(f"the cell takes masks, masks=...: {', '.join(cell.masks)}")
        return None
    if not cell.masks:
        raise ValueError("the cell takes no masks")
    return np.ascontiguousarray(np.broadcast_to(masks, (len(cell.masks), units)), dtype)


def cell_of(weights: Weights, nonlinearity: str) -> Cell:
    """The cell whose recurrent weights, (G·H, R), and projection, if any, (P, H), are these."""
    projected = weights.w_hr is not None
    w_hh = weights.w_hh.shape
    units = w_hh[1:] if weights.w_hr is None else weights.w_hr.shape[-1:]
    gates, rest = divmod(w_hh[0], units[0]) if len(w_hh) == 2 and all(units) else (0, 1)
    cells = [c for c in CELLS if len(c.gates) == gates and (c.projects or not projected)]
    if rest or not cells:
        raise ValueError(f"weight_hh_l0 of shape {w_hh} belongs to no LSTM, GRU or RNN")
    if len(cells) > 1:  # RNN's, which differ in the nonlinearity alone
        cells = [c for c in cells if c.mode == f"RNN_{str(nonlinearity).upper()}"]
    if not cells:
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return cells[0]


def hidden_size_of(cell: Cell, weights: Weights) -> int:
    gates = len(cell.gates)
    if cell.recurrent == "dense":
        return int(weights.w_hh.shape[0]) // gates
    if not cell.given_sums:
        return int(weights.w_ih.shape[0]) // gates
    last = weights.w_hh if cell.recurs else weights.params
    if last is None or not last.ndim:
        raise ValueError(f"the state_dict lacks {'weight_hh_l0' if cell.recurs else 'params_l0'}")
    return int(last.shape[-1]) * (len(last) if cell.recurs else 1)
