"""One layer's call as the kernels left it, and how the layer's caller sees its steps.

Letters: T steps, B batch rows, H hidden units (of h: proj_size, if given), D directions, R the
output's width per direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..call_spec import CallSpec
from ..nn.layers import Layer
from ..ops.library import CELLS
from ..ops.packing import pack_episodes
from ..saved_layout import saved_values

Input = Tensor | PackedSequence


@dataclass(frozen=True)
class Steps:
    """One direction of one layer, step by step: each tensor (T, B, H), or (B, T, H) with
    batch_first, or (T, H) without a batch.

    hidden  h_t
    cell    c_t, None unless the cell has a state c
    gates   by name: LSTM "input", "forget", "cell", "output"; GRU "reset", "update", "new"; RNN {};
            of an added cell those that it saves
    states  all states by name, h and c too
    """

    hidden: Tensor
    cell: Tensor | None
    gates: dict[str, Tensor]
    states: dict[str, Tensor]


@dataclass
class RecordedCall:
    """One layer with its directions, as the kernels left it (`CallObserver` in ops/autograd.py)."""

    spec: CallSpec
    units: int
    output: Tensor  # as the layer's caller sees it
    batch_sizes: Tensor | None
    saved: Tensor
    c_states: Tensor

    def steps(self, present: Callable[[Tensor], Tensor]) -> list[Steps]:
        cell = CELLS[self.spec.cell]
        states = self._by_name(self.c_states, cell.states[1:])
        saved = self._by_name(self.saved, cell.saved)
        found = []
        for d, hidden in enumerate(self.by_direction):
            shown = {name: present(s) for name, s in ({"h": hidden} | states[d]).items()}
            gates = {name: present(saved[d][name]) for name in cell.gates if name in saved[d]}
            found.append(Steps(shown["h"], shown.get("c"), gates, shown))
        return found

    def _by_name(self, workspace: Tensor, names: Sequence[str]) -> list[dict[str, Tensor]]:
        if self.batch_sizes is not None:
            sizes = self.batch_sizes.tolist()
        else:
            batch, steps = self.output.shape[:2][:: 1 if self.by_batch else -1]
            sizes = [batch] * steps
        return saved_values(
            workspace, names, self.spec.directions, self.units, sizes,
            blocked=workspace.device.type == "cpu", as_index=torch.from_numpy,
        )  # fmt: skip

    @property
    def by_batch(self) -> bool:
        """Whether output is (B, T, D·R)."""
        return self.spec.batch_first and self.batch_sizes is None

    @property
    def by_direction(self) -> Tensor:
        """h as (D, rows, H), row t·B + b or packed."""
        steps = self.output.transpose(0, 1) if self.by_batch else self.output
        rows = steps.detach().flatten(0, -2)
        return torch.unflatten(rows, 1, (self.spec.directions, -1)).transpose(0, 1)

    def zero_flow(self) -> tuple[Tensor, Tensor]:
        """flow_h and flow_c of a loss that does not depend on the layer."""
        by_h = torch.zeros_like(self.by_direction)
        by_c = torch.zeros_like(self.c_states)
        return by_h, by_c.reshape(*by_h.shape[:2], -1) if len(by_c) else by_c


@dataclass
class Layout:
    """How a module's caller sees steps, from the rows that the kernels write."""

    batch: int
    batch_first: bool
    unbatched: bool
    packed: PackedSequence | None
    from_episodes: Tensor | None  # of rows packed by episodes: where row t·B + b is

    @classmethod
    def of(cls, layer: Layer, x: Input, resets: Tensor | None = None) -> "Layout":
        if isinstance(x, PackedSequence):
            indices = x._replace(data=x.batch_sizes[:0])  # rather than keep the data alive
            return cls(int(x.batch_sizes[0]), layer.batch_first, False, indices, None)
        unbatched = x.dim() == 2
        batch_first = layer.batch_first and not unbatched
        episodes = None
        if resets is not None:
            by_step = resets.T if batch_first else resets.unsqueeze(1) if unbatched else resets
            packing = pack_episodes(by_step, False)
            episodes = None if packing is None else packing.from_packed
        return cls(
            1 if unbatched else x.shape[not batch_first], batch_first, unbatched, None, episodes
        )

    @cached_property
    def lengths(self) -> Tensor | None:
        if self.packed is None:
            return None
        data = torch.empty(int(self.packed.batch_sizes.sum()), device="cpu")
        return pad_packed_sequence(self.packed._replace(data=data))[1]

    def over_time(self, rows: Tensor) -> Tensor:
        """(rows, ...) as (T, B, ...), or (T, ...) without a batch."""
        if self.packed is not None:
            return pad_packed_sequence(self.packed._replace(data=rows))[0]
        if self.from_episodes is not None:
            rows = rows.index_select(0, self.from_episodes)
        return rows if self.unbatched else torch.unflatten(rows, 0, (-1, self.batch))

    def present(self, rows: Tensor) -> Tensor:
        """(rows, H) in the layer's own layout."""
        steps = self.over_time(rows)
        return steps.transpose(0, 1) if self.batch_first else steps
