"""The rows of the benchmark: which layer is called, how, and in which shape.

T time steps, B batch rows, I input features, H hidden units, L layers. The group targets are the
project's own: the geometric mean over a group of torch.nn's time divided by ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

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
    "bf16": (1.5, "bfloat16"),
    "rounded": (1.0, "float32, torch set to round factors to bfloat16"),
    "clients": (1.0, "layer calls of well-known packages"),
}


@dataclass(frozen=True)
class Row:
    """One layer call. `train` is a forward and a backward pass, otherwise the call is inference."""

    group: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    L: int = 1
    train: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    packed: bool = False
    hx: bool = False
    input_requires_grad: bool = True
    loss_on: Literal["output", "h_n"] = "output"
    proj: int = 0
    dtype: torch.dtype = torch.float32
    rounded: bool = False  # torch's settings let float32 products round their factors to bfloat16
    note: str = ""

    def __str__(self) -> str:
        shape = f"{self.cell} T{self.T} B{self.B} I{self.I} H{self.H}"
        extras = [
            f"L{self.L}" if self.L > 1 else "",
            f"proj{self.proj}" if self.proj else "",
            "bi" if self.bidirectional else "",
            "packed" if self.packed else "",
            "hx" if self.hx else "",
            "" if self.dtype is torch.float32 else str(self.dtype).removeprefix("torch."),
            "rounded" if self.rounded else "",
        ]
        return " ".join([shape, *filter(None, extras)])

    @property
    def precision(self) -> torch.dtype:
        """The least precise dtype in its products."""
        return torch.bfloat16 if self.rounded else self.dtype

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

    @property
    def states(self) -> int:
        """First size of h_n."""
        return self.L * (1 + self.bidirectional)

    def lengths(self) -> list[int]:
        """Steps of every batch row; a ragged batch is about 62% full."""
        if not self.packed:
            return [self.T] * self.B
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(self.T // 4, self.T + 1, (self.B,), generator=generator)
        lengths[0] = self.T
        return sorted(lengths.tolist(), reverse=True)

    def flops(self) -> float:
        """Multiplications and additions of the matrix products; a training step does three times
        those of the forward pass (less dX where the input needs no gradient)."""
        directions, gates = 1 + self.bidirectional, GATES[self.cell]
        out = self.proj or self.H
        total = 0.0
        for layer in range(self.L):
            features = self.I if layer == 0 else directions * out
            needs_dx = layer > 0 or self.input_requires_grad
            into, back = gates * self.H * features, gates * self.H * out + self.proj * self.H
            per_step = into * (2 + needs_dx) + 3 * back if self.train else into + back
            total += 2.0 * directions * per_step
        return total * sum(self.lengths())

    def sigmoids(self) -> float:
        """How often sigmoid or tanh is computed."""
        forward, backward = SIGMOIDS[self.cell]
        each = forward + backward * self.train
        return float(each) * self.L * (1 + self.bidirectional) * self.H * sum(self.lengths())

    def recurrent_bytes(self) -> float:
        """Bytes of recurrent weights that a forward pass must read, every step all of them."""
        size = torch.finfo(self.dtype).bits // 8
        weights = GATES[self.cell] * self.H * (self.proj or self.H) * size
        return float(weights) * self.T * self.L * (1 + self.bidirectional)

    def module(self, package: object) -> torch.nn.RNNBase:
        """The layer out of `package` (torch.nn or one like it), from a fixed seed."""
        torch.manual_seed(0)
        extra = {"proj_size": self.proj} if self.proj else {}
        layer = getattr(package, self.cell)(
            self.I,
            self.H,
            self.L,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            **extra,
        )
        ready: torch.nn.RNNBase = layer.to(self.dtype).train(self.train)
        return ready

    def inputs(self) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor] | None]:
        """Input and initial state, from a fixed seed."""
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        x = normal(self.T, self.B, self.I)
        x = x.transpose(0, 1).contiguous() if self.batch_first else x
        hx = None
        if self.hx:
            h = normal(self.states, self.B, self.proj or self.H)
            hx = (h, normal(self.states, self.B, self.H)) if self.cell == "LSTM" else h
        if self.packed:
            return pack_padded_sequence(x, self.lengths(), batch_first=self.batch_first), hx
        return x, hx

    def gradient(self) -> Tensor:
        """The loss's gradient with respect to what it reads, from a fixed seed."""
        if self.loss_on == "h_n":
            shape = [self.states, self.B]
        elif self.packed:
            shape = [sum(self.lengths())]
        else:
            shape = [self.B, self.T] if self.batch_first else [self.T, self.B]
        features = (self.proj or self.H) * (1 if self.loss_on == "h_n" else 1 + self.bidirectional)
        generator = torch.Generator().manual_seed(2)
        return torch.randn(*shape, features, generator=generator).to(self.dtype)


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def both(row: Row) -> Iterator[Row]:
    """The call in inference and in training."""
    yield replace(row, train=False)
    yield replace(row, train=True)


def rows() -> list[Row]:
    """All rows, in the order of the table."""
    groups = (_course, _tiny, _small, _large, _streaming, _packed, _bf16, _rounded)
    return [*(row for group in groups for row in group()), *CLIENTS]


def _course() -> Iterator[Row]:
    """The three trainings of the course day, as its own code runs them. An embedding before the
    layer is trained with it, so the layer's input needs a gradient."""
    yield Row(
        "course", "RNN", 10, 1, 32, 32, train=True, batch_first=True, hx=True,
        note="characters: one sequence, trained embedding, hx given",
    )  # fmt: skip
    yield Row(
        "course", "LSTM", 50, 1000, 1, 32, 2, train=True, batch_first=True,
        input_requires_grad=False, note="sine waves: all 1000 in one batch, no embedding",
    )  # fmt: skip
    yield Row(
        "course", "LSTM", 10, 500, 16, 32, train=True, batch_first=True, loss_on="h_n",
        note="sentiment: padded to 10, not packed, trained embedding, loss of h_n",
    )  # fmt: skip


def _tiny() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row("tiny", cell, 10, 1, 8, 16))
        yield from both(Row("tiny", cell, 16, 4, 32, 32))
        yield from both(Row("tiny", cell, 32, 8, 64, 64))
    yield from both(Row("tiny", "LSTM", 10, 4, 16, 32, 2, bidirectional=True))


def _small() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row("small", cell, 50, 16, 100, 100))
        yield from both(Row("small", cell, 50, 32, 128, 128, batch_first=True))
        yield from both(Row("small", cell, 40, 32, 200, 200, 2))
    yield from both(Row("small", "LSTM", 40, 32, 128, 128, bidirectional=True))
    yield from both(Row("small", "GRU", 40, 20, 100, 150, 3))


def _large() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row("large", cell, 64, 32, 512, 512))
        yield from both(Row("large", cell, 16, 64, 1024, 1024))


def _streaming() -> Iterator[Row]:
    for cell in GATES:
        for hidden in (64, 128, 256, 512):
            yield Row("streaming", cell, 1, 1, hidden, hidden, hx=True)
        yield from both(Row("streaming", cell, 256, 1, 128, 128))
        yield from both(Row("streaming", cell, 128, 1, 512, 512))
    yield Row("streaming", "LSTM", 256, 1, 128, 128, 2, bidirectional=True)


def _packed() -> Iterator[Row]:
    for cell in GATES:
        yield Row("packed", cell, 64, 32, 128, 128, packed=True, train=True)
    yield Row("packed", "LSTM", 40, 16, 200, 200, 2, True, bidirectional=True, packed=True)
    yield Row("packed", "LSTM", 96, 16, 256, 256, packed=True, train=True)


def _bf16() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row("bf16", cell, 50, 32, 128, 128, dtype=torch.bfloat16))
        yield from both(Row("bf16", cell, 32, 32, 512, 512, dtype=torch.bfloat16))


def _rounded() -> Iterator[Row]:
    for cell in GATES:
        yield from both(Row("rounded", cell, 50, 32, 128, 128, rounded=True))
        yield from both(Row("rounded", cell, 64, 32, 512, 512, rounded=True))


def _client(note: str, cell: str, T: int, B: int, I: int, H: int, L: int = 1, **call: Any) -> Row:
    return Row("clients", cell, T, B, I, H, L, note=note, **call)


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
