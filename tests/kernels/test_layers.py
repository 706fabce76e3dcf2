"""Layers against torch.nn: outputs, final states and every gradient, judged by float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
from cases import CELLS, TABLE, Case
from hypothesis import given
from judging import check, judge
from profiles import examples


@pytest.mark.every_level
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_accuracy(cell: str, dtype: torch.dtype) -> None:
    """Over all results of the table, the error is at most 1.5 times torch.nn's, with no floor: the
    geometric mean of the ratio of root mean square errors."""
    ratios = []
    for case in TABLE:
        if case.cell == cell and case.dtype is dtype:
            for mine, other in judge(case).errors().values():
                if other.any():
                    ratios.append((mine.square().mean() / other.square().mean()).sqrt().item())
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert mean <= 1.5, f"{mean:.2f} over {len(ratios)} results"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_threads(cell: str, threads: int) -> None:
    torch.set_num_threads(threads)
    check(Case(cell, T=11, B=13, I=20, H=48, bidirectional=True, hx=True))


@st.composite
def random_cases(draw: st.DrawFn, cells: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Case:
    size = st.integers(1, 8) | st.integers(1, 70)  # small ones as often: they are where tails are
    flag = st.booleans()
    cell, dtype, features = draw(st.sampled_from(cells)), draw(st.sampled_from(dtypes)), size
    if dtype is torch.bfloat16:  # even, and so many that no rounding alone is the largest error
        features = st.integers(4, 35).map(lambda n: 2 * n)
    hidden = draw(features)
    return Case(
        cell,
        T=draw(size),
        B=draw(size),
        I=draw(features),
        H=hidden,
        proj=draw(st.just(0) | st.integers(0, hidden - 1)) if cell == "LSTM" else 0,
        L=draw(st.integers(1, 3)),
        bidirectional=draw(flag),
        bias=draw(flag),
        batch_first=draw(flag),
        hx=draw(flag),
        packed=draw(flag),
        dtype=dtype,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@examples(150)
@given(random_cases(CELLS, (torch.float32, torch.float64)))
def test_random(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.bfloat16
@pytest.mark.timeout(300)
@examples(60)
# Without ReLU, whose units are on and off at random: judging.py.
@given(random_cases(CELLS[:3], (torch.bfloat16,)))
def test_random_bfloat16(case: Case) -> None:
    check(case)
