"""What `trace` and `gradient_flow` return: every step of a call, by layer and direction.

Letters: T steps, B batch rows, H hidden units (of h: proj_size, if given).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from .record import Input, Layout, RecordedCall, Steps

_Part = TypeVar("_Part")


@dataclass(repr=False)
class Trace:
    """One call of a layer: `trace[layer, direction]` are its `Steps`.

    output, state  what the layer returned
    lengths        of a packed batch's sequences, (B,), in the batch's order; what lies beyond them
                   is zero. None for a padded batch
    batch_first    whether the steps are (B, T, H)
    """

    mode: str
    output: Input
    state: Any
    _layout: Layout
    _calls: list[RecordedCall]

    # Looking is lazy, so that a trace of a short call costs little more than the call.
    @cached_property
    def steps(self) -> list[list[Steps]]:
        """By layer and direction."""
        return [call.steps(self._layout.present) for call in self._calls]

    @property
    def lengths(self) -> Tensor | None:
        return self._layout.lengths

    @property
    def batch_first(self) -> bool:
        return self._layout.batch_first

    def __getitem__(self, layer_and_direction: tuple[int, int]) -> Steps:
        return _pick(self.steps, layer_and_direction)

    @property
    def hidden(self) -> Tensor:
        """h_t of the last layer's forward direction."""
        return self[-1, 0].hidden

    @property
    def cell(self) -> Tensor | None:
        """c_t of the last layer's forward direction; None unless the cell has a c."""
        return self[-1, 0].cell

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates of the last layer's forward direction."""
        return self[-1, 0].gates

    def __repr__(self) -> str:
        shape, gates = tuple(self.hidden.shape), ", ".join(self.gates) or "none"
        layers, directions = len(self.steps), len(self.steps[0])
        return f"Trace({self.mode}, {layers=}, {directions=}, hidden {shape}, gates: {gates})"


@dataclass(frozen=True)
class Norms:
    """One direction of one layer: the Euclidean norm, over the hidden units, of the loss's total
    derivative by the state at every step, each (T, B), or (T,) without a batch.

    hidden  ‖∂L/∂h_t‖
    cell    ‖∂L/∂c_t‖, along every path, that through h_t too; None unless the cell has a state c
    states  of each state by name, h and c too
    """

    hidden: Tensor
    cell: Tensor | None
    states: dict[str, Tensor]


@dataclass(frozen=True)
class Flow:
    """The gradient on its way back through time: `flow[layer, direction]` are its `Norms`.

    lengths  of a packed batch's sequences, as in `Trace`
    """

    mode: str
    lengths: Tensor | None
    norms: list[list[Norms]]

    def __getitem__(self, layer_and_direction: tuple[int, int]) -> Norms:
        return _pick(self.norms, layer_and_direction)

    @property
    def hidden(self) -> Tensor:
        """‖∂L/∂h_t‖ of the last layer's forward direction."""
        return self[-1, 0].hidden

    @property
    def cell(self) -> Tensor | None:
        """‖∂L/∂c_t‖ of the last layer's forward direction; None unless the cell has a c."""
        return self[-1, 0].cell

    def __repr__(self) -> str:
        layers, directions = len(self.norms), len(self.norms[0])
        return f"Flow({self.mode}, {layers=}, {directions=}, norms {tuple(self.hidden.shape)})"


def _pick(parts: list[list[_Part]], layer_and_direction: Any) -> _Part:
    """One direction of one layer, by their numbers; negative ones count from the end."""
    layers, directions = len(parts), len(parts[0])
    if not (isinstance(layer_and_direction, tuple) and len(layer_and_direction) == 2):
        raise TypeError(f"expected [layer, direction], got [{layer_and_direction!r}]")
    layer, direction = layer_and_direction
    if not (-layers <= layer < layers and -directions <= direction < directions):
        raise IndexError(
            f"no layer {layer}, direction {direction} in {layers} layer(s) of "
            f"{directions} direction(s)"
        )
    return parts[layer][direction]
