"""bfloat16 and int8 weights: what is rounded, and no more."""

import numpy as np
import pytest
import torch
from cases import CELLS, TABLE, Case, call
from torch import Tensor, nn

import rnnkern
import rnnkern.numpy

FLOATS = [case for case in TABLE if case.dtype is torch.float32]
#: The largest difference of an output over 20 steps from unrounded weights, with H = 130, weights
#: as torch.nn draws them and normal inputs: twice what was measured.
BOUNDS = {
    "bfloat16": {"LSTM": 0.004, "GRU": 0.005, "RNN_TANH": 0.008, "RNN_RELU": 0.008},
    "int8": {"LSTM": 0.013, "GRU": 0.017, "RNN_TANH": 0.032, "RNN_RELU": 0.032},
}


def rounded(layer: nn.RNNBase) -> nn.RNNBase:
    """The layer with its weights, not its biases, rounded to bfloat16."""
    for name, p in layer.named_parameters():
        if name.startswith("weight"):
            p.data = p.data.bfloat16().float()
    return layer


@pytest.mark.every_level
@pytest.mark.parametrize("case", FLOATS, ids=str)
@torch.inference_mode()
def test_bfloat16_is_a_layer_with_rounded_weights(case: Case) -> None:
    frozen = rnnkern.freeze(case.layer(rnnkern), "bfloat16")
    x, states = case.inputs()
    found, found_final = call(case, frozen, x, states)
    expected, final = call(case, rounded(case.layer(rnnkern)), x, states)
    for a, b in zip([found, *found_final], [expected, *final], strict=True):
        assert torch.equal(a, b)


def _quantized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as whole numbers up to 127, and the scale of each, (rows, 1)."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scale, inverse = largest / np.float32(127), np.float32(127) / largest
    return np.rint(values * inverse).astype(np.int64), scale


def _product(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    a, a_scale = _quantized(rows)
    b, b_scale = _quantized(weight)
    return (a @ b.T).astype(np.float32) * (b_scale.T * a_scale)


@pytest.mark.every_level
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 5, 6), (9, 64, 65), (2, 300, 130)])
@torch.inference_mode()
def test_int8_step(B: int, I: int, H: int, bias: bool) -> None:
    """Bit for bit, at every level: a ReLU passes the sums on."""
    layer = rnnkern.RNN(I, H, nonlinearity="relu", bias=bias)
    x, h = torch.randn(1, B, I), torch.randn(1, B, H)
    found, _ = rnnkern.freeze(layer, "int8")(x, h)
    w_ih, w_hh, *biases = (p.numpy() for p in layer.parameters())
    sums = _product(x[0].numpy(), w_ih) + _product(h[0].numpy(), w_hh)
    if bias:
        sums += biases[0] + biases[1]
    np.testing.assert_array_equal(found[0].numpy(), np.maximum(sums, 0))


@pytest.mark.every_level
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_int8_gates(cell: str) -> None:
    """A step of each cell, its equations in float64 on the sums of the whole numbers."""
    case = Case(cell, B=4, I=33, H=65)
    layer = case.layer(rnnkern)
    x, h, c = torch.randn(1, 4, 33), torch.randn(1, 4, 65), torch.randn(1, 4, 65)
    found, _ = rnnkern.freeze(layer, "int8")(x, (h, c) if case.has_c else h)
    w_ih, w_hh, b_ih, b_hh = (p.numpy() for p in layer.parameters())
    of_x = torch.from_numpy(_product(x[0].numpy(), w_ih).astype(np.float64) + b_ih)
    of_h = torch.from_numpy(_product(h[0].numpy(), w_hh).astype(np.float64) + b_hh)
    torch.testing.assert_close(
        found[0].double(), _cell(cell, of_x, of_h, h[0].double(), c[0].double()), atol=2e-6, rtol=0
    )


def _cell(cell: str, of_x: Tensor, of_h: Tensor, h: Tensor, c: Tensor) -> Tensor:
    if cell == "LSTM":
        i, f, g, o = (of_x + of_h).chunk(4, 1)
        return o.sigmoid() * (f.sigmoid() * c + i.sigmoid() * g.tanh()).tanh()
    if cell == "GRU":
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, 1), of_h.chunk(3, 1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        n = (xn + r * hn).tanh()
        return n + z * (h - n)
    return (of_x + of_h).tanh() if cell == "RNN_TANH" else (of_x + of_h).relu()


@pytest.mark.parametrize("weights", BOUNDS)
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_errors_are_small(cell: str, weights: str) -> None:
    kind, _, nonlinearity = cell.partition("_")
    options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    layer = getattr(rnnkern, kind)(64, 130, **options)
    x = torch.randn(20, 8, 64)
    error = (rnnkern.freeze(layer, weights)(x)[0] - layer(x)[0]).abs().max().item()
    assert 0 < error < BOUNDS[weights][cell]


@pytest.mark.every_level
@pytest.mark.parametrize("weights", BOUNDS)
@pytest.mark.parametrize("cell", CELLS)
@torch.inference_mode()
def test_streams(cell: str, weights: str) -> None:
    """Steps, chunks and whole calls have the same bits; so have NumPy's."""
    case = Case(cell, T=7, B=3, I=33, H=65, L=2, proj=20 if cell == "LSTM" else 0)
    layer = case.layer(rnnkern)
    frozen = rnnkern.freeze(layer, weights)
    x, _ = case.inputs()
    expected, _ = frozen(x)
    for lengths in ([1] * 7, [3, 4], [7]):
        stream = frozen.stream(batch_size=3)
        assert torch.equal(torch.cat([stream(chunk) for chunk in x.split(lengths)]), expected)
    numpy_layer = rnnkern.numpy.Layer(
        {name: p.numpy() for name, p in layer.named_parameters()},
        nonlinearity="relu" if cell == "RNN_RELU" else "tanh",
        weights=weights,
    )
    assert np.array_equal(numpy_layer(x.numpy())[0], expected.numpy())
    assert np.array_equal(numpy_layer.stream(3)(x.numpy()), expected.numpy())


@pytest.mark.parametrize("weights", BOUNDS)
def test_zeros(weights: str) -> None:
    """Rows of zeros have no scale: of weights, of inputs, of h."""
    layer = rnnkern.LSTM(5, 6)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0[3] = 0
    x = torch.zeros(4, 2, 5)
    with torch.inference_mode():
        error = rnnkern.freeze(layer, weights)(x)[0] - layer(x)[0]
    assert error.abs().max() < 0.01


@pytest.mark.parametrize("weights", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_refused(dtype: torch.dtype, weights: str) -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity(), rnnkern.GRU(4, 4, dtype=dtype))
    with pytest.raises(ValueError, match=rf"^2 cannot be frozen: weights='{weights}' is for float"):
        rnnkern.freeze(model, weights)
    if dtype is torch.float64:
        arrays = {name: p.detach().numpy() for name, p in model[2].named_parameters()}
        with pytest.raises(ValueError, match="is for float32 layers, got float64"):
            rnnkern.numpy.Layer(arrays, weights=weights)


@pytest.mark.parametrize("weights", ["int4", "fp32", None, 8])
def test_unknown_formats(weights: object) -> None:
    layer = rnnkern.LSTM(4, 4)
    with pytest.raises(ValueError, match="weights must be one of 'float32', 'bfloat16', 'int8'"):
        rnnkern.freeze(layer, weights)
    arrays = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    with pytest.raises(ValueError, match="weights must be one of"):
        rnnkern.numpy.Layer(arrays, weights=weights)
