"""One call of a layer: its shape and options, its layer, inputs, states and lengths.

The rows of the benchmark (rows.py) and the cases of the tests (tests/cases.py) are such calls.
T time steps, B batch rows, I input features, H hidden units, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

States = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class LayerCall:
    """A layer and what it is called with; `packed` gives the batch rows different lengths."""

    cell: str  # LSTM, GRU, RNN, RNN_TANH or RNN_RELU
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    proj: int = 0
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    packed: bool = False
    hx: bool = False
    dtype: torch.dtype = torch.float32

    #: Whether `lengths` are in decreasing order, so that packing does not permute the rows.
    SORTED: ClassVar[bool] = False

    def words(self) -> list[str]:
        """What the call is named by."""
        words = [
            self.cell,
            *(f"{letter}{getattr(self, letter)}" for letter in "TBIH"),
            f"L{self.L}" if self.L > 1 else "",
            f"proj{self.proj}" if self.proj else "",
            "bi" if self.bidirectional else "",
            "packed" if self.packed else "",
            "hx" if self.hx else "",
            "" if self.dtype is torch.float32 else str(self.dtype).removeprefix("torch."),
        ]
        return [word for word in words if word]

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def num_states(self) -> int:
        """First size of h_n: a state per layer and direction."""
        return self.L * self.directions

    @property
    def R(self) -> int:
        """Width of h."""
        return self.proj or self.H

    @property
    def has_c(self) -> bool:
        return self.cell == "LSTM"

    def normal(self, seed: int, *shape: int) -> Tensor:
        """Standard normal values that the call's dtype can hold exactly."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def layer(self, package: object, dtype: torch.dtype | None = None) -> torch.nn.RNNBase:
        """The layer out of `package` (torch.nn or one like it) as its constructor leaves it, of
        `dtype` instead of the call's where it is given."""
        name, _, nonlinearity = self.cell.partition("_")
        options: dict[str, Any] = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        options |= {"proj_size": self.proj} if self.proj else {}
        layer: torch.nn.RNNBase = getattr(package, name)(
            self.I,
            self.H,
            self.L,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            dtype=dtype or self.dtype,
            **options,
        )
        return layer

    def lengths(self) -> list[int]:
        """Steps of each batch row, in no order; at least one row has all T."""
        if not self.packed:
            return [self.T] * self.B
        generator = torch.Generator().manual_seed(7)
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
        lengths[self.B // 2] = self.T
        return lengths.tolist()

    def inputs(self) -> tuple[Tensor, list[Tensor]]:
        """A padded input, (T, B, I) or (B, T, I), and the initial states (none, h or h and c)."""
        x = self.normal(1, self.T, self.B, self.I)
        widths = ((self.R, self.H) if self.has_c else (self.R,)) if self.hx else ()
        rows = (self.num_states, self.B)
        states = [self.normal(2 + i, *rows, width) for i, width in enumerate(widths)]
        return (x.transpose(0, 1).contiguous() if self.batch_first else x), states

    def arguments(
        self, x: Tensor, states: list[Tensor]
    ) -> tuple[Tensor | PackedSequence, States | None]:
        """What the layer is called with: `inputs`, packed where the call is."""
        hx = None if not states else tuple(states) if self.has_c else states[0]
        if not self.packed:
            return x, hx
        lengths = self.lengths()
        return pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=self.SORTED), hx


def tensor_of(output: Tensor | PackedSequence) -> Tensor:
    """The tensor of an output or input, packed or not."""
    return output.data if isinstance(output, PackedSequence) else output
