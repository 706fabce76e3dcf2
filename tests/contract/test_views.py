"""Which results are views, and what may be done with them in place: 10.5 of the contract."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import CELLS, LAYERS, close, flat, pack, twins

import rnnkern
import rnnkern.ops.autograd

MODES = {
    "grad": nullcontext,
    "frozen": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(params=["native", "python"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(rnnkern.ops.autograd, "NATIVE", None)


def forms(cell: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if cell:
        yield from (("batched", {}), ("unbatched", {}))
        return
    for layers, bidirectional, batch_first in product((1, 2), (False, True), (False, True)):
        options = {"bidirectional": bidirectional, "batch_first": batch_first}
        for form in ("batched", "unbatched", "sorted", "unsorted"):
            yield form, {"num_layers": layers, **options}


def call(module: nn.Module, form: str, *, given: bool, input_grad: bool) -> list[Tensor]:
    cell = isinstance(module, nn.RNNCellBase)
    first = getattr(module, "batch_first", False)
    shape = (3,) if form == "unbatched" else (2, 3)
    if not cell:
        shape = (5, 3) if form == "unbatched" else (2, 5, 3) if first else (5, 2, 3)
    x: Any = torch.randn(shape).requires_grad_(input_grad)
    if form.endswith("sorted"):
        x = pack(x, [5, 3] if form == "sorted" else [3, 5], first)
    rows = () if cell else (module.num_layers * (1 + module.bidirectional),)
    widths = (getattr(module, "proj_size", 0) or 4, 4)[
        : 1 + type(module).__name__.startswith("LSTM")
    ]
    states = [torch.randn(*rows, *(() if form == "unbatched" else (2,)), n) for n in widths]
    hx = None if not given else tuple(states) if len(states) == 2 else states[0]
    return flat(module(x, hx))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_same_views(name: str, mode: str) -> None:
    enter: type[AbstractContextManager] = MODES[mode]
    options = {"requires_grad": mode == "grad"}
    for form, kwargs in forms(name.endswith("Cell")):
        pair = [m.requires_grad_(**options) for m in twins(name, 3, 4, **kwargs)]
        for given, input_grad in product((False, True), (False, True)):
            found = []
            for module in pair:
                with enter():
                    out = call(module, form, given=given, input_grad=input_grad)
                found.append([t._is_view() for t in out])
            assert found[1] == found[0], (form, kwargs, given, input_grad)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}], ids=str)
def test_same_views_of_other_lstms(options: dict[str, Any], dtype: torch.dtype) -> None:
    for layers, batch_first in product((1, 2), (False, True)):
        found = []
        for module in twins("LSTM", 3, 4, layers, batch_first=batch_first, dtype=dtype, **options):
            out = flat(module(torch.randn(2, 2, 3, dtype=dtype)))
            found.append([t._is_view() for t in out])
        assert found[1] == found[0], (layers, batch_first)


@pytest.mark.parametrize("name", CELLS)
def test_cells_results_in_place(name: str) -> None:
    """What recurrent reinforcement learning does with states."""
    done = torch.tensor([True, False])
    grads = []
    for module in twins(name, 3, 4):
        x = torch.ones(2, 3, requires_grad=True)
        out = module(x)
        states = flat(out)
        for s in states:
            s[done] = 0
            s.mul_(2)
        if isinstance(module, nn.RNNCell):  # torch.nn's saves its result for the backward pass
            states = flat(module(x))
        sum(
            t.square().sum()
            for t in flat(module(x, tuple(states) if name == "LSTMCell" else states[0]))
        ).backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
        assert not any(g._is_view() for g in grads[-1])

        for s in flat(module(x)):
            s.detach_()
            assert s.is_leaf
        with torch.no_grad():
            states = flat(module(x))
        states[0][0] = x.sum()  # made without a graph, used with one
        assert states[0].requires_grad
    close(grads[1], grads[0])


@pytest.mark.parametrize("name", LAYERS)
def test_layers_results_in_place(name: str) -> None:
    for layers in (1, 2):
        for module in twins(name, 3, 4, layers, batch_first=True):
            _, *states = flat(module(torch.ones(2, 5, 3)))
            for s in states:
                s[:, 0] = 0
                s.detach_()


@pytest.mark.compiler
def test_cells_of_subclasses_and_compiled() -> None:
    """Calls that go through the dispatcher."""

    class Marked(Tensor):
        pass

    for cell in twins("GRUCell", 3, 4):
        h = cell(torch.ones(2, 3).as_subclass(Marked))
        h[torch.tensor([True, False])] = 0
        h.sum().backward()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    h = compiled(torch.ones(2, 3))
    h[torch.tensor([True, False])] = 0
    h.sum().backward()
    assert cell.weight_hh.grad is not None
