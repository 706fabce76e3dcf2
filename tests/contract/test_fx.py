"""torch.fx sees layers and cells as leaves, whatever their arguments are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx.experimental.proxy_tensor import make_fx
from twins import CELLS, LAYERS, close, flat

import rnnkern


class Model(nn.Module):
    """Calls one recurrent module; `feed` makes its arguments from the model and its input."""

    def __init__(
        self, inner: nn.Module, feed: Callable[["Model", Tensor], tuple[Any, ...]]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.feed = feed
        shape = (2, 3) if isinstance(inner, nn.RNNCellBase) else (5, 2, 3)
        self.register_buffer("constant", torch.randn(shape))

    def forward(self, x: Tensor) -> Any:
        return self.inner(*self.feed(self, x))


def hx_of(model: Model, h: Tensor) -> Any:
    return (h, h) if model.inner._get_name().startswith("LSTM") else h


FEEDS: dict[str, Callable[[Model, Tensor], tuple[Any, ...]]] = {
    "input": lambda model, x: (x,),
    "both": lambda model, x: (x, hx_of(model, x.new_zeros(*model.h_shape))),
    "state alone": lambda model, x: (model.constant, hx_of(model, x[..., :1] * torch.ones(4))),
    "neither": lambda model, x: (model.constant,),
}


def model_of(name: str, feed: str) -> tuple[Model, Tensor]:
    model = Model(getattr(rnnkern, name)(3, 4), FEEDS[feed])
    cell = name in CELLS
    model.h_shape = (2, 4) if cell else (1, 2, 4)
    if feed == "state alone":
        return model, torch.randn((2, 3) if cell else (1, 2, 3))
    return model, torch.randn((2, 3) if cell else (5, 2, 3))


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_symbolic_trace(name: str, feed: str) -> None:
    model, x = model_of(name, feed)
    expected = model(x)
    traced = fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["inner"]
    traced.graph.lint()
    close(flat(traced(x)), flat(expected), 0)
    assert all(type(w) is nn.Parameter for w in model.inner.parameters())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range.*:UserWarning")
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_prepare_fx(name: str) -> None:
    """Static quantisation looks for its patterns around ours and leaves ours as it is."""
    model, x = model_of(name, "input")
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping(), (x,))
    assert type(prepared.inner) is type(model.inner)
    close(flat(prepared(x)), flat(model(x)))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_make_fx_goes_inside(name: str) -> None:
    """A trace of operators has no modules, as with torch.nn's."""
    model, x = model_of(name, "input")
    traced = make_fx(model)(x)
    assert not [node for node in traced.graph.nodes if node.op == "call_module"]
    close(flat(traced(x)), flat(model(x)), 0)
