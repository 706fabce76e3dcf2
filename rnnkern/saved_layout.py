"""The layout of what the CPU kernels save for the backward pass: csrc/core/saved_layout.h."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNIT_BLOCK = 16  # kUnitBlock in csrc/core/saved_layout.h


def offsets(sizes: Sequence[int], values: int, units: int) -> NDArray[np.int64]:
    """The place of each value of a direction, (rows, values, units), among all of its values.

    sizes: rows of each step. A step's values stand in blocks of units, [block][row][value][unit].
    """
    of_step = np.asarray(sizes)
    rows = np.repeat(of_step, of_step)[:, None, None]  # of each row's step
    before = np.repeat(np.cumsum(of_step) - of_step, of_step)[:, None, None]
    row = np.arange(len(rows))[:, None, None] - before
    value = np.arange(values)[:, None]
    unit = np.arange(units)
    block = unit // UNIT_BLOCK * UNIT_BLOCK
    width = np.minimum(UNIT_BLOCK, units - block)
    at = (before * units + block * rows + row * width) * values
    found: NDArray[np.int64] = at + value * width + unit - block
    return found
