"""Cells whose input sums are given: W x is the caller's, and the cell has no W_ih."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from twins import flat, pack

import rnnkern
import rnnkern.numpy
from rnnkern.backend import Backend
from rnnkern.cells.shelf import FOLDER, SHELF
from rnnkern.ops import decomposition, library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
F64 = torch.float64
T, B, H = 6, 3, 20
#: One of each kind: dense, in heads, with learned values, without a W_hh, with pre-activations of
#: its own for W_hh h.
BASES = ("CIFG", "MGU", "PeepholeLSTM", "SLSTM", "SRU")
GIVEN = "static constexpr Input kInput = Input::given;\n\n  template"


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("given")


def given(folder: Path, name: str) -> rnnkern.cells.Loaded:
    """A cell of the shelf whose sums are given."""
    header = folder / f"given_{name}.h"
    if not header.exists():
        header.write_text((FOLDER / SHELF[name].header).read_text().replace("template", GIVEN, 1))
    return rnnkern.cells.load(header, name=name, step=SHELF[name].step)


def gates(name: str) -> int:
    return len(library.BY_MODE[getattr(rnnkern.cells, name).own.mode].gates)


def by_steps(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    twin.select_backend = lambda *_, **__: Backend("decomposition", "a test asks for it")
    return twin


def assert_same(ours: object, truth: object) -> None:
    for mine, other in zip(flat(ours), flat(truth), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_against_the_step(name: str, folder: Path) -> None:
    assert rnnkern.cells.check(given(folder, name).layer) < 1e-12


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("hidden", "batch"), [(20, 3), (192, 40)])
def test_against_the_cell_with_weights(name: str, hidden: int, batch: int, folder: Path) -> None:
    """linear() before the sums is the cell itself: outputs, states, the gradients of W_ih too."""
    whole = getattr(rnnkern.cells, name)(5, hidden, bidirectional=True, dtype=F64)
    own = given(folder, name).layer(2 * gates(name) * hidden, hidden, bidirectional=True, dtype=F64)
    own.load_state_dict({k: v for k, v in whole.state_dict().items() if "_ih" not in k})
    x, weights = (
        torch.randn(T, batch, 5, dtype=F64, requires_grad=True),
        dict(whole.named_parameters()),
    )
    sums = [
        linear(x, weights[f"weight_ih_l0{d}"], weights[f"bias_ih_l0{d}"]) for d in ("", "_reverse")
    ]
    found, truth = own(torch.cat(sums, -1)), whole(x)
    assert_same(found, truth)
    upstream = [torch.randn_like(t) for t in flat(truth)]
    shared = [k for k in weights if "_ih" not in k]
    mine = dict(own.named_parameters())
    of_ih = [weights[k] for k in weights if "_ih" in k]
    assert_same(
        torch.autograd.grad(flat(found), [x, *of_ih, *(mine[k] for k in shared)], upstream),
        torch.autograd.grad(flat(truth), [x, *of_ih, *(weights[k] for k in shared)], upstream),
    )


@pytest.mark.parametrize("name", BASES)
def test_calls(name: str, folder: Path) -> None:
    """batch_first, packed and unbatched data, hx, resets, a cell."""
    layer_class, cell_class = given(folder, name)
    G = gates(name)
    layer = layer_class(G * H, H, batch_first=True, dtype=F64)
    twin, x = by_steps(layer), torch.randn(B, T, G * H, dtype=F64)
    hx = tuple(torch.rand(1, B, H, dtype=F64) + 0.5 for _ in library.BY_MODE[layer.mode].states)
    hx = hx if len(hx) > 1 else hx[0]
    resets = torch.rand(B, T) < 0.4
    packed = pack(x, [4, 6, 2], batch_first=True)
    for args in ((x,), (x, hx), (x[0],), (packed, hx), (x, hx, resets), (x[:0],)):
        assert_same(layer(*args), twin(*args))
    cell = cell_class(G * H, H, dtype=F64)
    cell.load_state_dict({k.replace("_l0", ""): v for k, v in layer.state_dict().items()})
    assert_same(flat(cell(x[:, 0]))[0], layer(x)[0][:, 0])


@pytest.mark.parametrize("name", ["CIFG", "SRU"])
def test_transforms_and_copies(name: str, folder: Path) -> None:
    G = gates(name)
    layer = given(folder, name).layer(G * H, H, dtype=F64)
    x = torch.randn(2, B, G * H, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0][-1, 0, :2], x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other(x), layer(x))
    trace = rnnkern.trace(layer, x.detach())
    assert torch.equal(trace.hidden, layer(x)[0])
    flow = rnnkern.gradient_flow(layer, x.detach(), lambda output: output[-1].sum())
    assert torch.equal(flow.hidden[-1], torch.full((B,), H**0.5, dtype=F64))
    plan = rnnkern.plan(layer, x)
    assert plan["rule"]["input"] == "the input's sums are given"


@pytest.mark.compiler
def test_compile(folder: Path) -> None:
    layer = given(folder, "CIFG").layer(6 * H, H, bidirectional=True, dtype=F64)
    x = torch.randn(T, B, 6 * H, dtype=F64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), layer(x))
    grads = [torch.autograd.grad(m(x)[0].sum(), x) for m in (compiled, layer)]
    assert_same(*grads)


@pytest.mark.parametrize("name", BASES)
@torch.inference_mode()
def test_frozen_and_numpy(name: str, folder: Path) -> None:
    layer_class, cell_class = given(folder, name)
    G = gates(name)
    layer, x = layer_class(G * H, H), torch.randn(T, B, G * H)
    frozen = rnnkern.freeze(layer)
    assert all(map(torch.equal, flat(frozen(x)), flat(layer(x))))
    assert torch.equal(torch.stack([*map(stream := frozen.stream(B), x)]), layer(x)[0])
    assert stream.input_size == G * H
    cell = cell_class(G * H, H)
    assert all(map(torch.equal, flat(rnnkern.freeze(cell)(x[0])), flat(cell(x[0]))))
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    header = folder / f"given_{name}.h"
    own = rnnkern.numpy.Layer(arrays, cell=header)
    np.testing.assert_array_equal(own(x.numpy())[0], layer(x)[0].numpy())
    for weights in ("bfloat16", "int8"):
        found = rnnkern.freeze(layer, weights)(x)[0]
        torch.testing.assert_close(found, layer(x)[0], rtol=0, atol=0.05)
        rounded = rnnkern.numpy.Layer(arrays, cell=header, weights=weights)(x.numpy())[0]
        np.testing.assert_array_equal(rounded, found.numpy())


def test_threads(folder: Path) -> None:
    layer = given(folder, "CIFG").layer(6 * 512, 512, bidirectional=True)
    for batch in (4, 64):
        x, results = torch.randn(9, batch, 6 * 512, requires_grad=True), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            output = layer(x)[0]
            results.append([output, *torch.autograd.grad(output.sum(), [x, *layer.parameters()])])
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


def test_zoneout(folder: Path) -> None:
    layer = rnnkern.cells.zoneout(given(folder, "CIFG").layer).layer(3 * H, H, dtype=F64)
    x = torch.randn(T, B, 3 * H, dtype=F64)
    found = []
    for module in (layer, by_steps(layer)):
        torch.manual_seed(1)
        found.append(module(x))
    assert_same(*found)


def test_wrong_arguments(folder: Path) -> None:
    layer_class, cell_class = given(folder, "CIFG")
    with pytest.raises(ValueError, match=r"input_size must be 120 \(directions x 3 gates"):
        layer_class(3 * H, H, bidirectional=True)
    with pytest.raises(ValueError, match="input_size must be 60"):
        cell_class(H, H)
    with pytest.raises(ValueError, match="num_layers must be 1, got 2"):
        layer_class(3 * H, H, num_layers=2)
    layer = layer_class(3 * H, H)
    with pytest.raises(RuntimeError, match="Expected 60, got 5"):
        layer(torch.randn(T, B, 5))
    spec = library.CALL_SPECS[library.BY_MODE[layer.mode].id, 1, True, False, False]
    with pytest.raises(RuntimeError, match="input must have the sums of all gates, 60 features"):
        library.forward(torch.randn(T, B, 5), None, None, None, [*layer.parameters()], *spec, False)
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    arrays["weight_ih_l0"] = np.zeros((3 * H, 3 * H), np.float32)
    with pytest.raises(ValueError, match="has weight_ih_l0"):
        rnnkern.numpy.Layer(arrays, cell=folder / "given_CIFG.h")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MinGRU", "a cell whose input sums are given has a W_hh or learned values per unit"),
    ],
)
def test_headers_that_do_not_compile(name: str, message: str, folder: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        given(folder, name)
    assert decomposition.step_of("none") is None
