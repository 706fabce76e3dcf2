"""Modules to freeze, what they take, and what they return as one list."""

from typing import Any

import torch
from torch import Tensor, nn
from twins import flat

import rnnkern

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
FORMATS = ("float32", "bfloat16", "int8")


class Model(nn.Module):
    """Layers, a cell, a layer that is used twice, and parameters that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 6)
        self.encoder = nn.LSTM(6, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.shared = rnnkern.GRU(12, 12)
        self.again = self.shared
        self.cell = nn.GRUCell(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.encoder(self.embedding(x))
        x, _ = self.shared(x)
        x, _ = self.again(x)
        return self.cell(x[:, 0])


def module(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(rnnkern, name)(*(args or (5, 6)), **kwargs)


def input_of(m: nn.Module, **kwargs: Any) -> Tensor:
    shape = (2, 5) if isinstance(m, nn.RNNCellBase) else (4, 2, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(**kwargs)


def run(m: nn.Module, *args: Any) -> list[Tensor]:
    with torch.inference_mode():
        return flat(m(*args))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
