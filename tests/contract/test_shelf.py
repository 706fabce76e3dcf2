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
