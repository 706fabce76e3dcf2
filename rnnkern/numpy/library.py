"""Loads the compiled module of this Python: its cells, its threads."""

from typing import Any

import numpy as np

from .._missing import found, not_built
from ..cell_spec import exported

__all__ = ["CELLS", "_numpy", "set_threads", "whole_number"]

try:
    from .. import _numpy
except ImportError:
    if found("rnnkern._numpy"):
        raise  # it says what is wrong
    raise ImportError(not_built("_numpy")) from None

CELLS = [cell for cell in exported(_numpy.cells()) if cell.built_in]


def set_threads(count: int) -> None:
    """How many threads a call uses; at first as many as the machine has cores.

    A CPU quota of the control groups limits them, a part of a core counting as one.
    Raises TypeError for what is no whole number, ValueError below 1.
    """
    _numpy.set_threads(whole_number("the number of threads", count))


def whole_number(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)
