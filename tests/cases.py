"""The table of cases that drives the tests, and how a case is run and judged."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import rnnkern
from rnnkern.ops import library

# The benchmark's rows are such calls too. Scripts and pytest both find it this way.
sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from calls import LayerCall, tensor_of

CELLS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
#: Whether the instruction-set level computes in bfloat16; others convert to float32 and back.
HAS_BFLOAT16 = library.info()["isa"].endswith(("_bf16", "_amx"))
Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case(LayerCall):
    """One call of a layer, forward and backward."""

    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 6

    def __str__(self) -> str:
        flags = ["batch_first"] * self.batch_first + ["nobias"] * (not self.bias)
        return "-".join([*self.words(), *flags])

    def layer(self, package: object, dtype: torch.dtype | None = None) -> torch.nn.RNNBase:
        """The layer out of torch.nn or rnnkern, with the same weights for both: pre-activations are
        about 1, so that gates leave their linear range but do not saturate. `dtype` widens them."""
        layer = super().layer(package, dtype)
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(self.normal(100 + i, *p.shape) * 0.7 / math.sqrt(p[0].numel()))
        return layer


_BF16, _FP16 = torch.bfloat16, torch.float16
#: Sizes for which the CUDA engine keeps the recurrent weights on the chip: in clusters of one block
#: to sixteen, partly in shared memory, and with several clusters; in as many blocks of a grid.
PERSISTENT = [
    case
    for cell in CELLS
    for case in (
        Case(cell, T=9, B=5, I=6, H=20, bidirectional=True, hx=True, dtype=_BF16),
        Case(cell, T=6, B=19, H=128, dtype=_FP16),
        Case(cell, T=24, H=140, bidirectional=True, packed=True, batch_first=True, dtype=_FP16),
        Case(cell, T=12, B=9, H=200, hx=True, batch_first=True, dtype=_BF16),
        Case(cell, T=7, B=17, H=300, hx=True, bias=False, dtype=_FP16),
        Case(cell, T=6, H=530, dtype=_BF16),
        Case(cell, T=24, H=70, bidirectional=True, packed=True, hx=True),
        Case(cell, T=8, B=9, H=150, batch_first=True),
        Case(cell, T=6, H=300, hx=True),
    )
]
#: Those that a block holds alone, and some that no cluster does.
IN_A_BLOCK = [
    case
    for cell in CELLS
    for case in (
        Case(cell, T=9, B=5, I=6, H=20, bidirectional=True, hx=True, dtype=_BF16),
        Case(cell, T=6, B=19, H=128, dtype=_FP16),
        Case(cell, T=24, H=110, bidirectional=True, packed=True, batch_first=True, dtype=_BF16),
        Case(cell, T=24, B=11, H=64, bidirectional=True, packed=True, hx=True),
        Case(cell, T=8, B=9, H=50, batch_first=True, bias=False),
    )
]
BEYOND_CLUSTERS = [
    Case("LSTM", T=5, B=9, H=780, hx=True, dtype=_FP16),
    Case("GRU", T=4, B=3, H=520, bidirectional=True),
]


def call(
    case: Case, layer: torch.nn.RNNBase, x: Tensor, states: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Runs a layer; returns its output (data of the PackedSequence, if packed) and final states."""
    output, final = layer(*case.arguments(x, states))
    return tensor_of(output), list(final) if isinstance(final, tuple) else [final]


def results(case: Case, package: ModuleType, dtype: torch.dtype | None = None) -> Results:
    """Every output and gradient of a case by name, in float64. `dtype` widens the computation:
    the same weights and inputs, which the case's dtype holds exactly, computed in `dtype`."""
    dtype = dtype or case.dtype
    layer = case.layer(package, dtype)
    x, states = case.inputs()
    leaves = [t.to(dtype).requires_grad_() for t in (x, *states)]
    output, final = call(case, layer, leaves[0], leaves[1:])
    outputs = [output, *final]
    # Every result takes part in the loss, each with a weight of its own.
    loss = [case.normal(50 + i, *t.shape).to(dtype) for i, t in enumerate(outputs)]
    torch.autograd.backward(outputs, loss)
    named = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    named |= {f"{k}.grad": t.grad for k, t in zip(("input", "h_0", "c_0"), leaves, strict=False)}
    named |= {f"{k}.grad": p.grad for k, p in layer.named_parameters()}
    return {k: v.detach().double() for k, v in named.items()}


def rounding_allowance(case: Case, name: str, truth: Tensor) -> float:
    """The rounding error that we grant even where torch.nn happens to make less.

    Two units: the last function on the way may be off by 2 ulp, and as much again comes from the
    one before it. Summing K products in another order adds a random walk of K roundings, each half
    a unit of a partial sum: about √K / 4 units of the largest. A unit is eps times what the result
    would be if no gate were saturated: 1 for states, loss weight times input for gradients.
    Without fused multiply-add, which torch.nn uses at every level of ours, products round as well.
    """
    longest = max(case.I, 4 * case.H)
    if name.startswith(("weight", "bias")):
        longest = max(longest, case.T * case.B)
    if library.info()["isa"].startswith("baseline"):
        longest *= 2
    size = 1.0
    if name.endswith(".grad"):
        weights = (case.normal(50 + i, case.T * case.B * case.H) for i in range(3))
        size = max(w.abs().max().item() for w in weights) * case.inputs()[0].abs().max().item()
    units = 2 + math.sqrt(longest) / 4
    return units * torch.finfo(case.dtype).eps * max(size, truth.abs().max().item())


@dataclass(frozen=True)
class Judged:
    """A case computed by us, by torch.nn in the same dtype, and by torch.nn in float64.

    For float64 there is no wider truth: `theirs` are then torch.nn's float32 results, whose error,
    scaled by the ratio of the two eps, says what torch errs in float64.
    """

    case: Case
    ours: Results
    theirs: Results
    truth: Results

    def errors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Errors of every result, ours and torch.nn's."""
        double = self.case.dtype is torch.float64
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if double else 1.0
        return {
            name: (self.ours[name] - exact, (self.theirs[name] - exact) * scale)
            for name, exact in self.truth.items()
        }

    def assert_as_good_as_torch(self) -> None:
        """Asserts that no result errs more than 1.5 times torch.nn's largest error,
        plus `rounding_allowance`; in float64, where both errors may add up, one more of each."""
        double = self.case.dtype is torch.float64
        assert list(self.ours) == list(self.truth)
        bad = []
        for name, (mine, other) in self.errors().items():
            worst, torchs = mine.abs().max().item(), other.abs().max().item()
            granted = rounding_allowance(self.case, name, self.truth[name])
            bound = (1.5 + double) * torchs + (1 + double) * granted
            if not worst <= bound:
                bad.append(f"{name}: error {worst:.2e}, torch.nn {torchs:.2e}, bound {bound:.2e}")
        assert not bad, "\n".join([str(self.case), *bad])


def judge(case: Case) -> Judged:
    """Runs a case on rnnkern and, on one thread, on torch.nn: its threads spin for each other, and
    a suite on a busy machine would spend its time there."""
    narrow = torch.float32 if case.dtype is torch.float64 else case.dtype
    ours = results(case, rnnkern)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    theirs = results(case, torch.nn, narrow)
    truth = results(case, torch.nn, torch.float64)
    torch.set_num_threads(threads)
    return Judged(case, ours, theirs, truth)


def check(case: Case) -> None:
    judge(case).assert_as_good_as_torch()


def _table() -> list[Case]:
    f64, bf16, f16 = torch.float64, torch.bfloat16, torch.float16
    table = []
    for cell in CELLS:
        table += [
            Case(cell),
            Case(cell, dtype=f64),
            Case(cell, T=1, B=1, I=1, H=1),
            Case(cell, T=1, B=1, I=64, H=128, hx=True),
            Case(cell, T=200, B=1, I=3, H=65),
            Case(cell, T=3, B=70, I=17, H=33, bias=False),
            Case(cell, T=12, B=33, I=24, H=100, batch_first=True),
            Case(cell, B=4, L=3, hx=True),
            Case(cell, T=7, B=5, bidirectional=True, hx=True),
            Case(cell, T=7, B=5, L=2, bidirectional=True, batch_first=True, bias=False),
            Case(cell, T=9, B=8, H=20, packed=True),
            Case(cell, T=9, B=8, H=20, packed=True, bidirectional=True, hx=True, L=2),
            Case(cell, T=9, B=6, packed=True, batch_first=True, dtype=f64),
            Case(cell, T=6, B=4, I=300, H=5),
            Case(cell, T=4, B=16, I=64, H=256),
            Case(cell, T=4, B=1, I=32, H=300, bidirectional=True),
            Case(cell, T=20, B=9, H=32, bidirectional=True, dtype=f64, hx=True),
            Case(cell, T=8, B=4, I=16, H=32, dtype=bf16, hx=True),
            Case(cell, T=8, B=4, I=16, H=32, dtype=bf16, packed=True, bidirectional=True),
            Case(cell, T=8, B=4, I=16, H=32, dtype=f16),
        ]
    table += [
        Case("LSTM", T=5, B=20, I=730, H=180),  # W_ih is packed past the caches
        Case("LSTM", proj=2),
        Case("LSTM", proj=2, dtype=f64, hx=True),
        Case("LSTM", T=1, B=1, I=1, H=2, proj=1),
        Case("LSTM", T=1, B=1, I=64, H=128, hx=True, proj=64),
        Case("LSTM", T=200, B=1, I=3, H=65, proj=17),
        Case("LSTM", T=3, B=70, I=17, H=33, bias=False, proj=32),
        Case("LSTM", T=12, B=33, I=24, H=100, batch_first=True, proj=20, hx=True),
        Case("LSTM", B=4, L=3, hx=True, proj=5),
        Case("LSTM", T=7, B=5, L=2, bidirectional=True, batch_first=True, bias=False, proj=3),
        Case("LSTM", T=9, B=8, H=20, packed=True, proj=18),
        Case("LSTM", T=9, B=8, H=20, packed=True, bidirectional=True, hx=True, L=2, proj=7),
        Case("LSTM", T=9, B=6, packed=True, batch_first=True, dtype=f64, proj=1),
        Case("LSTM", T=4, B=16, I=64, H=256, proj=128, bidirectional=True),
        Case("LSTM", T=4, B=1, I=32, H=300, bidirectional=True, proj=70),
        Case("LSTM", T=8, B=4, I=16, H=32, dtype=bf16, packed=True, bidirectional=True, proj=16),
        Case("LSTM", T=8, B=4, I=16, H=32, dtype=f16, hx=True, proj=16),
    ]
    return table


TABLE = _table()
