"""How ReLU networks in half precision are judged.

A unit whose sum is nearer to zero than its rounding error is on or off at random, in torch.nn as
here, and one such unit changes a gradient by more than any tolerance. So a result is measured
against float64 with its own units on, and those that are on in no other must be near zero.
"""

from collections.abc import Iterator

import pytest
import torch
from cases import Case, Judged, Results, results, rounding_allowance
from cases import judge as judge_others
from torch import Tensor

import rnnkern
from rnnkern.backend import Backend
from rnnkern.ops import decomposition


class Differentiable:
    """rnnkern's layers on their path of torch's own operations."""

    def __getattr__(self, name: str) -> object:
        def make(*args: object, **options: object) -> torch.nn.RNNBase:
            layer = getattr(rnnkern, name)(*args, **options)
            layer.select_backend = lambda *_: Backend("decomposition", "a test asks for it")
            return layer

        return make


def units_on(case: Case, output: Tensor) -> Iterator[Tensor]:
    """Which units are on at each step, in the order in which a layer takes them."""
    sizes = [sum(length > t for length in case.lengths()) for t in range(case.T)]
    steps = output.split(sizes) if case.packed else output.unbind(int(case.batch_first))
    for direction in range(case.directions):
        for step in steps[:: -1 if direction else 1]:
            yield step.chunk(case.directions, -1)[direction] > 0


def truth_with_units_of(case: Case, found: Results) -> Results:
    """The case in float64 with the units on that are on in `found`."""
    on = units_on(case, found["output"])
    flipped = [torch.zeros(1)]

    def step(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
        mine = next(on)
        flipped.append((x + y).detach()[mine != (x + y > 0)])
        return ((x + y) * mine,)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decomposition._STEPS, "RNN_RELU", step)
        truth = results(case, Differentiable(), torch.float64)
    assert torch.cat(flipped).abs().max() <= rounding_allowance(case, "output", truth["output"])
    return truth


def judge_halves(case: Case, ours: Results, theirs: Results) -> Judged:
    """`theirs` is moved to where our units are on: its errors are those against its own."""
    truth, their_truth = (truth_with_units_of(case, found) for found in (ours, theirs))
    moved = {name: value - their_truth[name] + truth[name] for name, value in theirs.items()}
    return Judged(case, ours, moved, truth)


def judge(case: Case) -> Judged:
    """Runs a case on rnnkern and on torch.nn, whatever its cell and type."""
    if case.cell == "RNN_RELU" and case.dtype.itemsize == 2:
        return judge_halves(case, results(case, rnnkern), results(case, torch.nn))
    return judge_others(case)


def check(case: Case) -> None:
    judge(case).assert_as_good_as_torch()
