"""Layers and cells with zoneout around the cell: csrc/cells/zoneout.h has the equations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.library import BY_MODE
from .added import BASES, AddedCellModule, AddedLayer


class _Rates:
    """The rate of each state, and the masks that follow from them."""

    zoneout: tuple[float, ...]
    training: bool

    def _set_rates(self, mode: str, zoneout: float | Sequence[float]) -> None:
        names = BY_MODE[mode].masks
        rates = (zoneout,) * len(names) if isinstance(zoneout, (int, float)) else tuple(zoneout)
        if len(rates) != len(names):
            raise ValueError(
                f"zoneout must be a number or one for each of {', '.join(names)}, got {zoneout}"
            )
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"zoneout must be between 0 and 1, got {zoneout}")
        self.zoneout = tuple(map(float, rates))

    def masks(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """1 where a unit keeps its state; in evaluation how often it does."""
        rates = like.new_tensor(self.zoneout)[:, None].repeat(1, shape[-1])
        if not self.training:
            return rates
        return (torch.rand(shape, dtype=like.dtype, device=like.device) < rates).to(like.dtype)

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[misc]
        return f"{own}, zoneout={self.zoneout}"


class ZoneoutLayer(_Rates, AddedLayer):
    """A stack of layers with zoneout: torch.nn.LSTM's arguments without proj_size, and zoneout.

    zoneout    the rate of all states, or of each in the order of the cell's names
    num_heads  as the layer without zoneout has it

    Parameters, hx and final states are those of the layer without zoneout.
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
        zoneout: float | Sequence[float] = 0.1,
        device: Any = None,
        dtype: Any = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device, dtype, num_heads,
        )  # fmt: skip
        self._set_rates(self.own.mode, zoneout)


class ZoneoutCell(_Rates, AddedCellModule):
    """One step with zoneout: torch.nn.LSTMCell's arguments, input and states, and zoneout."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        zoneout: float | Sequence[float] = 0.1,
        device: Any = None,
        dtype: Any = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, num_heads)
        self._set_rates(self.own.mode, zoneout)


BASES["Zoneout"] = (ZoneoutLayer, ZoneoutCell)
