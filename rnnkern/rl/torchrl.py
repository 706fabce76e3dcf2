"""TorchRL's recurrent modules, with resets of the layer for trajectories that end inside a row."""

from typing import Any

import torch
from torch import Tensor
from torchrl import modules

__all__ = ["GRUModule", "LSTMModule"]


class _Resets:
    """What replaces splitting rows into trajectories, padding, packing and their reverse."""

    @property
    def recurrent_backend(self) -> str:
        """TorchRL's name for the one backend that hands the mask on."""
        return "triton"

    @recurrent_backend.setter
    def recurrent_backend(self, _: str) -> None:
        pass


def _run(layer: Any, input: Tensor, states: list[Tensor], is_init: Tensor) -> list[Tensor]:
    """Output (B, T, H), and the states at the trajectories' ends, (B, T, L·D, H), else zero.

    states   h, or h and c: (B, T, L·D, H), of which the layer takes those at trajectories' starts
    is_init  (B, T)
    """
    stored = [s.movedim(2, 0) for s in states]
    first = [s[:, :, 0].contiguous() for s in stored]
    pair = len(states) > 1
    output, _, ends = layer(
        input,
        tuple(first) if pair else first[0],
        resets=is_init,
        reset_state=tuple(stored) if pair else stored[0],
        return_ends=True,
    )
    at_ends = [
        torch.zeros_like(s).index_put((ends.row, ends.step), end.transpose(0, 1))
        for s, end in zip(states, ends.state if pair else (ends.state,), strict=True)
    ]
    return [output, *at_ends]


class LSTMModule(_Resets, modules.LSTMModule):
    """torchrl.modules.LSTMModule on a layer of rnnkern's."""

    def _lstm_triton_with_resets(
        self, input: Tensor, hidden0_in: Tensor, hidden1_in: Tensor, is_init: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_run(self.lstm, input, [hidden0_in, hidden1_in], is_init))


class GRUModule(_Resets, modules.GRUModule):
    """torchrl.modules.GRUModule on a layer of rnnkern's."""

    def _gru_triton_with_resets(
        self, input: Tensor, hidden_in: Tensor, is_init: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_run(self.gru, input, [hidden_in], is_init))


#: The name of a module's layer, TorchRL's class, and ours.
MODULES = (("lstm", modules.LSTMModule, LSTMModule), ("gru", modules.GRUModule, GRUModule))
