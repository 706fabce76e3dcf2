"""Cells that are not built in, by their CUDA kernels on the simulated chip."""

import own_cell_calls
import pytest
import torch
from filelock import FileLock
from own_cell_calls import F64, NAMES, B, H, I, Layers, T, assert_close, load_layers, make
from simulated import FOLDER, in_place, kernels, use_kernels
from twins import flat, pack

import rnnkern
from rnnkern.backend import Backend
from rnnkern.nn.added import AddedLayer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.sources("csrc"),
    pytest.mark.timeout(900),  # compiling takes minutes where the machine is busy
]
BY_STEPS = Backend("decomposition", "a test asks for it")


@pytest.fixture(scope="module")
def layers(library: None) -> Layers:
    """The layer classes; their kernels are compiled once for all of pytest-xdist's workers."""
    with pytest.MonkeyPatch.context() as patch, FileLock(FOLDER / "own_cells.lock"):
        patch.setenv("CXXFLAGS", "-O0")  # as in test_added_cells.py
        found = load_layers(FOLDER)
    own = [layer.own for layer in found.values()]
    use_kernels(own, kernels(own))
    return found


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("name", NAMES)
def test_against_the_step(layers: Layers, name: str) -> None:
    """Outputs, states and every gradient in float64, in small chunks of time."""
    assert rnnkern.cells.check(layers[name], calls=8) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_leaves_what_the_cpu_engine_leaves(layers: Layers, name: str, dtype: torch.dtype) -> None:
    """Results, flows and saved values, against the CPU engine in float64."""
    call = make(layers[name])
    truth = own_cell_calls.results(*call, F64)
    with in_place():
        assert_close(own_cell_calls.results(*call, dtype), truth, dtype)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("name", NAMES)
def test_stack(layers: Layers, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers on packed data, with masks that are drawn, as in torch's operations."""
    layer = layers[name](I, H, 2, bidirectional=True, dtype=F64)
    packed = pack(torch.randn(T, B, I, dtype=F64), [4, 7, 2])
    torch.manual_seed(1)
    found = flat(layer(packed))
    monkeypatch.setattr(AddedLayer, "select_backend", lambda *_: BY_STEPS)
    torch.manual_seed(1)
    torch.testing.assert_close(found, flat(layer(packed)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden_size", [1, 2, 33, 300])
def test_sizes(layers: Layers, hidden_size: int) -> None:
    """One unit to a head, heads that are no multiple of a block, and more units than threads."""
    heads = 3 if hidden_size % 3 == 0 else hidden_size
    layer = layers["SLSTM"](1, hidden_size, num_heads=heads, dtype=F64)
    x = torch.randn(2, 9, 1, dtype=F64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x)[0].sum(), leaves)
    with in_place():
        found = torch.autograd.grad(layer(x)[0].sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("simulated")
def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators refuse a cell that has none here."""
    monkeypatch.setenv("CXXFLAGS", "-O0")
    with pytest.raises(RuntimeError, match="the CUDA kernels of this cell are not there"):
        rnnkern.cells.CIFG(I, H)(torch.zeros(T, B, I))
