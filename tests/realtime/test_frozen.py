"""Frozen layers, cells and streams give the bits of the layer, whatever they are cut into."""

from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from cases import CELLS, HAS_BFLOAT16, TABLE, Case, call
from hypothesis import given
from profiles import examples
from torch import Tensor, nn
from twins import flat

import rnnkern

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
SIZES = (1, 5, 33, 65, 130, 300)


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def pair(case: Case, weights: str = "float32") -> tuple[nn.RNNBase, nn.RNNBase]:
    layer = case.layer(rnnkern)
    return layer, rnnkern.freeze(layer, weights)


@pytest.mark.every_level
@pytest.mark.parametrize("case", TABLE, ids=str)
@torch.inference_mode()
def test_table(case: Case) -> None:
    layer, frozen = pair(case)
    x, states = case.inputs()
    output, final = call(case, layer, x, states)
    found, found_final = call(case, frozen, x, states)
    assert equal([found, *found_final], [output, *final])


@pytest.mark.every_level
@pytest.mark.parametrize("I", SIZES)
@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_sizes(cell: str, H: int, I: int) -> None:
    layer, frozen = pair(Case(cell, I=I, H=H))
    stream = frozen.stream(batch_size=3)
    x = torch.randn(2, 3, I)
    expected, _ = layer(x)
    assert torch.equal(frozen(x)[0], expected)
    assert torch.equal(torch.stack([stream(step) for step in x]), expected)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Case, list[int]]:
    """A case for a stream, and the lengths of the chunks that its steps are cut into."""
    cell = draw(st.sampled_from(CELLS))
    H = draw(st.sampled_from(SIZES))
    chunks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    case = Case(
        cell,
        T=sum(chunks),
        B=draw(st.integers(1, 9)),
        I=draw(st.sampled_from(SIZES)),
        H=H,
        L=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        hx=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, F64))),
        proj=draw(st.integers(0, H - 1)) if cell == "LSTM" else 0,
    )
    return case, chunks


@pytest.mark.slow
@pytest.mark.every_level
@examples(60)
@given(cuts())
@torch.inference_mode()
def test_any_cut(cut: tuple[Case, list[int]]) -> None:
    """A layer in one call, a frozen one in chunks, a stream in chunks and single steps."""
    case, chunks = cut
    layer, frozen = pair(case)
    x, states = case.inputs()
    output, final = call(case, layer, x, states)
    hx = None if not states else tuple(states) if case.has_c else states[0]
    stream = frozen.stream(case.B)
    stream.state = hx
    in_chunks, in_stream = [], []
    for chunk in x.split(chunks):
        y, hx = frozen(chunk, hx)
        in_chunks.append(y)
        in_stream.append(stream(chunk) if len(chunk) > 1 else stream(chunk[0])[None])
    assert torch.equal(torch.cat(in_chunks), output)
    assert torch.equal(torch.cat(in_stream), output)
    assert equal(flat(hx), final)
    assert equal(flat(stream.state), final)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("H", [32, 33])  # the kernels take odd sizes in float32
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_streams_in_half_precision(cell: str, H: int, dtype: torch.dtype) -> None:
    """A stream's chunk has the bits of the layer's call."""
    in_bfloat16 = dtype is BF16 and H % 2 == 0 and HAS_BFLOAT16
    layers = 2 if in_bfloat16 else 1  # float32 is not rounded between layers either
    case = Case(cell, T=6, B=2, I=H, H=H, L=layers, dtype=dtype)
    layer, frozen = pair(case)
    stream = frozen.stream(batch_size=2)
    x, _ = case.inputs()
    expected, _ = layer(x)
    assert torch.equal(stream(x), expected)
    stream.reset()
    if not (in_bfloat16 and cell == "GRU"):  # whose h is wider within a call
        assert torch.equal(torch.stack([stream(step) for step in x]), expected)
    h, *c = flat(stream.state)
    assert h.shape == (layers, 2, H)
    assert h.dtype is (BF16 if in_bfloat16 else torch.float32)
    assert all(part.dtype is torch.float32 for part in c)


@pytest.mark.every_level
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_threads_of_a_stream(cell: str, threads: int) -> None:
    case = Case(cell, T=7, B=5, I=65, H=130, L=2)
    layer, frozen = pair(case)
    x, _ = case.inputs()
    stream = frozen.stream(batch_size=5, threads=threads)
    assert torch.equal(torch.cat([stream(chunk) for chunk in x.split([1, 2, 4])]), layer(x)[0])


@pytest.mark.every_level
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@torch.inference_mode()
def test_cells(name: str, bias: bool) -> None:
    cell = getattr(rnnkern, name)(33, 65, bias=bias)
    frozen, state = rnnkern.freeze(cell), None
    stream = frozen.stream(batch_size=3)
    for x in torch.randn(4, 3, 33):
        expected = cell(x, state)
        found = frozen(x, state)
        assert equal(flat(found), flat(expected))
        assert torch.equal(stream(x), flat(expected)[0])
        state = expected
    unbatched = tuple(s[0] for s in state) if isinstance(state, tuple) else state[0]
    assert equal(flat(frozen(x[0], unbatched)), flat(cell(x[0], unbatched)))


@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_sixteen_threads_step_sixteen_streams(cell: str) -> None:
    _, frozen = pair(Case(cell, I=33, H=65, L=2))
    inputs = torch.randn(16, 50, 1, 33)

    def run(x: Tensor) -> Tensor:
        stream = frozen.stream()
        with torch.inference_mode():
            return torch.stack([stream(step) for step in x])

    def call_frozen(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return frozen(x)[0]

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        assert equal(list(pool.map(run, inputs)), expected)
        assert equal(list(pool.map(call_frozen, inputs)), expected)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_nan(cell: str, value: float, weights: str) -> None:
    """A NaN in a row's input is a NaN in all of its states, from then on, and in no other row's."""
    _, frozen = pair(Case(cell, I=33, H=65), weights)
    stream = frozen.stream(batch_size=3)
    x = torch.randn(3, 3, 33)
    x[1, 1, 20] = value
    for y in (frozen(x)[0], stream(x)):
        if value != value or weights == "int8":  # to which an infinity is no number
            assert y[1:, 1].isnan().all()
        assert y[:, 0].isfinite().all()
        assert y[:, 2].isfinite().all()


def test_a_snapshot() -> None:
    """A change past torch's eyes is in the layer's next result and not in the frozen one's."""
    layer, frozen = pair(Case("LSTM"))
    stream = frozen.stream(batch_size=3)
    x = torch.randn(5, 3, 4)
    with torch.inference_mode():
        before = layer(x)[0]
        layer.weight_hh_l0.data.mul_(2)
        assert not torch.equal(layer(x)[0], before)
        assert torch.equal(frozen(x)[0], before)
        assert torch.equal(stream(x), before)
        frozen.refresh(layer)
        assert torch.equal(frozen(x)[0], layer(x)[0])
        stream.reset()
        assert torch.equal(stream(x), before)
