"""Calls of frozen modules under all that torch does to a call."""

import io
import sys
from typing import Any

import pytest
import torch
from freezing import FORMATS, NAMES, Model, equal, input_of, module, run
from torch import Tensor, nn
from twins import flat, pack

import rnnkern


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_refused(name: str) -> None:
    layer = module(name)
    frozen, x = rnnkern.freeze(layer), input_of(layer)
    assert not any(t.requires_grad for t in flat(frozen(x)))
    state = layer(x) if name.endswith("Cell") else layer(x)[1]
    for args in ((x.clone().requires_grad_(),), (x, state)):
        with pytest.raises(RuntimeError, match=f"Frozen{name} is frozen: no gradient passes"):
            frozen(*args)
        with torch.no_grad():
            frozen(*args)
    if not name.endswith("Cell"):
        packed = pack(x.clone().requires_grad_(), [2, 4])
        with pytest.raises(RuntimeError, match="no gradient passes"):
            frozen(packed)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_errors_are_the_layers(name: str) -> None:
    layer = module(name)
    frozen, x = rnnkern.freeze(layer), input_of(layer)
    h = torch.zeros(*((2, 6) if name.endswith("Cell") else (1, 2, 6)))
    hx = (h, h) if name.startswith("LSTM") else h
    calls: list[tuple[Any, ...]] = [
        (x[..., :4],), (x.double(),), (x.int(),), (x.to("meta"),), (x[..., 0, 0],),
        (x[None, None],), (None,), (x.numpy(),), (x, (h,)), (x, (h, h, h)), (x, h[..., :3]),
        (x, h[..., 0]),
        (x, h.double()), (x, "h"),
    ]  # fmt: skip
    if not name.endswith("Cell"):
        calls += [(x[:0],), (x, (h, h[..., :1])), (pack(x, [2, 4]), h[:, :1])]
        assert equal(flat(frozen(x[:, :0])), flat(layer(x[:, :0])))
    found = []
    for args in calls:
        try:
            layer(*args)
        except Exception as error:
            with pytest.raises(type(error)) as caught:
                frozen(*args)
            found.append((str(caught.value), str(error)))
    for mine, the_layers in found:
        assert mine == the_layers
    assert equal(flat(frozen(x, hx)), flat(layer(x, hx)))


class Subclass(Tensor):
    """Passes every function on."""


INPUTS = {
    "parameter": nn.Parameter,
    "subclass": lambda x: x.as_subclass(Subclass),
    "strides": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "negative": lambda x: torch.complex(x, -x).conj().imag,
    "sparse": lambda x: x.to_sparse(),
    "no memory": lambda x: _without_memory(x.clone()),
}


def _without_memory(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_other_inputs(name: str, kind: str, weights: str) -> None:
    """As the layer: the same result or an error of the same kind."""
    layer = module(name)
    frozen, x = rnnkern.freeze(layer, weights), INPUTS[kind](input_of(layer))
    try:
        expected = flat(layer(x))
    except Exception as error:
        with pytest.raises((type(error), RuntimeError)):
            frozen(x)
    else:
        if weights == "float32":
            assert equal(flat(frozen(x)), expected)
        elif kind != "sparse":
            dense = x.as_subclass(Tensor).contiguous().clone()
            assert equal(flat(frozen(x)), flat(frozen(dense)))


@pytest.mark.parametrize("native", [False, True])
@torch.inference_mode()
def test_both_entries(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    if not native:
        monkeypatch.setattr(sys.modules["rnnkern.ops.autograd"], "NATIVE", None)
    for name in NAMES:
        layer = module(name)
        frozen, x = rnnkern.freeze(layer), input_of(layer)
        state = frozen(x) if name.endswith("Cell") else frozen(x)[1]
        assert equal(flat(frozen(x, state)), flat(layer(x, state)))


@torch.inference_mode()
def test_batch_first_may_change() -> None:
    layer = module("LSTM", 5, 6, batch_first=True, num_layers=2)
    frozen, x = rnnkern.freeze(layer), input_of(layer)
    assert equal(run(frozen, x), run(layer, x))
    layer.batch_first = frozen.batch_first = False
    assert equal(run(frozen, x), run(layer, x))


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_autocast_changes_nothing(name: str) -> None:
    frozen = rnnkern.freeze(module(name))
    x = input_of(frozen)
    expected = run(frozen, x)
    state = frozen(x) if name.endswith("Cell") else frozen(x)[1]
    after = run(frozen, x, state)
    with torch.autocast("cpu"):
        assert equal(run(frozen, x), expected)
        assert equal(run(frozen, x, state), after)
        assert equal(run(frozen, x.bfloat16()), run(frozen, x.bfloat16().float()))


@torch.inference_mode()
def test_settings_for_products_change_nothing() -> None:
    frozen = rnnkern.freeze(rnnkern.GRU(64, 128))
    x = torch.randn(32, 32, 64)
    expected = run(frozen, x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert equal(run(frozen, x), expected)
        assert str(rnnkern.explain(frozen, x)) == "fused: rnnkern's kernels"
        assert torch.equal(rnnkern.trace(frozen, x).hidden, expected[0])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("weights", FORMATS)
@torch.inference_mode()
def test_vmap_and_jvp(weights: str) -> None:
    """Transforms take the decomposition, which has no rounded weights."""
    layer = module("GRU")
    frozen, x = rnnkern.freeze(layer, weights), torch.randn(3, 4, 2, 5)
    for transformed in (
        lambda m: torch.vmap(lambda one: m(one)[0])(x),
        lambda m: torch.func.jvp(lambda one: m(one)[0], (x[0],), (x[1],))[1],
    ):
        if weights == "float32":
            torch.testing.assert_close(transformed(frozen), transformed(layer))
        else:
            with pytest.raises(
                RuntimeError, match=f"weights in {weights} are for rnnkern's kernels"
            ):
                transformed(frozen)


def test_trace_and_explain() -> None:
    layer = module("LSTM", 5, 6, num_layers=2)
    frozen, x = rnnkern.freeze(layer), input_of(layer)
    found, expected = rnnkern.trace(frozen, x), rnnkern.trace(layer, x)
    assert torch.equal(found[1, 0].hidden, expected[1, 0].hidden)
    assert torch.equal(found.gates["forget"], expected.gates["forget"])
    assert rnnkern.explain(frozen, x).name == "fused"
    with pytest.raises(RuntimeError, match="weights in int8 are for rnnkern's kernels alone"):
        rnnkern.trace(rnnkern.freeze(layer, "int8"), x)


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("weights", FORMATS)
@torch.no_grad()
def test_compile(weights: str) -> None:
    torch.compiler.reset()
    frozen = rnnkern.freeze(Model(), weights)
    x = torch.randn(2, 3, 5)
    compiled = torch.compile(frozen, fullgraph=True)
    torch.testing.assert_close(compiled(x), frozen(x))
    frozen.encoder.refresh(rnnkern.LSTM(6, 6, 2, batch_first=True, bidirectional=True))
    torch.testing.assert_close(compiled(x), frozen(x))


@pytest.mark.compiler
def test_compile_refuses_gradients() -> None:
    torch.compiler.reset()
    frozen = rnnkern.freeze(module("LSTM"))
    compiled = torch.compile(frozen, backend="eager")
    with pytest.raises(Exception, match="no gradient passes"):
        compiled(torch.randn(4, 2, 5, requires_grad=True))


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(strict: bool) -> None:
    """The program has the weights, not what this machine made of them."""
    model = Model()
    x = torch.randn(2, 3, 5)
    frozen = rnnkern.freeze(model)
    program = torch.export.export(frozen, (x,), strict=strict)
    operators = {str(node.target) for node in program.graph.nodes if "rnnkern" in str(node.target)}
    assert operators == {"rnnkern.forward.default"}
    tensors = [*program.state_dict.values(), *program.constants.values()]
    assert not any(t.dtype == torch.uint8 for t in tensors if isinstance(t, Tensor))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), frozen(x))


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@torch.no_grad()
def test_export_of_rounded_weights_is_refused(name: str) -> None:
    frozen = rnnkern.freeze(module(name), "int8")
    with pytest.raises(RuntimeError, match="weights in int8 are for rnnkern's kernels alone"):
        torch.export.export(frozen, (input_of(frozen),), strict=False)


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_torchscript() -> None:
    layer = module("LSTM")
    model, x = nn.Sequential(layer), input_of(layer)
    frozen, expected = rnnkern.freeze(model), layer(x)[0]
    torch.testing.assert_close(torch.jit.script(frozen)(x)[0], expected)
    torch.testing.assert_close(torch.jit.trace(frozen, (x,))(x)[0], expected)
    rounded = rnnkern.freeze(model, "bfloat16")
    for act in (torch.jit.script, lambda m: torch.jit.trace(m, (x,))):
        with pytest.raises(RuntimeError, match="weights in bfloat16 are for rnnkern's kernels"):
            act(rounded)


def test_fx_sees_a_leaf() -> None:
    graph = torch.fx.symbolic_trace(rnnkern.freeze(Model()))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"][:2] == [
        "embedding",
        "encoder",
    ]
    x = torch.randn(2, 3, 5)
    with torch.no_grad():
        assert graph(x).shape == (2, 4)
