"""torch.compile of the loop of a cell's step. The loop is unrolled: it compiles for minutes."""

from __future__ import annotations

from measure import Side
from own_cells import COMPILED
from rows import Row


class Peer(Side):
    def __init__(self, row: Row, threads: int) -> None:
        super().__init__(row, COMPILED)
