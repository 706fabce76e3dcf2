"""The cells of `rnnkern.cells`: the layer, and what it is compared with, a loop of the cell's step.

W_ih x of all steps is one product ahead of the loop, as whoever writes such a loop has it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern import cells
from rnnkern.cells.shelf import OF_SUMS, SHELF
from rnnkern.ops.library import BY_MODE

# name: gates, and as SIGMOIDS in rows.py
CELLS = {
    "CIFG": (3, (4, 1)),
    "IndRNN": (1, (0, 0)),
    "LayerNormLSTM": (4, (5, 2)),
    "LiGRU": (2, (1, 0)),
    "MGU": (2, (2, 0)),
    "MinGRU": (2, (1, 0)),
    "MinLSTM": (3, (2, 0)),
    "PeepholeLSTM": (4, (5, 1)),
    "SLSTM": (4, (6, 0)),
    "SRU": (4, (2, 0)),
}
WITHOUT_W_HH = frozenset({"IndRNN", "MinGRU", "MinLSTM", "SRU"})


class StepLoop(torch.nn.Module):
    """A layer of a shelf cell in torch's operations, with the parameters of rnnkern's layer."""

    def __init__(
        self, name: str, input_size: int, hidden_size: int, num_layers: int, **options: Any
    ) -> None:
        super().__init__()
        if num_layers > 1 or options.get("batch_first") or options.get("bidirectional"):
            raise ValueError("the loop is for one layer in one direction, time-major")
        layer = getattr(cells, name)(input_size, hidden_size, **options)
        for key, parameter in layer.named_parameters():
            self.register_parameter(key, parameter)
        self.step = SHELF[name].step
        self.hidden_size = hidden_size
        self.num_states = len(BY_MODE[layer.mode].states)

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, Any]:
        weights: dict[str, Tensor] = dict(self.named_parameters())
        w_hh, b_hh = weights.get("weight_hh_l0"), weights.get("bias_hh_l0")
        if w_hh is not None:
            w_hh = w_hh.flatten(0, -2)  # in heads it has one head here
        learned = weights.get("params_l0", ())
        states = (x.new_zeros(x.shape[1], self.hidden_size),) * self.num_states
        outputs = []
        for of_x in linear(x, weights["weight_ih_l0"], weights["bias_ih_l0"]):
            of_h = [] if w_hh is None else [linear(states[0], w_hh, b_hh)]
            states = self.step(of_x, *of_h, *states, *learned)
            outputs.append(states[0])
        finals = tuple(s[None] for s in states)
        return torch.stack(outputs), finals if len(finals) > 1 else finals[0]


class NormLoop(torch.nn.Module):
    """The same of LayerNormLSTM, whose sums are normalised ahead of the loop."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, **options: Any) -> None:
        super().__init__()
        if num_layers > 1 or options.get("batch_first") or options.get("bidirectional"):
            raise ValueError("the loop is for one layer in one direction, time-major")
        module = cells.LayerNormLSTM(input_size, hidden_size, **options)
        self.layer: Any = module.layers[0]
        self.hidden_size = hidden_size
        self.step = OF_SUMS["LayerNormLSTMOfSums"].step

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, Any]:
        w_hh, params = self.layer.recurrence.weight_hh_l0, self.layer.recurrence.params_l0.unbind()
        states: tuple[Tensor, ...] = (x.new_zeros(x.shape[1], self.hidden_size),) * 2
        outputs = []
        for of_x in self.layer._sums(x):
            states = self.step(of_x, linear(states[0], w_hh), *states, *params)
            outputs.append(states[0])
        return torch.stack(outputs), tuple(s[None] for s in states)


def _loop(name: str, *args: Any, **options: Any) -> torch.nn.Module:
    return (
        NormLoop(*args, **options) if name == "LayerNormLSTM" else StepLoop(name, *args, **options)
    )


class _Loops:
    """A package of loops: `loops.CIFG` makes one."""

    def __getattr__(self, name: str) -> Any:
        return partial(_loop, name)


class _CompiledLoops:
    """The same under torch.compile."""

    def __getattr__(self, name: str) -> Any:
        def make(*args: Any, **options: Any) -> torch.nn.Module:
            loop = _loop(name, *args, **options)
            loop.compile(fullgraph=True)
            return loop

        return make


LOOPS, COMPILED = _Loops(), _CompiledLoops()


def layers_of(package: Any) -> Any:
    """What has the cells' layers: rnnkern's own, or loops for a package without cells."""
    if isinstance(package, (_Loops, _CompiledLoops)):
        return package
    return getattr(package, "cells", LOOPS)
