"""rnnkern.cells beside the packages that the cells come from."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rnnkern

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]


def xlstm_loop() -> ModuleType:
    """The loop of xlstm that runs without a GPU, alone: all of xlstm imports a dozen packages."""
    found = importlib.util.find_spec("xlstm")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("pip install --no-deps xlstm")
    folder = Path(found.submodule_search_locations[0], "blocks/slstm/src/vanilla")
    spec = importlib.util.spec_from_file_location("xlstm_loop", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def speechbrain_rnn(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """speechbrain.nnet.RNN alone, which takes nothing for LiGRU from what it imports."""
    found = importlib.util.find_spec("speechbrain")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("pip install --no-deps speechbrain")
    file = Path(found.submodule_search_locations[0], "nnet/RNN.py")
    wanted = ["get_logger", "ContentBasedAttention", "KeyValueAttention", "LocationAwareAttention"]
    for name in ("", ".nnet", ".nnet.attention", ".utils", ".utils.logger"):
        stub = ModuleType(f"speechbrain{name}")
        vars(stub).update(dict.fromkeys(wanted, lambda *_: None))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    spec = importlib.util.spec_from_file_location("speechbrain_rnn", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_li_gru(training: bool, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of SpeechBrain's LiGRU, with its weights."""
    monkeypatch.setenv("CXXFLAGS", "-O0")  # as in test_added_cells.py
    T, B, I, H, L = 9, 3, 5, 20, 2
    theirs = speechbrain_rnn(monkeypatch).LiGRU(
        hidden_size=H, input_shape=(B, T, I), num_layers=L, bidirectional=both
    )
    ours = rnnkern.cells.BatchNormLiGRU(I, H, L, batch_first=True, bidirectional=both)
    for mine, other in zip(ours.layers, theirs.rnn, strict=True):
        torch.nn.init.uniform_(other.norm.weight, 0.5, 2)
        mine.w.load_state_dict(other.w.state_dict())
        mine.norm.load_state_dict(other.norm.state_dict())
        mine.recurrence.load_state_dict({"weight_hh_l0": other.u.weight})
    theirs, ours = theirs.double().train(training), ours.double().train(training)
    x = torch.randn(B, T, I, dtype=torch.float64, requires_grad=True)
    (found, h_n), (expected, _) = ours(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(expected)
    names = ("w.weight", "norm.weight", "norm.bias")
    leaves = [
        [layer.get_parameter(name) for layer in layers for name in (*names, recurrent)]
        for layers, recurrent in (
            (ours.layers, "recurrence.weight_hh_l0"),
            (theirs.rnn, "u.weight"),
        )
    ]
    grads = torch.autograd.grad(found, [x, *leaves[0]], weight)
    wanted = torch.autograd.grad(expected, [x, *leaves[1]], weight)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-10)
    for mine, other in zip(ours.layers, theirs.rnn, strict=True):
        torch.testing.assert_close(mine.norm.running_mean, other.norm.running_mean)
    assert torch.equal(found[:, -1, :H], h_n[-2 if both else -1])


@pytest.mark.parametrize("heads", [1, 4])
def test_slstm(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of xlstm's sLSTM. Its c, n and m differ by a factor."""
    monkeypatch.setenv("CXXFLAGS", "-O0")  # as in test_added_cells.py
    loop = xlstm_loop()
    T, B, I, H = 9, 3, 5, 20
    layer = rnnkern.cells.SLSTM(I, H, dtype=torch.float64, num_heads=heads)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    states, _, _ = loop.slstm_forward(
        torch.nn.functional.linear(x, w_ih, b_ih),
        torch.zeros(4, B, H, dtype=torch.float64),
        w_hh,
        b_hh,
        loop.slstm_pointwise_function_registry["slstm"],
    )
    expected, found = states[0, 1:], layer(x)[0]
    weight = torch.randn_like(expected)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(found, leaves, weight)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, weight), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)
