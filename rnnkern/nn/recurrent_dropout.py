"""LSTM with dropout on what a step adds to c: cells/headers/recurrent_dropout_lstm.h."""

from typing import Any

import torch
from torch import Tensor

from .added import BASES, AddedCellModule, AddedLayer


def checked_rate(rate: float) -> float:
    """How often a value is dropped; ValueError outside of [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"recurrent_dropout must be at least 0 and below 1, got {rate}")
    return float(rate)


class Dropped:
    """The rate, and the masks that follow from it."""

    recurrent_dropout: float
    training: bool

    def _set_rate(self, rate: float) -> None:
        self.recurrent_dropout = checked_rate(rate)

    def masks(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """0 for what is dropped, 1 / (1 - rate) for the rest; in evaluation 1."""
        ones = like.new_ones(shape[-2:])
        if not (self.training and self.recurrent_dropout):
            return ones
        return torch.dropout(ones.expand(shape), self.recurrent_dropout, True)

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[misc]
        return f"{own}, recurrent_dropout={self.recurrent_dropout}"


class RecurrentDropoutLayer(Dropped, AddedLayer):
    """A stack of LSTM layers with recurrent dropout: torch.nn.LSTM's arguments without proj_size.

    recurrent_dropout  how often what a step adds to a unit's c is dropped in training, drawn anew
                       for each unit, row and step; `dropout` is that between layers

    Parameters, hx and final states are those of torch.nn.LSTM.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        recurrent_dropout: float = 0.25,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype,
        )  # fmt: skip
        self._set_rate(recurrent_dropout)


class RecurrentDropoutCell(Dropped, AddedCellModule):
    """One step of it: torch.nn.LSTMCell's arguments, input and states, and recurrent_dropout."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        recurrent_dropout: float = 0.25,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._set_rate(recurrent_dropout)


BASES["RecurrentDropoutLSTM"] = (RecurrentDropoutLayer, RecurrentDropoutCell)
