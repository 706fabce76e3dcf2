"""Layers and cells with dropout on h before the recurrent product, the same in all steps:
csrc/cells/variational_dropout.h."""

from typing import Any

from .added import BASES, AddedCellModule, AddedLayer
from .recurrent_dropout import Dropped


class VariationalDropoutLayer(Dropped, AddedLayer):
    """A stack of layers with variational dropout: torch.nn.LSTM's arguments without proj_size.

    recurrent_dropout  how often a unit of h is dropped before W_hh multiplies it in training: one
                       mask for all steps of a row, drawn anew in each call, for each layer and
                       direction; `dropout` is that between layers
    num_heads          as the layer without it has it

    Parameters, hx and final states are those of the layer without it.
    """

    masks_per_row = True

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
        num_heads: int = 1,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype, num_heads,
        )  # fmt: skip
        self._set_rate(recurrent_dropout)


class VariationalDropoutCell(Dropped, AddedCellModule):
    """One step of it: torch.nn.LSTMCell's arguments, input and states, and recurrent_dropout.

    Each call draws a mask of its own.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        recurrent_dropout: float = 0.25,
        device: Any = None,
        dtype: Any = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, num_heads)
        self._set_rate(recurrent_dropout)


BASES["VariationalDropout"] = (VariationalDropoutLayer, VariationalDropoutCell)
