"""rnnkern.Stream and rnnkern.numpy.Stream: state, reset, errors."""

import copy
import pickle
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from cases import CELLS, HAS_BFLOAT16, Case
from torch import Tensor
from twins import flat

import rnnkern
import rnnkern.numpy

KINDS = ("torch", "NumPy")


def arrays(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}


def stream_of(kind: str, case: Case, **options: Any) -> Any:
    layer = case.layer(rnnkern)
    if kind == "torch":
        return rnnkern.freeze(layer).stream(case.B, **options)
    nonlinearity = "relu" if case.cell == "RNN_RELU" else "tanh"
    numpy_layer = rnnkern.numpy.Layer(arrays(layer), nonlinearity=nonlinearity)
    return numpy_layer.stream(case.B, **options)


def given(kind: str, *shape: int, seed: int = 0) -> Any:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x if kind == "torch" else x.numpy()


def same(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(params=["C++", "Python"])
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways from a tensor to the engine."""
    home = sys.modules[rnnkern.Stream.__module__]
    if request.param == "Python":
        monkeypatch.setattr(home, "NATIVE", None)
    elif home.NATIVE is None:
        pytest.skip("the C++ library is not built for this torch")


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_entries(dtype: torch.dtype) -> None:
    case = Case("LSTM", T=4, B=2, I=6, H=8, dtype=dtype)
    layer = case.layer(rnnkern)
    stream = rnnkern.freeze(layer).stream(batch_size=2)
    x, _ = case.inputs()
    with torch.no_grad():
        expected = layer(x)[0]
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(stream(strided), expected)
    stream.reset()
    assert torch.equal(torch.stack([stream(step) for step in x]), expected)
    assert not stream(x).requires_grad


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.ones(4), "expected input of shape"),
        (torch.ones(3, 4), "expected input of shape"),
        (torch.ones(2, 5), "expected input of shape"),
        (torch.ones(3, 2, 5), "expected input of shape"),
        (torch.ones(0, 2, 4), "expected input of shape"),
        (torch.ones(1, 3, 2, 4), "expected input of shape"),
        (torch.ones(2, 4, dtype=torch.float64), "expected input of"),
        (torch.ones(2, 4, device="meta"), "expected input of"),
        (torch.ones(2, 4).to_sparse(), "expected input of"),
        (torch.ones(2, 4, requires_grad=True), "no gradients"),
    ],
)
def test_errors_of_torch(x: Tensor, error: str) -> None:
    stream = stream_of("torch", Case("LSTM", B=2))
    with pytest.raises(RuntimeError, match=error):
        stream(x)
    for other in (np.ones((2, 4), np.float32), [1.0], None):
        with pytest.raises(TypeError, match="tensor"):
            stream(other)
    with torch.no_grad():
        assert stream(torch.ones(2, 4, requires_grad=True)).shape == (2, 6)


@pytest.mark.parametrize(
    "x",
    [
        np.ones(4, np.float32),
        np.ones((3, 4), np.float32),
        np.ones((2, 5), np.float32),
        np.ones((0, 2, 4), np.float32),
        np.ones((2, 4)),
        np.ones((2, 4), np.int32),
    ],
)
def test_errors_of_numpy(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        stream_of("NumPy", Case("LSTM", B=2))(x)


@pytest.mark.usefixtures("entry")
def test_another_default_device() -> None:
    stream, x = stream_of("torch", Case("LSTM", B=2)), torch.ones(2, 4)
    with torch.device("meta"):
        assert stream(x).device.type == "cpu"
        assert all(s.device.type == "cpu" for s in stream.state)


def test_arrays_of_any_layout() -> None:
    case = Case("GRU", B=2)
    x = given("NumPy", 3, 2, 4)
    expected = stream_of("NumPy", case)(x)
    readonly, backwards = x.copy(), x[::-1].copy()[::-1]
    readonly.flags.writeable = False
    for same_values in (
        np.asfortranarray(x),
        readonly,
        backwards,
        x.transpose().copy().transpose(),
    ):
        assert same(stream_of("NumPy", case)(same_values), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_the_layers_are_one(cell: str) -> None:
    """NumPy's and torch's streams have the same bits."""
    case = Case(cell, B=2, L=2)
    streams = [stream_of(kind, case) for kind in KINDS]
    for seed in range(3):
        found = [s(given(k, 2, 4, seed=seed)) for s, k in zip(streams, KINDS, strict=True)]
        assert same(*found)
    for a, b in zip(*(flat_state(s.state) for s in streams), strict=True):
        assert same(a, b)


def flat_state(state: Any) -> list[Any]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_state(kind: str, cell: str) -> None:
    """A state that was read and is assigned later goes on from there; it is a copy."""
    case = Case(cell, B=2, L=2, proj=3 if cell == "LSTM" else 0)
    stream = stream_of(kind, case)
    fresh = flat_state(stream.state)
    assert not any(np.asarray(s).any() for s in fresh)
    stream(given(kind, 3, 2, 4))
    kept = stream.state
    widths = [case.R, case.H][: len(fresh)]
    assert [tuple(s.shape) for s in flat_state(kept)] == [(2, 2, width) for width in widths]
    x = given(kind, 2, 4, seed=1)
    first = stream(x)
    stream.state = kept
    assert same(stream(x), first)
    stream.state = None
    assert not any(np.asarray(s).any() for s in flat_state(stream.state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "at_zero"),
    [
        (None, [0, 1, 2]),
        (1, [1]),
        (-1, [2]),
        ([0, 2], [0, 2]),
        ([], []),
        ((np.int64(1),), [1]),
        ([False, True, True], [1, 2]),
        (np.array([2]), [2]),
        (torch.tensor([True, False, False]), [0]),
        (torch.tensor([1, 0]), [0, 1]),
    ],
    ids=str,
)
def test_reset(kind: str, rows: Any, at_zero: list[int]) -> None:
    stream = stream_of(kind, Case("LSTM", B=3, L=2))
    stream(given(kind, 2, 3, 4))
    before = [np.asarray(s) for s in stream.state]
    stream.reset(rows)
    for was, now in zip(before, stream.state, strict=True):
        expected = was.copy()
        expected[:, at_zero] = 0
        assert same(now, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (3, IndexError),
        ([0, -4], IndexError),
        ([True], IndexError),
        (1.5, TypeError),
        ("1", TypeError),
        ([0.0], TypeError),
    ],
)
def test_rows_that_are_not_there(kind: str, rows: Any, error: type[Exception]) -> None:
    stream = stream_of(kind, Case("GRU"))
    with pytest.raises(error, match="row"):
        stream.reset(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_states(kind: str) -> None:
    stream = stream_of(kind, Case("LSTM", B=2))
    h, c = stream.state
    stream(given(kind, 2, 4))
    before = stream.state
    double = np.asarray(c).astype(np.float64)
    for wrong in (
        h,
        (h,),
        (h, c, c),
        (h, c[:, :1]),
        (h, double if kind == "NumPy" else torch.from_numpy(double)),
        (h, "c"),
    ):
        with pytest.raises(ValueError, match="state must be"):
            stream.state = wrong
    assert all(same(a, b) for a, b in zip(before, stream.state, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["batch_size", "threads"])
def test_counts(kind: str, name: str) -> None:
    layer = rnnkern.GRU(4, 6)
    made = rnnkern.freeze(layer) if kind == "torch" else rnnkern.numpy.Layer(arrays(layer))
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            made.stream(**{name: count})
    for count in (1.5, "2", True, None):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            made.stream(**{name: count})


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads(kind: str) -> None:
    """The second thread spins after a step, sleeps after a pause, and changes no bit."""
    case = Case("LSTM", B=1, I=256, H=256)  # work for two
    alone, together = (stream_of(kind, case, threads=threads) for threads in (1, 2))
    for x, pause in zip(given(kind, 6, 1, 256), (0, 0, 2e-3, 0, 2e-3, 0), strict=True):
        time.sleep(pause)
        assert same(together(x), alone(x))


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional(kind: str) -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        stream_of(kind, Case("LSTM", bidirectional=True))


@pytest.mark.parametrize("kind", KINDS)
def test_repr_and_copies(kind: str) -> None:
    stream = stream_of(kind, Case("LSTM", B=2, L=3))
    assert repr(stream) == "Stream(4, 6, num_layers=3, batch_size=2, float32)"
    for act in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            act(stream)


def test_outlives_its_layer() -> None:
    frozen = rnnkern.freeze(rnnkern.LSTM(4, 600))
    stream, x = frozen.stream(), torch.randn(1, 4)
    expected = frozen.stream()(x)
    del frozen
    assert torch.equal(stream(x), expected)


def test_keeps_its_weights_when_the_layer_is_refreshed() -> None:
    frozen = rnnkern.freeze(rnnkern.LSTM(4, 6))
    stream, x = frozen.stream(), torch.randn(1, 4)
    expected = stream(x)
    frozen.refresh(rnnkern.LSTM(4, 6))
    stream.reset()
    assert torch.equal(stream(x), expected)
    assert not torch.equal(frozen.stream()(x), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_of_a_bfloat16_layer_takes_its_states(cell: str) -> None:
    layer = Case(cell, B=2, I=6, H=8, dtype=torch.bfloat16).layer(rnnkern)
    stream = rnnkern.freeze(layer).stream(batch_size=2)
    x = torch.randn(3, 2, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        _, state = layer(x)
        stream.state = state
        assert torch.equal(stream(x), layer(x, state)[0])
    kept = torch.bfloat16 if HAS_BFLOAT16 else torch.float32
    assert [s.dtype for s in flat(stream.state)][:1] == [kept]
