"""What the kernels save for the backward pass, by name.

Forward returns it as two workspaces of one dimension, `saved` (the values named in Cell.saved) and
`c_states` (all c_t). Their layout is the engine's own: csrc/core/saved_layout.h on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNIT_BLOCK = 16  # kUnitBlock in csrc/core/saved_layout.h


def offsets(sizes: Sequence[int], values: int, units: int) -> NDArray[np.int64]:
    """The place of each value of a direction, (rows, values, units), among all of its values.

    sizes: rows of each step. A step's values are in blocks of units, [block][row][value][unit].
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


def saved_values(
    workspace: Any,
    names: Sequence[str],
    directions: int,
    units: int,
    sizes: Sequence[int],
    *,
    blocked: bool = True,
    as_index: Callable[[NDArray[np.int64]], Any] = np.asarray,
) -> list[dict[str, Any]]:
    """The values of a workspace, {name: (rows, units)} for each direction; {} if it is empty.

    workspace  a NumPy array or a torch tensor of one dimension
    names      of its values in their order: `Cell.saved` for saved, one name for c_states
    sizes      rows of each step
    blocked    False for the CUDA kernels' layout, (directions, rows, values, units)
    as_index   makes of an array of places what indexes the workspace
    """
    if not names or not len(workspace):
        return [{} for _ in range(directions)]
    kept = workspace.reshape(directions, -1)
    if blocked:
        kept = kept[:, as_index(offsets(sizes, len(names), units))]
    else:
        kept = kept.reshape(directions, -1, len(names), units)
    return [{name: kept[d, :, k] for k, name in enumerate(names)} for d in range(directions)]
