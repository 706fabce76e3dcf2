"""Masks, which a cell may ask for in each step, and zoneout on them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from twins import flat, pack

import rnnkern
import rnnkern.numpy
from rnnkern.backend import Backend
from rnnkern.cells.shelf import FOLDER, MASKED, SHELF
from rnnkern.ops import decomposition, library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
F64 = torch.float64
T, B, I, H = 6, 3, 5, 20
STACK = {"num_layers": 2}
#: What zoneout is put around.
AROUND = {
    "LSTM": lambda: rnnkern.cells.zoneout(rnnkern.LSTM),
    "GRU": lambda: rnnkern.cells.zoneout(nn.GRU),
    "ReLU": lambda: rnnkern.cells.zoneout(rnnkern.RNN, nonlinearity="relu"),
    "SLSTM": lambda: rnnkern.cells.zoneout(rnnkern.cells.SLSTM),
    "PeepholeLSTM": lambda: rnnkern.cells.zoneout(rnnkern.cells.PeepholeLSTM),
    "SRU": lambda: rnnkern.cells.zoneout(rnnkern.cells.SRU),  # without a W_hh
}
HEADER = """
// A tanh network with dropout on the candidate: h' = mask tanh(preact) + h / 2
#include "cells/cell.h"
struct Dropped : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"candidate"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"candidate"};
  static constexpr const char* kMaskNames[] = {"kept"};
  static constexpr int kGates = 1, kPreacts = 1, kStates = 1, kSaved = 1, kMasks = 1;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* masks, V* next,
                                 V* saved) {
    saved[0] = tanh(preact[0]);
    next[0] = masks[0] * saved[0] + V(0.5) * prev[0];
  }
  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V*, const V* masks, const V*, V* dnext,
                                  V* dprev, V* dgates) {
    dgates[0] = dnext[0] * masks[0] * (V(1) - saved[0] * saved[0]);
    dprev[0] = V(0.5) * dnext[0];
  }
};
"""


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")  # as in test_added_cells.py


def make(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return AROUND[name]().layer(I, H, **{"dtype": F64, "zoneout": 0.3, **options})


def seeded(module: nn.Module, *args: object) -> list[Tensor]:
    """Results with the masks that this seed draws."""
    torch.manual_seed(5)
    return flat(module(*args))


def by_steps(layer: nn.Module) -> nn.Module:
    """The same layer in torch's operations."""
    twin = copy.deepcopy(layer)
    twin.select_backend = lambda *_: Backend("decomposition", "a test asks for it")
    return twin


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", AROUND)
def test_zoneout_against_the_step(name: str) -> None:
    """Every result and gradient in float64, with masks between 0 and 1."""
    assert rnnkern.cells.check(AROUND[name]().layer) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_zoneout_of_lstm(training: bool) -> None:
    """Krueger et al. (2017): h and c kept each by a mask; the new h is of the new c."""
    layer = make("LSTM", zoneout=(0.2, 0.6)).train(training)
    plain = nn.LSTMCell(I, H, dtype=F64)
    plain.load_state_dict({k.replace("_l0", ""): v for k, v in layer.state_dict().items()})
    x, h, c = torch.randn(T, B, I, dtype=F64), *torch.randn(2, 1, B, H, dtype=F64)
    found = seeded(layer, x, (h, c))
    torch.manual_seed(5)
    masks = layer.masks((1, T, B, 2, H), x).expand(1, T, B, 2, H)[0]
    assert set(masks.unique().tolist()) == ({0, 1} if training else {0.2, 0.6})
    h, c, outputs = h[0], c[0], []
    for step, mask in zip(x, masks, strict=True):
        new_h, new_c = plain(step, (h, c))
        h = mask[:, 0] * h + (1 - mask[:, 0]) * new_h
        c = mask[:, 1] * c + (1 - mask[:, 1]) * new_c
        outputs.append(h)
    same(found, [torch.stack(outputs), h[None], c[None]])


def test_rates() -> None:
    """0 is the layer without, 1 keeps hx; as often as the rate says in between."""
    x, hx = torch.randn(T, B, I, dtype=F64), torch.randn(1, B, H, dtype=F64)
    layer, plain = make("GRU", zoneout=0), rnnkern.GRU(I, H, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    same(flat(layer(x, hx)), flat(plain(x, hx)))
    assert torch.equal(make("GRU", zoneout=1)(x, hx)[1], hx)
    masks = make("LSTM", zoneout=(0.1, 0.7)).masks((1, 50, 20, 2, H), x)
    assert masks.mean((0, 1, 2, 4)).tolist() == pytest.approx([0.1, 0.7], abs=0.02)
    assert repr(make("LSTM", zoneout=0.5)) == "ZoneoutLSTM(5, 20, zoneout=(0.5, 0.5))"


@pytest.mark.parametrize("name", AROUND)
def test_calls(name: str) -> None:
    """Layers, directions, batch_first, packed data, dropout and a cell, with drawn masks."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}
    layer, x = make(name, **options), torch.randn(B, T, I, dtype=F64)
    packed = pack(x, [4, 6, 2], batch_first=True)
    for args in ((x,), (x[0],), (packed,)):
        same(seeded(layer, *args), seeded(by_steps(layer), *args))
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])
    cell = AROUND[name]().cell(I, H, dtype=F64)
    for args in ((x[:, 0],), (x[0, 0],), (x[0, 0].clone().requires_grad_(),)):
        same(seeded(cell, *args), seeded(by_steps(cell), *args))
    assert not torch.equal(flat(cell(x[:, 0]))[0], flat(cell(x[:, 0]))[0])


@pytest.mark.parametrize("name", ["LSTM", "SLSTM"])
def test_gradients(name: str) -> None:
    """First and second ones see the masks of the forward pass."""
    layer, twin = make(name, bidirectional=True), by_steps(make(name, bidirectional=True))
    x = torch.randn(3, B, I, dtype=F64, requires_grad=True)
    found = []
    for module in (layer, twin):
        leaves = [x, *module.parameters()]
        output = seeded(module, x)[0]
        loss = (output * torch.linspace(0, 1, 2 * H, dtype=F64)).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*torch.autograd.grad(seeded(module, x)[0].sum(), leaves), *first, *second])
    same(*found)


def test_recurrent_dropout() -> None:
    """Semeniuta et al. (2016): of what is added to c, by the step of torch.nn's LSTM."""
    kind = rnnkern.cells.RecurrentDropoutLSTM
    assert rnnkern.cells.check(kind) < 1e-12
    layer, plain = kind(I, H, recurrent_dropout=0.4, dtype=F64), nn.LSTMCell(I, H, dtype=F64)
    plain.load_state_dict({k.replace("_l0", ""): v for k, v in layer.state_dict().items()})
    x = torch.randn(T, B, I, dtype=F64)
    found = seeded(layer, x)
    torch.manual_seed(5)
    masks = layer.masks((1, T, B, 1, H), x)
    assert {round(m, 6) for m in masks.unique().tolist()} == {0, round(1 / 0.6, 6)}
    h = c = torch.zeros(B, H, dtype=F64)
    for step, mask in zip(x, masks[0, :, :, 0], strict=True):
        preacts = nn.functional.linear(step, plain.weight_ih, plain.bias_ih)
        preacts = preacts + nn.functional.linear(h, plain.weight_hh, plain.bias_hh)
        i, f, g, o = preacts.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh() * mask
        h = o.sigmoid() * c.tanh()
    same([s[0] for s in found[1:]], [h, c])
    same(flat(layer.eval()(x)), flat(_as_lstm(layer)(x)))
    other = pickle.loads(pickle.dumps(layer))
    assert repr(other) == repr(layer) == "RecurrentDropoutLSTM(5, 20, recurrent_dropout=0.4)"
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        kind(I, H, recurrent_dropout=1)
    assert "RecurrentDropoutLSTM" in rnnkern.cells.list()


def _as_lstm(layer: nn.Module) -> nn.LSTM:
    lstm = nn.LSTM(I, H, dtype=F64)
    lstm.load_state_dict(layer.state_dict())
    return lstm


def test_dtypes() -> None:
    layer, x = make("LSTM", zoneout=0.5), torch.randn(T, B, I, dtype=F64)
    truth = layer.eval()(x)[0]
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        found = layer.to(dtype)(x.to(dtype))[0]
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), truth, rtol=error, atol=error)
        assert layer.train()(x.to(dtype))[0].dtype is dtype
        layer.eval()
        layer.double()
    with torch.autocast("cpu"):
        assert layer.float().train()(x.float())[0].isfinite().all()


def test_resets() -> None:
    """Masks are drawn for the rows of the call, by the mask of resets and by episodes."""
    layer, x = make("LSTM", zoneout=(0.2, 0.6)).eval(), torch.randn(T, B, I, dtype=F64)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    expected = torch.cat([layer(x[:3])[0], layer(x[3:])[0]])
    same([layer(x, resets=resets)[0]], [expected])
    same([layer(x, resets=resets, return_ends=True)[0]], [expected])


def test_copies() -> None:
    layer, x = make("LSTM", zoneout=(0.2, 0.6)), torch.randn(T, B, I, dtype=F64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert other.zoneout == (0.2, 0.6)
        same(seeded(other, x), seeded(layer, x))
    assert rnnkern.cells.zoneout(nn.LSTM).layer is type(layer)


@pytest.mark.compiler
@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool) -> None:
    torch.compiler.reset()
    layer, x = make("LSTM").train(training), torch.randn(T, B, I, dtype=F64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(seeded(compiled, x), seeded(layer, x))
    seeded(compiled, x)[0].sum().backward()
    (grad,) = torch.autograd.grad(seeded(layer, x)[0].sum(), x)
    same([x.grad], [grad])


def test_trace() -> None:
    layer, x = make("LSTM"), torch.randn(T, B, I, dtype=F64)
    torch.manual_seed(5)
    trace = rnnkern.trace(layer, x)
    assert torch.equal(trace.hidden, seeded(layer, x)[0])
    assert list(trace.gates) == ["input", "forget", "cell", "output"]
    flow = rnnkern.gradient_flow(layer, x, lambda output: output[-1].sum())
    assert list(flow[0, 0].states) == ["h", "c"]


@pytest.mark.parametrize("name", ["LSTM", "SLSTM", "dropout"])
@torch.inference_mode()
def test_freeze(name: str) -> None:
    """The layer's bits in evaluation: a call, a stream, copies, rounded weights, a cell."""
    if name == "dropout":
        loaded = rnnkern.cells.RecurrentDropoutLSTM, rnnkern.cells.RecurrentDropoutLSTMCell
    else:
        loaded = AROUND[name]()
    layer, x = loaded[0](I, H, num_layers=2), torch.randn(T, B, I)
    frozen = rnnkern.freeze(layer)
    layer.eval()
    resets = torch.rand(T, B) < 0.3
    hx = tuple(torch.rand(2, B, H) + 0.5 for _ in flat(layer(x)[1]))
    for args in ((x,), (x[:, 0],), (pack(x, [4, 6, 2]),), (x, hx), (x, hx, resets)):
        for same_module in (frozen, pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen)):
            assert all(map(torch.equal, flat(same_module(*args)), flat(layer(*args))))
    stream = frozen.stream(B)
    assert torch.equal(torch.stack([stream(step) for step in x]), layer(x)[0])
    assert torch.equal(rnnkern.trace(frozen, x).hidden, layer(x)[0])
    torch.testing.assert_close(rnnkern.freeze(layer, "int8")(x)[0], layer(x)[0], rtol=0, atol=0.05)
    assert torch.equal(frozen.double()(x.double())[0], layer.double()(x.double())[0])
    cell = loaded[1](I, H)
    found = flat(rnnkern.freeze(cell)(x[0]))
    assert all(map(torch.equal, found, flat(cell.eval()(x[0]))))


def _dropped(tmp_path: Path, **given: object) -> rnnkern.cells.Loaded:
    header = tmp_path / "dropped.h"
    header.write_text(HEADER)

    def step(x: Tensor, y: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (mask * torch.tanh(x + y) + h / 2,)

    return rnnkern.cells.load(header, step=step, **given)


def test_an_own_cell(tmp_path: Path) -> None:
    """One mask for all steps, as in variational dropout: its sizes of 1 are expanded."""

    def masks(self: nn.Module, shape: tuple[int, ...], like: Tensor) -> Tensor:
        assert shape == (2, T, B, 1, H)
        return torch.bernoulli(torch.full((2, 1, B, 1, H), 0.5, dtype=like.dtype)) * 2

    with pytest.raises(RuntimeError, match=r"Dropped takes masks.*load\(header, masks=\.\.\.\)"):
        _dropped(tmp_path).layer(I, H)(torch.randn(T, B, I))
    Dropped, _ = _dropped(tmp_path, masks=masks)
    assert rnnkern.cells.check(Dropped) < 1e-12
    with pytest.raises(ValueError, match="in evaluation are not the same for all steps and rows"):
        _random(Dropped(I, H))
    layer, x = Dropped(I, H, bidirectional=True), torch.randn(T, B, I)
    for mine, other in zip(seeded(layer, x), seeded(by_steps(layer), x), strict=True):
        torch.testing.assert_close(mine, other)


#: Layers in evaluation, and what rnnkern.numpy.Layer has to know of them besides their weights.
IN_NUMPY: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "LSTM": (lambda: make("LSTM", zoneout=(0.2, 0.6), **STACK), {"zoneout": (0.2, 0.6)}),
    "ReLU": (lambda: make("ReLU", **STACK), {"zoneout": 0.3, "nonlinearity": "relu"}),
    "SLSTM": (
        lambda: make("SLSTM", **STACK, num_heads=4),
        {"zoneout": 0.3, "cell": FOLDER / SHELF["SLSTM"].header},
    ),
    "RecurrentDropoutLSTM": (
        lambda: rnnkern.cells.RecurrentDropoutLSTM(I, H, dtype=F64, **STACK),
        {"masks": 1, "cell": FOLDER / MASKED["RecurrentDropoutLSTM"].header},
    ),
}


@pytest.mark.parametrize("name", IN_NUMPY)
def test_numpy(name: str) -> None:
    """A layer in evaluation on arrays: calls, packed data, pickle, what is inside, a stream."""
    make_layer, options = IN_NUMPY[name]
    layer = make_layer().eval()
    arrays = {key: value.numpy() for key, value in layer.state_dict().items()}
    own = rnnkern.numpy.Layer(arrays, **options)
    x = torch.randn(T, B, I, dtype=F64)
    expected = [t.detach() for t in flat(layer(x))]
    for copied in (own, pickle.loads(pickle.dumps(own))):
        output, states = copied(x.numpy())
        same([torch.as_tensor(s) for s in (output, *_tuple(states))], expected)
    data, sizes, *_ = pack(x, [6, 4, 2])
    packed = own(data.numpy(), batch_sizes=sizes.tolist())[0]
    same([torch.as_tensor(packed)], [layer(pack(x, [6, 4, 2]))[0].data.detach()])
    recorded, _, inside = own.record(x.numpy())
    same([torch.as_tensor(recorded)], expected[:1])
    assert {"hidden"} <= inside[1][0].keys()
    rounded = {key: value.astype(np.float32) for key, value in arrays.items()}
    stream = rnnkern.numpy.Layer(rounded, **options).stream(batch_size=B)
    torch.testing.assert_close(torch.as_tensor(stream(x.float().numpy())), expected[0].float())


def _tuple(states: object) -> tuple:
    return states if isinstance(states, tuple) else (states,)


def _random(layer: nn.Module) -> None:
    """Freezes it, with masks that are drawn in evaluation too."""
    layer.masks = lambda shape, like: torch.rand(shape, dtype=like.dtype)
    rnnkern.freeze(layer)


def test_refusals(tmp_path: Path) -> None:
    layer, x = make("LSTM").float(), torch.randn(T, B, I)
    arrays = {name: value.numpy() for name, value in rnnkern.RNN(I, H).state_dict().items()}
    header = tmp_path / "dropped.h"
    header.write_text(HEADER)
    given: list[tuple[dict, str]] = [
        ({"cell": header}, "the cell takes masks, masks=...: kept"),
        ({"cell": header, "masks": np.ones((2, H))}, "broadcast"),
        ({"cell": header, "zoneout": 0.1}, "a cell without masks"),
        ({"masks": 1.0}, "the cell takes no masks"),
        ({"zoneout": (0.1, 0.2)}, "one for each of h, got"),
        ({"zoneout": 1.5}, "between 0 and 1"),
    ]
    for options, message in given:
        with pytest.raises(ValueError, match=message):
            rnnkern.numpy.Layer(arrays, **options)
    for zoneout, message in (((0.1,), "one for each of h, c"), (1.5, "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            make("LSTM", zoneout=zoneout)
    wrong: list[tuple[type[Exception], Callable[[], object]]] = [
        (TypeError, lambda: rnnkern.cells.zoneout(nn.Linear)),
        (TypeError, lambda: rnnkern.cells.zoneout("LSTM")),
        (ValueError, lambda: rnnkern.cells.zoneout(nn.RNN, nonlinearity="sin")),
        (ValueError, lambda: rnnkern.cells.zoneout(type(layer))),
    ]
    for error, act in wrong:
        with pytest.raises(error):
            act()
    weights = list(rnnkern.LSTM(I, H).parameters())
    with pytest.raises(RuntimeError, match="the cell takes no masks"):
        call(0, x, weights, torch.zeros(1, T, B, 1, H))
    zoned = library.BY_MODE[layer.mode].id
    for masks, message in (
        (None, "the cell takes 2 masks, and none are given"),
        (torch.zeros(1, T, B, 1, H), "masks must have the sizes 1 6 3 2 20"),
        (torch.zeros(1, T, B, 2, H, dtype=F64), "masks and input differ in dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(zoned, x, weights, masks)


def call(cell: int, x: Tensor, weights: list[Tensor], masks: Tensor | None) -> object:
    spec = library.CALL_SPECS[cell, 1, True, False, False]
    after = () if masks is None else (None, None, None, masks)
    return library.forward(x, None, None, None, weights, *spec, False, *after)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SLSTM"])
def test_variational_dropout(name: str, training: bool) -> None:
    """Gal & Ghahramani (2016): W_hh multiplies h times one mask per row, by the cell's step."""
    around = rnnkern.cells.SLSTM if name == "SLSTM" else getattr(rnnkern, name)
    kind, _ = rnnkern.cells.variational_dropout(around)
    assert rnnkern.cells.check(kind) < 1e-12
    layer, x = kind(I, H, recurrent_dropout=0.4, dtype=F64).train(training), _input()
    found = seeded(layer, x)
    torch.manual_seed(5)
    mask = layer.masks((1, 1, B, 1, H), x).expand(1, 1, B, 1, H)[0, 0, :, 0]
    assert (0 in mask) == training
    step = decomposition.required_step(layer.own.mode)
    w_ih, w_hh, b_ih, b_hh = (p.flatten(0, -2) if p.dim() == 3 else p for p in layer.parameters())
    states = (torch.zeros(B, H, dtype=F64),) * len(library.BY_MODE[layer.mode].states)
    outputs = []
    for row in x:
        sums = nn.functional.linear(row, w_ih, b_ih)
        states = step(sums, nn.functional.linear(mask * states[0], w_hh, b_hh), *states, mask)
        outputs.append(states[0])
    same(found, [torch.stack(outputs), *(s[None] for s in states)])


def _input() -> Tensor:
    return torch.randn(T, B, I, dtype=F64)


def test_variational_dropout_calls() -> None:
    """The mask of a row is the same in all its steps, packed, of resets and of each direction."""
    kind, cell_kind = rnnkern.cells.variational_dropout(rnnkern.LSTM)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": F64}
    layer, x = kind(I, H, **options), torch.randn(B, T, I, dtype=F64)
    for args in ((x,), (x[0],), (pack(x, [4, 6, 2], batch_first=True),)):
        same(seeded(layer, *args), seeded(by_steps(layer), *args))
    one, rows = kind(I, H, dtype=F64), _input()
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    whole = seeded(one, rows, None, resets)
    same(whole, seeded(by_steps(one), rows, None, resets))
    same([whole[0]], [torch.cat([seeded(one, rows[:3])[0], seeded(one, rows[3:])[0]])])
    packed = seeded(one, pack(rows, [T] * B, batch_first=False))
    same([packed[0].view(T, B, H)], [seeded(one, rows)[0]])
    cell = cell_kind(I, H, dtype=F64)
    same(seeded(cell, rows[0]), seeded(by_steps(cell), rows[0]))
    with torch.inference_mode():
        one.eval()
        assert torch.equal(rnnkern.freeze(one)(rows)[0], one(rows)[0])
        same(flat(one(rows)), flat(_as_lstm(one)(rows)))
    assert repr(one) == "VariationalDropoutLSTM(5, 20, recurrent_dropout=0.25)"
    with pytest.raises(ValueError, match="SRU has no W_hh"):
        rnnkern.cells.variational_dropout(rnnkern.cells.SRU)
    with pytest.raises(ValueError, match="takes masks: variational dropout is around a cell"):
        rnnkern.cells.variational_dropout(kind)


def test_variational_dropout_threads() -> None:
    """Threads that split rows or units, and large layers whose gate gradients are in blocks."""
    kind, _ = rnnkern.cells.variational_dropout(rnnkern.GRU)
    for batch, hidden in ((4, 512), (64, 192)):
        layer, x, results = kind(64, hidden), torch.randn(9, batch, 64), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(5)
            output = layer(x)[0]
            results.append([output, *torch.autograd.grad(output.sum(), [*layer.parameters()])])
        assert all(map(torch.equal, *results))
        wanted = seeded(by_steps(layer.double()), x.double())[0]
        same([seeded(layer, x.double())[0]], [wanted])
