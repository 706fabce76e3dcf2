"""Cells that are not built in: compiled at their first use, then what a built-in one has.

Compiled cells stay in the user's cache, so that only the first run compiles them.
"""

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import own_cell
from rnnkern.backend import Backend
from rnnkern.cells.shelf import FOLDER, SHELF
from rnnkern.ops import decomposition, library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = sorted(SHELF)
T, B, I, H = 6, 3, 5, 20


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")


def states(layer: torch.nn.Module, count: int) -> object:
    """hx of positive values: a state may be what a cell divides by."""
    cell = library.BY_MODE[layer.own.mode]
    found = tuple(torch.rand(count, B, H, dtype=torch.float64) + 0.5 for _ in cell.states)
    return found if len(found) > 1 else found[0]


def make(name: str, **options: object) -> torch.nn.Module:
    return getattr(rnnkern.cells, name)(I, H, dtype=torch.float64, **options)


def by_steps(layer: torch.nn.Module) -> torch.nn.Module:
    """The same layer in torch's operations."""
    twin = copy.deepcopy(layer)
    twin.select_backend = lambda *_: Backend("decomposition", "a test asks for it")
    return twin


def flat(results: object) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for part in results if part is not None for t in flat(part)]


def assert_same(ours: object, truth: object) -> None:
    for mine, other in zip(flat(ours), flat(truth), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_against_the_step(name: str) -> None:
    """Outputs, states and every gradient in float64."""
    assert rnnkern.cells.check(getattr(rnnkern.cells, name)) < 1e-12


def test_check_finds_a_wrong_gradient() -> None:
    def wrong(x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h, c = SHELF["CIFG"].step(x, y, h, c)
        return h * 1.0, c + 0 * x[..., :1].detach() + (c - c.detach()) * 1e-3

    with pytest.raises(AssertionError, match=r"the gradient of input .* disagree"):
        rnnkern.cells.check(rnnkern.cells.CIFG, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    layer = make(name, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    truth = by_steps(layer)(x)
    for mine, other in zip(flat(layer.float()(x.float())), flat(truth), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_layers(name: str) -> None:
    """Several layers, two directions, hx, batch_first and packed data."""
    layer = make(name, num_layers=2, bidirectional=True, batch_first=True)
    x, hx = torch.randn(B, T, I, dtype=torch.float64), states(layer, 4)
    twin = by_steps(layer)
    assert_same(layer(x, hx), twin(x, hx))
    assert_same(layer(x), twin(x))
    packed = pack_padded_sequence(x, [4, 6, 2], batch_first=True, enforce_sorted=False)
    assert_same(layer(packed, hx), twin(packed, hx))


@pytest.mark.parametrize("name", NAMES)
def test_cell(name: str) -> None:
    """A cell's steps are the layer's."""
    layer, cell = make(name), getattr(rnnkern.cells, f"{name}Cell")(I, H, dtype=torch.float64)
    cell.load_state_dict({k.replace("_l0", ""): v for k, v in layer.state_dict().items()})
    x, hx = torch.randn(T, B, I, dtype=torch.float64), states(layer, 1)
    output, final = layer(x, hx)
    hx = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    for t in range(T):
        hx = cell(x[t], hx)
        assert_same(flat(hx)[0], output[t])
    assert_same(hx, [s[0] for s in flat(final)])
    with pytest.raises(RuntimeError, match="expected input"):
        cell(torch.randn(B, I + 1, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_looking_inside(name: str) -> None:
    layer = make(name)
    cell = library.BY_MODE[layer.own.mode]
    x = torch.randn(T, B, I, dtype=torch.float64)
    trace = rnnkern.trace(layer, x)
    assert list(trace[0, 0].states) == list(cell.states)
    assert list(trace.gates) == [gate for gate in cell.gates if gate in cell.saved]
    for k, state in enumerate(trace[0, 0].states.values()):
        assert_same(state[-1], flat(trace.state)[k][0])
    flow = rnnkern.gradient_flow(layer, x, lambda output: output[-1].sum())
    assert list(flow[0, 0].states) == list(cell.states)
    assert_same(flow.hidden[-1], torch.full((B,), H**0.5, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name: str) -> None:
    """Double backward and torch.func, by the step."""
    layer = make(name)
    x = torch.randn(2, B, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0][-1, 0, :2], x)
    grad = torch.func.grad(lambda x: layer(x)[0].sum())(x.detach())
    assert_same(grad, torch.autograd.grad(layer(x)[0].sum(), x)[0])


def test_without_a_step(tmp_path: Path) -> None:
    """The kernels run; what needs the step says what to add."""
    header = tmp_path / "mine.h"
    header.write_text((FOLDER / "li_gru.h").read_text().replace("LiGRU", "Mine"))
    layer_class, _ = rnnkern.cells.load(header)
    layer = layer_class(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0].sum(), x)
    assert grad.isfinite().all()
    for call in (
        lambda: torch.func.vmap(lambda x: layer(x)[0])(x.detach()[None]),
        lambda: torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True),
    ):
        with pytest.raises(RuntimeError, match=r"Mine has no step .*load\(header, step=step\)"):
            call()
    with pytest.raises(ValueError, match="Mine has no step"):
        rnnkern.cells.check(layer_class)


@pytest.mark.parametrize("name", ["SLSTM", "PeepholeLSTM", "IndRNN"])
def test_copies(name: str) -> None:
    layer = make(name, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert_same(other(x), layer(x))
    other = make(name, num_layers=2)
    other.load_state_dict(layer.state_dict())
    assert_same(other(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_numpy(name: str) -> None:
    layer = make(name, num_layers=2)
    x, hx = torch.randn(T, B, I, dtype=torch.float64), states(layer, 2)
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    own = rnnkern.numpy.Layer(arrays, cell=FOLDER / SHELF[name].header)
    given = tuple(s.numpy() for s in hx) if isinstance(hx, tuple) else hx.numpy()
    found, final = own(x.numpy(), given)
    output, state = layer(x, hx)
    np.testing.assert_array_equal(found, output.detach().numpy())
    finals = final if isinstance(final, tuple) else (final,)
    for mine, other in zip(finals, flat(state), strict=True):
        np.testing.assert_array_equal(mine, other.detach().numpy())
    stream = own.stream(batch_size=B)
    stream.state = given
    np.testing.assert_allclose(np.stack([stream(row) for row in x.numpy()]), found, rtol=1e-13)
    if library.BY_MODE[layer.own.mode].params:
        del arrays["params_l0"], arrays["params_l1"]
        with pytest.raises(ValueError, match="lacks params_l0"):
            rnnkern.numpy.Layer(arrays, cell=FOLDER / SHELF[name].header)


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["SLSTM", "PeepholeLSTM", "SRU"])
def test_compile(name: str) -> None:
    layer = make(name, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), layer(x))


@pytest.mark.parametrize("name", ["SLSTM", "PeepholeLSTM", "IndRNN", "MinGRU", "SRU"])
def test_resets(name: str) -> None:
    layer = make(name)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    output, truth = layer(x, resets=resets)[0], torch.cat([layer(x[:3])[0], layer(x[3:])[0]])
    assert_same(output, truth)
    leaves, weight = [x, *layer.parameters()], torch.randn_like(truth)
    assert_same(*(torch.autograd.grad(y, leaves, weight) for y in (output, truth)))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["zeros", "row", "step", "both"])
def test_resets_of_many_states(form: str, batch_first: bool) -> None:
    """The mask in the kernels, with states of all kinds after resets: gradients of those too."""
    layer = make("SLSTM", num_layers=2, batch_first=batch_first)
    rows = (B, T) if batch_first else (T, B)
    x, resets = torch.randn(*rows, I, dtype=torch.float64), torch.rand(rows) < 0.4
    hx = states(layer, 2)
    fresh = [torch.rand(2, B, H, dtype=torch.float64) + 0.5 for _ in hx]
    by_step = [torch.rand(2, *rows, H, dtype=torch.float64) + 0.5 for _ in hx]
    given = {"zeros": None, "row": fresh, "step": by_step, "both": [*fresh[:2], *by_step[2:]]}[form]
    resets[1, 1] = True  # after the first step
    leaves, found = [leaf.requires_grad_() for leaf in (x, *hx, *(given or ()))], []
    for module in (layer, by_steps(layer)):
        results = flat(module(x, hx, resets, given and tuple(given)))
        torch.manual_seed(4)
        upstream = [torch.randn_like(r) for r in results]
        found.append(
            [*results, *torch.autograd.grad(results, [*leaves, *module.parameters()], upstream)]
        )
    assert_same(*found)
    assert rnnkern.plan(layer, x, resets=resets)["resets"] == "mask"


def with_heads(folder: Path, name: str) -> type[torch.nn.Module]:
    """The layer of a cell on the shelf, with W_hh in heads."""
    header = folder / SHELF[name].header
    heads = "static constexpr Recurrent kRecurrent = Recurrent::heads;\n\n  template"
    header.write_text((FOLDER / SHELF[name].header).read_text().replace("template", heads, 1))
    return rnnkern.cells.load(header, step=SHELF[name].step).layer


@pytest.mark.parametrize("name", ["CIFG", "MGU", "PeepholeLSTM"])
def test_heads_of_any_cell(name: str, tmp_path: Path) -> None:
    """With a product that shares pre-activations and one that does not, and resets by a mask."""
    kind = with_heads(tmp_path, name)
    assert rnnkern.cells.check(kind) < 1e-12
    layer = kind(I, H, dtype=torch.float64, num_heads=4)
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.3
    assert_same(layer(x, resets=resets), by_steps(layer)(x, resets=resets))


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize(
    ("hidden", "heads", "batch"),
    [(20, 4, 3), (6, 6, 3), (40, 1, 3), (48, 2, 40), (64, 2, 150), (160, 2, 9), (256, 2, 9)],
)
def test_heads(T: int, hidden: int, heads: int, batch: int) -> None:
    """The matrix of one head in which all others are zeros is the matrices of the heads."""
    layer, dense = (
        rnnkern.cells.SLSTM(I, hidden, dtype=torch.float64, num_heads=n) for n in (heads, 1)
    )
    assert layer.weight_hh_l0.shape == (heads, 4 * hidden // heads, hidden // heads)
    by_gate = layer.weight_hh_l0.detach().unflatten(1, (4, -1)).transpose(0, 1)
    whole = torch.stack([torch.block_diag(*blocks) for blocks in by_gate])
    state = layer.state_dict() | {"weight_hh_l0": whole.reshape(1, 4 * hidden, hidden)}
    dense.load_state_dict(state)
    x, weight = torch.randn(T, batch, I).double(), torch.randn(T, batch, hidden).double()
    found, truth = [], []
    for module, to in ((layer, found), (dense, truth)):
        output, final = module(x)
        grads = torch.autograd.grad(output, [*module.parameters()], weight)
        to += [output, *final, *grads]
    of_heads = found[6].unflatten(1, (4, -1)).transpose(0, 1)
    found[6] = torch.stack([torch.block_diag(*blocks) for blocks in of_heads])
    truth[6] = truth[6].view(4, hidden, hidden) * (whole != 0)
    assert_same(found, truth)


@pytest.mark.parametrize(("name", "heads"), [("MinGRU", 1), ("SLSTM", 4)])
def test_threads(name: str, heads: int) -> None:
    """Threads that split rows or units leave the bits as they are."""
    options = {"num_heads": heads} if heads > 1 else {}
    layer = getattr(rnnkern.cells, name)(64, 512, **options)
    for batch, split in ((4, "units"), (64, "rows")):
        x = torch.randn(9, batch, 64)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            output = layer(x)[0]
            grads = torch.autograd.grad(output.sum(), [*layer.parameters()])
            results.append([output, *grads])
        assert rnnkern.plan(layer, x)["split"] == split
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(("name", "heads"), [("MinGRU", 1), ("SLSTM", 1), ("SLSTM", 4)])
@pytest.mark.parametrize(("weights", "error"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_rounded_weights(name: str, heads: int, weights: str, error: float) -> None:
    options = {"num_heads": heads} if heads > 1 else {}
    layer = getattr(rnnkern.cells, name)(I, H, num_layers=2, **options)
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    header = FOLDER / SHELF[name].header
    own = rnnkern.numpy.Layer(arrays, cell=header, weights=weights)
    x = np.random.default_rng(0).standard_normal((T, B, I), np.float32)
    exact = rnnkern.numpy.Layer(arrays, cell=header)(x)[0]
    found = own(x)[0]
    assert 0 < np.abs(found - exact).max() < error * np.abs(exact).max()
    stream = own.stream(batch_size=B)
    np.testing.assert_allclose(np.stack([stream(row) for row in x]), found, atol=1e-6)


@pytest.mark.parametrize("name", ["IndRNN", "MinGRU", "MinLSTM", "SRU"])
def test_without_recurrent_product(name: str) -> None:
    layer, cell = make(name, num_layers=2), getattr(rnnkern.cells, f"{name}Cell")(I, H)
    for module in (layer, cell):
        assert not any("_hh" in name for name, _ in module.named_parameters())
    plan = rnnkern.plan(layer, torch.randn(1, 3, I).double())
    assert not plan["fused_input"]
    assert plan["rule"]["input"] == "no recurrent product to join"
    assert len([*make(name, bias=False).parameters()]) == 1 + bool(
        library.BY_MODE[layer.mode].params
    )
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    arrays["weight_hh_l0"] = arrays["weight_hh_l1"] = np.zeros((H, H))
    with pytest.raises(ValueError, match="has weight_hh_l0"):
        rnnkern.numpy.Layer(arrays, cell=FOLDER / SHELF[name].header)


def test_wrong_arguments() -> None:
    layer = make("SLSTM")
    x = torch.randn(T, B, I, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"the states \(h, c, n, m\), got 2"):
        layer(x, (x, x))
    with pytest.raises(RuntimeError, match="Expected n of hx"):
        layer(x, tuple(torch.zeros(1, B, H + (n == "n")).double() for n in "hcnm"))
    with pytest.raises(ValueError, match="2D or 3D"):
        layer(x[None])
    with pytest.raises(TypeError, match="must be tensors"):
        layer([1.0])
    with pytest.raises(TypeError, match=r"torch\.jit\.script"):
        torch.jit.script(layer)
    with pytest.raises(ValueError, match="num_heads must divide hidden_size"):
        make("SLSTM", num_heads=3)
    with pytest.raises(ValueError, match="CIFG has no heads"):
        make("CIFG", num_heads=2)
    for wrong in (torch.zeros(4 * H, H), torch.zeros(3, 4 * H, H), torch.zeros(0, 4 * H, H)):
        layer.weight_hh_l0 = torch.nn.Parameter(wrong.double())
        with pytest.raises(RuntimeError, match="weight_hh must have the sizes"):
            layer(x)


HEADER = (FOLDER / "li_gru.h").read_text()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("sigmoid(preact[1])", "sigmoyd(preact[1])", r"mine\.h:\d+:\d+.*sigmoyd"),
        ("kGates = 2", "kGates = 5", "a cell has 1 to 4 gates"),
        (
            "kPreacts = 2",
            "kPreacts = 3, kHiddenPreact = 1; static constexpr Recurrent kRecurrent = "
            "Recurrent::none; static constexpr int kUnused = 0",
            "without a W_hh a cell has one pre-activation for each gate",
        ),
        ('{"candidate", "update"}', '{"candidate"}', "kGateNames must name each gate"),
    ],
)
def test_headers_that_do_not_compile(tmp_path: Path, before: str, after: str, message: str) -> None:
    header = tmp_path / "mine.h"
    header.write_text(HEADER.replace(before, after, 1))
    with pytest.raises(RuntimeError, match=message):
        rnnkern.cells.load(header)


def test_headers_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        rnnkern.cells.load(tmp_path / "none.h")
    header = tmp_path / "two.h"
    header.write_text(HEADER + HEADER.replace("LiGRU", "Other"))
    with pytest.raises(ValueError, match="2 structs"):
        rnnkern.cells.load(header)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="there is no no-such-compiler"):
        rnnkern.cells.load(header, name="Other")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs file owners")
def test_folder_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("RNNKERN_CACHE", str(folder))
    header = tmp_path / "mine.h"
    header.write_text(HEADER.replace("LiGRU", "Unseen"))
    with pytest.raises(RuntimeError, match="can be written by others"):
        rnnkern.cells.load(header)


def test_a_library_per_content(tmp_path: Path) -> None:
    """Its name changes with the header, a file that it includes, the level and the flags."""
    header, part = tmp_path / "mine.h", tmp_path / "part.h"
    part.write_text("// one\n")
    header.write_text('#include "part.h"\n' + HEADER)
    source = own_cell.Source(str(header), "LiGRU", "LiGRU")
    keys = [own_cell._key(source, level) for level in ("avx2", "avx512")]
    part.write_text("// two\n")
    keys.append(own_cell._key(source, "avx2"))
    zoned = own_cell.Source(str(header), "LiGRU", "LiGRU", "Zoneout")
    keys.append(own_cell._key(zoned, "avx2"))
    assert len({*keys}) == 4
    assert own_cell._key(source, "avx2") == keys[-2]


def test_names() -> None:
    assert set(NAMES) <= set(dir(rnnkern.cells))
    assert not hasattr(rnnkern.cells, "NoSuchCell")
    for name in NAMES:
        assert decomposition.step_of(getattr(rnnkern.cells, name).own.mode) is SHELF[name].step
