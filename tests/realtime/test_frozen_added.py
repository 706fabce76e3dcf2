"""rnnkern.freeze of cells that are not built in: the layer's bits, and what a frozen module is."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from twins import flat, pack

import rnnkern
import rnnkern.numpy
from rnnkern.cells.shelf import FOLDER, SHELF
from rnnkern.ops import library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = sorted(SHELF)
T, B, I, H = 5, 3, 6, 20


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")  # as in test_added_cells.py


@pytest.fixture(params=[True, False], ids=["C++", "Python"])
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways from a tensor to the engine."""
    if not request.param:
        monkeypatch.setattr(sys.modules["rnnkern.ops.autograd"], "NATIVE", None)
        monkeypatch.setattr(sys.modules["rnnkern.frozen"], "NATIVE", None)


def layer_of(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(rnnkern.cells, name)(I, H, **options)


def cell_of(name: str, **options: Any) -> nn.Module:
    return layer_of(f"{name}Cell", **options)


def state_of(name: str, *sizes: int) -> Any:
    """hx of positive values: a state may be what a cell divides by."""
    mode = getattr(rnnkern.cells, name).own.mode
    found = tuple(torch.rand(*sizes) + 0.5 for _ in library.BY_MODE[mode].states)
    return found if len(found) > 1 else found[0]


def equal(found: Any, expected: Any) -> bool:
    return all(torch.equal(f, e) for f, e in zip(flat(found), flat(expected), strict=True))


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_layer(name: str, bias: bool) -> None:
    layer = layer_of(name, num_layers=2, bidirectional=True, batch_first=True, bias=bias)
    frozen = rnnkern.freeze(layer)
    x, hx = torch.randn(B, T, I), state_of(name, 4, B, H)
    packed = pack(x, [4, 5, 2], batch_first=True)
    resets = torch.rand(B, T) < 0.4
    for args in ((x,), (x, hx), (packed,), (packed, hx), (x, hx, resets)):
        assert equal(frozen(*args), layer(*args))
    one, of_one = x[0], tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
    assert equal(frozen(one, of_one), layer(one, of_one))


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_cell(name: str, bias: bool) -> None:
    cell = cell_of(name, bias=bias)
    frozen, hx = rnnkern.freeze(cell), state_of(name, B, H)
    x = torch.randn(B, I)
    for args in ((x,), (x, hx)):
        assert equal(frozen(*args), cell(*args))
    of_one = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    assert equal(frozen(x[0], of_one), cell(x[0], of_one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_stream(name: str, dtype: torch.dtype) -> None:
    """Any number of states, kept between steps, read and assigned."""
    layer = layer_of(name, num_layers=2, dtype=dtype)
    stream, x = rnnkern.freeze(layer).stream(B), torch.randn(T, B, I, dtype=dtype)
    output, final = layer(x)
    assert torch.equal(torch.stack([stream(step) for step in x]), output)
    assert equal(stream.state, final)
    stream.state = final
    assert torch.equal(stream(x), layer(x, final)[0])


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_formats(name: str, weights: str) -> None:
    """The bits of NumPy's layer with the same weights."""
    layer, x = layer_of(name, num_layers=2), torch.randn(T, B, I)
    arrays = {key: value.numpy() for key, value in layer.state_dict().items()}
    header = FOLDER / SHELF[name].header
    output, final = rnnkern.numpy.Layer(arrays, weights=weights, cell=header)(x.numpy())
    found, state = rnnkern.freeze(layer, weights)(x)
    np.testing.assert_array_equal(found.numpy(), output)
    finals = final if isinstance(final, tuple) else (final,)
    for mine, other in zip(flat(state), finals, strict=True):
        np.testing.assert_array_equal(mine.numpy(), other)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("make", [layer_of, cell_of])
@pytest.mark.parametrize("name", ["SLSTM", "PeepholeLSTM"])
@torch.inference_mode()
def test_copies(name: str, make: Any, weights: str) -> None:
    frozen = rnnkern.freeze(make(name), weights)
    x = torch.randn(B, I)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for same in (
        copy.copy(frozen),
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(file, weights_only=False),
        rnnkern.freeze(frozen, weights),
    ):
        assert type(same) is type(frozen)
        assert repr(same) == repr(frozen)
        assert equal(same(x), frozen(x))
    assert b"_prepacked" not in pickle.dumps(frozen)


@torch.inference_mode()
def test_another_process(tmp_path: Path) -> None:
    """It loads the cell by the header, which a pickle names."""
    frozen, x = rnnkern.freeze(layer_of("SLSTM")), torch.randn(T, B, I)
    torch.save((frozen, x, frozen(x)[0]), tmp_path / "frozen.pt")
    program = (
        "import torch, rnnkern\n"
        "frozen, x, y = torch.load('frozen.pt', weights_only=False)\n"
        "with torch.inference_mode(): assert torch.equal(frozen(x)[0], y)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def _derived(monkeypatch: pytest.MonkeyPatch) -> tuple[type[nn.Module], type[nn.Module]]:
    """Subclasses that delegate and that do not; made late, as CIFG is compiled at its first use."""

    class Scaled(rnnkern.cells.CIFG):
        scale = 2.0

        def forward(self, input: Tensor, hx: Any = None) -> Tensor:
            return super().forward(input * self.scale, hx)[0]

    class Replaces(rnnkern.cells.CIFG):
        def forward(self, input: Tensor, hx: Any = None) -> Tensor:
            return input @ self.weight_ih_l0.T

    Scaled.__qualname__ = "Scaled"
    monkeypatch.setitem(globals(), "Scaled", Scaled)  # where pickle looks for it
    return Scaled, Replaces


@torch.inference_mode()
def test_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    Scaled, Replaces = _derived(monkeypatch)
    layer, x = Scaled(I, H), torch.randn(T, B, I)
    frozen = rnnkern.freeze(layer)
    for same in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(same) is type(frozen)
        assert isinstance(same, Scaled)
        assert equal(same(x), layer(x))
    assert type(copy.deepcopy(layer)) is type(pickle.loads(pickle.dumps(layer))) is Scaled
    with pytest.raises(ValueError, match="Replaces overrides forward"):
        rnnkern.freeze(Replaces(I, H))


@torch.inference_mode()
def test_weights() -> None:
    """state_dict, refresh and another dtype pack anew."""
    layer, other = layer_of("PeepholeLSTM"), rnnkern.cells.PeepholeLSTM(I, H)
    frozen, x = rnnkern.freeze(nn.Sequential(layer))[0], torch.randn(T, B, I)
    assert list(frozen.state_dict()) == list(layer.state_dict())
    frozen.load_state_dict(other.state_dict())
    assert equal(frozen(x), other(x))
    frozen.params_l0.zero_()
    frozen.refresh()
    other.params_l0.zero_()
    assert equal(frozen(x), other(x))
    frozen.refresh(layer)
    assert equal(frozen(x), layer(x))
    assert equal(frozen.double()(x.double()), layer.double()(x.double()))
    for wrong in (rnnkern.LSTM(I, H), rnnkern.cells.CIFG(I, H), rnnkern.cells.SLSTM(I, H)):
        with pytest.raises(ValueError, match="is another cell"):
            frozen.refresh(wrong)


def test_another_cell_of_the_same_shapes(tmp_path: Path) -> None:
    header = tmp_path / "other.h"
    header.write_text((FOLDER / "cifg.h").read_text().replace("CIFG", "Other"))
    other, _ = rnnkern.cells.load(header)
    with pytest.raises(ValueError, match="is another cell"):
        rnnkern.freeze(layer_of("CIFG")).refresh(other(I, H))


@torch.inference_mode()
def test_errors_are_the_layers() -> None:
    layer, x = layer_of("SLSTM"), torch.randn(T, B, I)
    frozen, h = rnnkern.freeze(layer), torch.zeros(1, B, H)
    cell = cell_of("SLSTM")
    pairs = [
        *((layer, frozen, args) for args in ((x[..., :5],), (x, h), (x, (h, h)), ([1.0],))),
        (layer, frozen, (x, (h, h, h[:, :1], h))),
        *((cell, rnnkern.freeze(cell), args) for args in ((x,), (x[0], h[0]), (x[0, :, :5],))),
    ]
    for one, other, args in pairs:
        with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
            one(*args)
        with pytest.raises(expected.type) as found:
            other(*args)
        assert str(found.value) == str(expected.value)


def test_gradients_are_refused() -> None:
    for make in (layer_of, cell_of):
        frozen = rnnkern.freeze(make("SLSTM"))
        with pytest.raises(RuntimeError, match="frozen: no gradient passes"):
            frozen(torch.randn(B, I, requires_grad=True))


@torch.inference_mode()
def test_looking_inside() -> None:
    layer, x = layer_of("SLSTM"), torch.randn(T, B, I)
    frozen = rnnkern.freeze(layer)
    assert rnnkern.explain(frozen, x).name == "fused"
    assert torch.equal(rnnkern.trace(frozen, x).hidden, rnnkern.trace(layer, x).hidden)
    vmapped = torch.vmap(lambda one: frozen(one)[0], 1, 1)(x)
    torch.testing.assert_close(vmapped, layer(x)[0])
    with pytest.raises(RuntimeError, match="weights in int8 are for rnnkern's kernels alone"):
        rnnkern.trace(rnnkern.freeze(layer, "int8"), x)
    with pytest.raises(TypeError, match=r"torch\.jit\.script"):
        torch.jit.script(frozen)


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["SLSTM", "PeepholeLSTM"])
@torch.no_grad()
def test_compile(name: str) -> None:
    torch.compiler.reset()
    frozen, x = rnnkern.freeze(layer_of(name, num_layers=2)), torch.randn(T, B, I)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert equal(compiled(x), frozen(x))
