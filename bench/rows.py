"""The rows of the benchmark: calls of a layer in inference and in training, by group.

The group targets are the project's own: the geometric mean over a group of torch.nn's time divided
by ours. In the group `cells` a loop of the cell's step takes torch.nn's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import own_cells
import torch
from calls import LayerCall
from torch import Tensor

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# sigmoid and tanh of a unit in a step, forward and backward (where LSTM computes tanh(c) again)
SIGMOIDS = {"LSTM": (5, 1), "GRU": (3, 0), "RNN": (1, 0)}

# group: (target, what is in it)
TARGETS = {
    "course": (5.0, "the course's own tasks, training"),
    "tiny": (6.0, "B ≤ 8, H ≤ 64"),
    "small": (2.0, "B 16–32, H about 100–200"),
    "large": (1.6, "H ≥ 512, all cells"),
    "large LSTM infer": (1.05, "torch.nn runs oneDNN near the peak there"),
    "large LSTM train": (1.25, "torch.nn runs oneDNN near the peak there"),
    "large GRU, RNN": (2.5, ""),
    "streaming": (2.5, "B = 1: single steps and long sequences"),
    "packed": (2.0, "ragged batches, training"),
    "ragged": (2.0, "ragged batches, each after the padded one of its shape"),
    "bf16": (1.5, "bfloat16"),
    "rounded": (1.0, "float32, torch set to round factors to bfloat16"),
    "clients": (1.0, "layer calls of well-known packages"),
    "resets": (3.0, "episodes end inside: our mask, a loop of single steps over torch.nn"),
    "cells": (6.0, "cells of the shelf, training: a loop of the step in torch's operations"),
}


@dataclass(frozen=True)
class Row(LayerCall):
    """One layer call. `train` is a forward and a backward pass, otherwise the call is inference."""

    train: bool = False
    input_requires_grad: bool = True
    loss_on: Literal["output", "h_n"] = "output"
    resets: int = 0  # how often a row is reset after its first step
    rounded: bool = False  # torch's settings let float32 products round their factors to bfloat16
    group: str = ""
    note: str = ""

    SORTED = True

    def __str__(self) -> str:
        words = [f"resets{self.resets}"] if self.resets else []
        return " ".join([*self.words(), *words, *(["rounded"] if self.rounded else [])])

    @property
    def precision(self) -> torch.dtype:
        """The least precise dtype in its products."""
        return torch.bfloat16 if self.rounded else self.dtype

    @property
    def gates(self) -> int:
        return GATES[self.cell] if self.cell in GATES else own_cells.CELLS[self.cell][0]

    @property
    def recurrent_gates(self) -> int:
        return 0 if self.cell in own_cells.WITHOUT_W_HH else self.gates

    @property
    def mode(self) -> str:
        return "train" if self.train else "infer"

    def settings(self) -> AbstractContextManager[None]:
        """torch's settings for this row."""
        return torch.backends.flags(fp32_precision="bf16" if self.rounded else "none")

    @property
    def subgroups(self) -> list[str]:
        """The groups whose mean this row enters."""
        if self.group != "large":
            return [self.group]
        return ["large", f"large LSTM {self.mode}" if self.cell == "LSTM" else "large GRU, RNN"]

    def lengths(self) -> list[int]:
        """Steps of each batch row, in decreasing order; a ragged batch is about 62% full."""
        if not self.packed:
            return [self.T] * self.B
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(self.T // 4, self.T + 1, (self.B,), generator=generator)
        lengths[0] = self.T
        return sorted(lengths.tolist(), reverse=True)

    def mask(self) -> Tensor:
        """Where rows are reset, (T, B), never at the first step."""
        generator = torch.Generator().manual_seed(5)
        mask = torch.zeros(self.T * self.B, dtype=torch.bool)
        later = torch.randperm((self.T - 1) * self.B, generator=generator)
        mask[self.B + later[: self.resets]] = True
        return mask.view(self.T, self.B)

    def flops(self) -> float:
        """Multiplications and additions of the matrix products; a training step does three times
        those of the forward pass (less dX where the input needs no gradient)."""
        gates, recurrent = self.gates, self.recurrent_gates
        total = 0.0
        for layer in range(self.L):
            features = self.I if layer == 0 else self.directions * self.R
            needs_dx = layer > 0 or self.input_requires_grad
            into, back = gates * self.H * features, recurrent * self.H * self.R + self.proj * self.H
            per_step = into * (2 + needs_dx) + 3 * back if self.train else into + back
            total += 2.0 * self.directions * per_step
        return total * sum(self.lengths())

    def sigmoids(self) -> float:
        """How often sigmoid or tanh is computed."""
        forward, backward = SIGMOIDS.get(self.cell) or own_cells.CELLS[self.cell][1]
        each = forward + backward * self.train
        return float(each) * self.num_states * self.H * sum(self.lengths())

    def recurrent_bytes(self) -> float:
        """Bytes of recurrent weights that a forward pass must read, every step all of them."""
        size = torch.finfo(self.dtype).bits // 8
        weights = self.recurrent_gates * self.H * self.R * size
        return float(weights) * self.T * self.num_states

    def layer(self, package: object, dtype: torch.dtype | None = None) -> torch.nn.RNNBase:
        """The layer out of `package` (torch.nn or one like it), from a fixed seed."""
        torch.manual_seed(0)
        found = own_cells.layers_of(package) if self.group == "cells" else package
        return super().layer(found, dtype).train(self.train)

    def gradient(self) -> Tensor:
        """The loss's gradient with respect to what it reads, from a fixed seed."""
        if self.loss_on == "h_n":
            return self.normal(4, self.num_states, self.B, self.R)
        padded = (self.B, self.T) if self.batch_first else (self.T, self.B)
        steps = (sum(self.lengths()),) if self.packed else padded
        return self.normal(4, *steps, self.directions * self.R)


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def both(row: Row) -> Iterator[Row]:
    """The call in inference and in training."""
    yield replace(row, train=False)
    yield replace(row, train=True)


def rows() -> list[Row]:
    """All rows, in the order of the table."""
    groups = {
        "course": _course(), "tiny": _tiny(), "small": _small(), "large": _large(),
        "streaming": _streaming(), "packed": _packed(), "ragged": _ragged(), "bf16": _bf16(),
        "rounded": _rounded(), "clients": CLIENTS, "resets": RESETS, "cells": _cells(),
    }  # fmt: skip
    return [replace(row, group=group) for group, members in groups.items() for row in members]


def _course() -> Iterator[Row]:
    """The three trainings of the course day, as its own code runs them. An embedding before the
    layer is trained with it, so the layer's input needs a gradient."""
    yield Row(
        "RNN", 10, 1, 32, 32, train=True, batch_first=True, hx=True,
        note="characters: one sequence, trained embedding, hx given",
    )  # fmt: skip
    yield Row(
        "LSTM", 50, 1000, 1, 32, 2, train=True, batch_first=True,
        input_requires_grad=False, note="sine waves: all 1000 in one batch, no embedding",
    )  # fmt: skip
    yield Row(
        "LSTM", 10, 500, 16, 32, train=True, batch_first=True, loss_on="h_n",
        note="sentiment: padded to 10, not packed, trained embedding, loss of h_n",
    )  # fmt: skip


def _tiny() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row(cell, 10, 1, 8, 16))
        yield from both(Row(cell, 16, 4, 32, 32))
        yield from both(Row(cell, 32, 8, 64, 64))
    yield from both(Row("LSTM", 10, 4, 16, 32, 2, bidirectional=True))


def _small() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row(cell, 50, 16, 100, 100))
        yield from both(Row(cell, 50, 32, 128, 128, batch_first=True))
        yield from both(Row(cell, 40, 32, 200, 200, 2))
    yield from both(Row("LSTM", 40, 32, 128, 128, bidirectional=True))
    yield from both(Row("GRU", 40, 20, 100, 150, 3))


def _large() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row(cell, 64, 32, 512, 512))
        yield from both(Row(cell, 16, 64, 1024, 1024))


def _streaming() -> Iterator[Row]:
    for cell in GATES:
        for hidden in (64, 128, 256, 512):
            yield Row(cell, 1, 1, hidden, hidden, hx=True)
        yield from both(Row(cell, 256, 1, 128, 128))
        yield from both(Row(cell, 128, 1, 512, 512))
    yield Row("LSTM", 256, 1, 128, 128, 2, bidirectional=True)


def _packed() -> Iterator[Row]:
    for cell in GATES:
        yield Row(cell, 64, 32, 128, 128, packed=True, train=True)
    yield Row("LSTM", 40, 16, 200, 200, 2, bidirectional=True, packed=True, train=True)
    yield Row("LSTM", 96, 16, 256, 256, packed=True, train=True)


def _ragged() -> Iterator[Row]:
    """Pairs of rows: a ragged batch should cost the share of the padded one that it fills."""
    for cell, T, B, H in (
        ("LSTM", 100, 32, 128),
        ("GRU", 100, 32, 128),
        ("LSTM", 128, 16, 256),
        ("LSTM", 100, 8, 128),
    ):
        for train in (False, True):
            for packed in (False, True):
                yield Row(cell, T, B, H, H, packed=packed, train=train)


def _bf16() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row(cell, 50, 32, 128, 128, dtype=torch.bfloat16))
        yield from both(Row(cell, 32, 32, 512, 512, dtype=torch.bfloat16))


def _rounded() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row(cell, 50, 32, 128, 128, rounded=True))
        yield from both(Row(cell, 64, 32, 512, 512, rounded=True))


def _cells() -> Iterator[Row]:
    for cell in own_cells.CELLS:
        for B, H in ((1, 64), (4, 64), (32, 128)):
            yield Row(cell, 50, B, H, H, train=True, note="beside the loop of its step")


def _client(note: str, cell: str, T: int, B: int, I: int, H: int, L: int = 1, **call: Any) -> Row:
    return Row(cell, T, B, I, H, L, note=note, **call)


_BI = {"bidirectional": True}
_DATA = {"input_requires_grad": False}
_BI_PACKED = {"bidirectional": True, "packed": True, "train": True}
CLIENTS = [
    _client("speechbrain language model", "LSTM", 1, 16, 128, 2048, 2, hx=True),
    _client("speechbrain packed", "LSTM", 200, 16, 80, 128, 2, **_BI_PACKED, **_DATA),
    _client("stanza characters", "LSTM", 149, 16, 100, 512, hx=True),
    _client("stanza tokenizer", "LSTM", 100, 32, 37, 64, **_BI_PACKED),
    _client("stanza tagger", "LSTM", 40, 48, 200, 200, 2, **_BI_PACKED, hx=True),
    _client("flair characters", "LSTM", 81, 8, 100, 512),
    _client("flair tagger", "LSTM", 40, 16, 300, 256, **_BI_PACKED),
    _client("docTR SAR decoder", "LSTM", 40, 4, 512, 512, 2),
    _client("neuralforecast LSTM", "LSTM", 24, 128, 1, 200, 2, train=True, **_DATA),
    _client("neuralforecast GRU", "GRU", 24, 128, 1, 200, 2, train=True, **_DATA),
    _client("neuralforecast projected", "LSTM", 25, 128, 1, 128, 2, train=True, **_DATA, proj=1),
    _client("WaveRNN training", "GRU", 500, 4, 512, 512, train=True),
    _client("WaveRNN generation", "GRU", 1, 1, 544, 512, hx=True),
    _client("TorchRL with resets", "LSTM", 61, 32, 64, 128, packed=True, train=True),
    _client("TorchRL rollout", "LSTM", 1, 1, 64, 128, hx=True),
    _client("speechbrain voice activity", "GRU", 400, 1, 64, 32, 2, **_BI),
    _client("pyannote segmentation", "LSTM", 293, 1, 60, 128, 4, **_BI),
    _client("kokoro prosody", "LSTM", 180, 8, 640, 256, **_BI, train=True),
    _client("AWD-LSTM training", "LSTM", 40, 16, 400, 1152, train=True),
    _client("AWD-LSTM generation", "LSTM", 1, 1, 1152, 1152, hx=True),
    _client("RecurrentPPO rollout", "LSTM", 1, 8, 4, 256, hx=True),
    _client("RecurrentPPO learning", "LSTM", 128, 4, 4, 256, train=True, **_DATA, hx=True),
    _client("icefall streaming", "LSTM", 3, 1, 512, 1024, hx=True, proj=512),
    _client("Open-Unmix separation", "LSTM", 862, 1, 512, 256, 3, **_BI),
    _client("Open-Unmix training", "LSTM", 255, 4, 512, 256, 3, **_BI, train=True),
    _client("darts float64", "LSTM", 36, 32, 1, 25, 2, train=True, **_DATA, dtype=torch.float64),
    _client("DeepAR", "LSTM", 29, 64, 10, 30, 2, packed=True, train=True),
    _client("skorch digits", "GRU", 8, 64, 8, 64, train=True, **_DATA),
    _client("Demucs", "LSTM", 21, 1, 1024, 1024, 2, **_BI, train=True),
]


def _resets(note: str, cell: str, T: int, B: int, I: int, H: int, resets: int) -> Row:
    return Row(cell, T, B, I, H, train=True, hx=True, resets=resets, note=note)


RESETS = [
    _resets("CleanRL", "LSTM", 128, 2, 512, 128, 2),
    _resets("sb3-contrib", "LSTM", 32, 8, 64, 256, 9),
    _resets("TorchRL", "LSTM", 50, 16, 64, 128, 29),
    _resets("CartPole", "LSTM", 128, 8, 64, 64, 55),
    _resets("many short episodes", "LSTM", 128, 32, 128, 128, 396),
    _resets("Sample Factory", "GRU", 32, 64, 512, 512, 37),
    _resets("one environment", "LSTM", 2048, 1, 64, 256, 7),
]
