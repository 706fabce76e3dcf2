"""torch's settings that let float32 products round their factors to bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from twins import LAYERS, flat, loss, pack, state, twins

import rnnkern
from rnnkern import precision
from rnnkern.ops import autograd

BACKENDS = {"matmul": torch.backends.mkldnn.matmul, "rnn": torch.backends.mkldnn.rnn}


@contextmanager
def setting(*operations: str) -> Iterator[None]:
    before = {name: backend.fp32_precision for name, backend in BACKENDS.items()}
    for name, backend in BACKENDS.items():
        backend.fp32_precision = "bf16" if name in operations else "ieee"
    try:
        yield
    finally:
        for name, backend in BACKENDS.items():
            backend.fp32_precision = before[name]


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is not multiplied as it is, its factors are rounded all the same."""
    monkeypatch.setattr(precision, "_FAST", True)


def results(layer: torch.nn.Module, x: Any, hx: Any = None) -> list[Tensor]:
    """Output, states, and all gradients."""
    data = x.data if isinstance(x, PackedSequence) else x
    leaf = data.detach().clone().requires_grad_()
    fed = PackedSequence(leaf, *x[1:]) if isinstance(x, PackedSequence) else leaf
    out = layer(fed, hx)
    layer.zero_grad()
    loss(out).backward()
    return [t.detach() for t in flat(out)] + [leaf.grad, *(p.grad for p in layer.parameters())]


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error among the tensors."""
    return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("form", ["padded", "packed", "one sequence", "with hx"])
def test_rounds_where_allowed(name: str, kwargs: dict[str, Any], form: str) -> None:
    """float32 in and out, as near to float64 as rounded factors are, and not nearer."""
    torch.manual_seed(1)
    steps, batch = (600, 1) if form == "one sequence" else (25, 25)
    exact, ours = twins(name, 64, 64, **kwargs)
    exact = exact.double()
    x = (
        torch.randn(batch, steps, 64)
        if kwargs.get("batch_first")
        else torch.randn(steps, batch, 64)
    )
    hx = hx_exact = None
    if form == "packed":
        x = pack(x, [25, 24, 23, *[22] * 22], kwargs.get("batch_first", False))
    elif form == "one sequence":
        x = x.flatten(0, 1)
    elif form == "with hx":
        count = kwargs.get("num_layers", 1) * (1 + kwargs.get("bidirectional", False))
        hx = state(name, count, batch, 64)
        hx_exact = state(name, count, batch, 64, dtype=torch.float64)
    wide = x.to(torch.float64)
    want = results(exact, wide, hx_exact)
    with setting("matmul", "rnn"):
        got = results(ours, x, hx)
    assert {t.dtype for t in got} == {torch.float32}
    assert 1e-4 < error(got, want) < 2e-2
    with setting():
        assert error(results(ours, x, hx), want) < 1e-5


@pytest.mark.parametrize("library", ["C++", "Python"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_rounded_weight_is_kept(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the passes the graph keeps the weights themselves, as torch.nn's does."""
    if library == "Python":
        monkeypatch.setattr(autograd, "NATIVE", None)
    layer = getattr(rnnkern, name)(64, 64, 2)
    x = torch.randn(25, 25, 64)
    shapes = {p.shape for p in layer.parameters()}
    kept: list[Tensor] = []
    with (
        setting("matmul", "rnn"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        output = layer(x)[0]
    assert rnnkern.explain(layer, x).name == "fused"
    assert any(t.dtype == torch.bfloat16 for t in kept)
    weights = [t for t in kept if t.shape in shapes and t.dtype == torch.float32]
    assert {t.data_ptr() for t in weights} == {p.data_ptr() for p in layer.parameters()}
    assert not [t for t in kept if t.shape in shapes and t.dtype == torch.bfloat16]
    grads = torch.autograd.grad(output.sum(), list(layer.parameters()), create_graph=True)
    assert all(g.dtype == torch.float32 and g.requires_grad for g in grads)


@pytest.mark.parametrize("name", LAYERS)
def test_each_cell_follows_torch(name: str) -> None:
    """torch.nn's GRU and RNN multiply by at::linear, its LSTM is an operation of oneDNN's."""
    layer = getattr(rnnkern, name)(64, 64)
    x = torch.randn(25, 25, 64)
    with setting():
        exact = layer(x)[0]
    for operation in BACKENDS:
        with setting(operation):
            rounded = not torch.equal(layer(x)[0], exact)
        assert rounded == ((operation == "rnn") == (name == "LSTM"))


def test_follows_the_setting_for_matrix_products() -> None:
    """set_float32_matmul_precision("medium") is the setting of products."""
    gru = rnnkern.GRU(64, 64)
    x = torch.randn(25, 25, 64)
    exact = gru(x)[0]
    before = BACKENDS["matmul"].fp32_precision
    try:
        torch.set_float32_matmul_precision("medium")
        assert not torch.equal(gru(x)[0], exact)
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(gru(x)[0], exact)
    finally:
        BACKENDS["matmul"].fp32_precision = before


@pytest.mark.parametrize(
    ("sizes", "kwargs", "steps", "dtype"),
    [
        ((64, 64), {}, 7, torch.float32),  # too few steps
        ((2, 62), {}, 200, torch.float32),  # too few units
        ((65, 64), {}, 20, torch.float32),  # odd
        ((64, 128), {"proj_size": 64}, 20, torch.float32),
        ((64, 64), {}, 20, torch.float64),
    ],
)
def test_all_else_stays_exact(
    sizes: tuple[int, int], kwargs: dict[str, int], steps: int, dtype: torch.dtype
) -> None:
    lstm = rnnkern.LSTM(*sizes, **kwargs).to(dtype)
    x = torch.randn(steps, 100, sizes[0], dtype=dtype)
    with setting():
        exact = flat(lstm(x))
    with setting("matmul", "rnn"):
        assert all(map(torch.equal, flat(lstm(x)), exact))


@pytest.mark.compiler
def test_compiled_graphs_stay_exact() -> None:
    gru = rnnkern.GRU(64, 64)
    x = torch.randn(25, 25, 64)
    with setting():
        exact = gru(x)[0]
    with setting("matmul"):
        assert torch.equal(torch.compile(gru, backend="eager", fullgraph=True)(x)[0], exact)


def test_trace_sees_what_was_computed() -> None:
    gru = rnnkern.GRU(64, 64)
    x = torch.randn(25, 25, 64)
    with setting("matmul"):
        trace = rnnkern.trace(gru, x)
        assert torch.equal(trace.output, gru(x)[0])
    assert torch.equal(trace[0, 0].hidden.float(), trace.output)


@pytest.mark.parametrize("form", ["padded", "packed", "one sequence"])
def test_explain_and_plan_say_so(form: str) -> None:
    gru = rnnkern.GRU(64, 64, batch_first=True)
    x = {
        "padded": torch.randn(24, 25, 64),
        "packed": pack(torch.randn(24, 25, 64), [25, *[24] * 23], True),
        "one sequence": torch.randn(600, 64),
    }[form]
    narrow = x.to(torch.bfloat16)
    with setting("matmul"):
        assert "bfloat16" in str(rnnkern.explain(gru, x))
        assert rnnkern.plan(gru, x) == rnnkern.plan(gru.bfloat16(), narrow)
    with setting():
        assert "bfloat16" not in str(rnnkern.explain(gru.float(), x))


def test_errors_are_the_same() -> None:
    """A state of another dtype is not converted silently."""
    gru = rnnkern.GRU(64, 64)
    x, h = torch.randn(25, 25, 64), torch.zeros(1, 25, 64, dtype=torch.float64)
    for operations in ((), ("matmul",)):
        with (
            setting(*operations),
            pytest.raises(RuntimeError, match="state h_0 and input differ in dtype"),
        ):
            gru(x, h)
