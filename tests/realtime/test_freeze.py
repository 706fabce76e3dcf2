"""rnnkern.freeze: what it takes, and what a frozen module is under all that torch does to one."""

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence
from twins import flat, pack

import rnnkern
from rnnkern.ops import library

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
FORMATS = ("float32", "bfloat16", "int8")


class Wrapped(nn.LSTM):
    """Delegates: freezing keeps what it does around the layer."""

    def __init__(self, *args: Any, scale: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        output, _ = super().forward(input * self.scale, hx)
        return output


class OnOurs(rnnkern.GRU):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return super().forward(input, hx)[0]


class Replaces(nn.GRU):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return input @ self.weight_ih_l0.T


class Model(nn.Module):
    """Layers, a cell, a layer that is used twice, and parameters that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 6)
        self.encoder = nn.LSTM(6, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.shared = rnnkern.GRU(12, 12)
        self.again = self.shared
        self.cell = nn.GRUCell(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.encoder(self.embedding(x))
        x, _ = self.shared(x)
        x, _ = self.again(x)
        return self.cell(x[:, 0])


def module(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(rnnkern, name)(*(args or (5, 6)), **kwargs)


def input_of(m: nn.Module, **kwargs: Any) -> Tensor:
    shape = (2, 5) if isinstance(m, nn.RNNCellBase) else (4, 2, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(**kwargs)


def run(m: nn.Module, *args: Any) -> list[Tensor]:
    with torch.inference_mode():
        return flat(m(*args))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# What is frozen.


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = getattr(nn, name)(5, 6), module(name)
    frozen = rnnkern.freeze(theirs)
    assert type(theirs) is getattr(nn, name)
    assert list(frozen.parameters()) == []
    assert equal(run(frozen, input_of(theirs)), run(ours, input_of(theirs)))


def test_a_model() -> None:
    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    frozen = rnnkern.freeze(model)
    assert frozen.shared is frozen.again
    assert [name for name, _ in frozen.named_parameters()] == ["embedding.weight", "embedding.bias"]
    assert type(model.encoder) is nn.LSTM
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    x = torch.randn(2, 3, 5)
    expected = run(rnnkern.convert(copy.deepcopy(model)), x)
    assert equal(run(frozen, x), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert equal(run(frozen, x), expected)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("cls", [Wrapped, OnOurs])
def test_subclasses(cls: type[nn.Module], converted: bool) -> None:
    layer = cls(5, 6)
    if converted:
        rnnkern.convert(layer)
    frozen = rnnkern.freeze(layer)
    assert isinstance(frozen, cls)
    assert cls.__name__ in repr(frozen)
    x = input_of(layer)
    expected = run(rnnkern.convert(copy.deepcopy(layer)), x)
    for same in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(same) is type(frozen)
        assert equal(run(same, x), expected)
    assert frozen.stream(2)(x).shape == (4, 2, 6)


@pytest.mark.parametrize("converted", [False, True])
def test_parametrised(converted: bool) -> None:
    layer = parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
    parametrize.register_parametrization(layer, "weight_ih_l0", nn.Dropout(0.5))
    if converted:
        rnnkern.convert(layer)
    frozen = rnnkern.freeze(layer)
    assert parametrize.is_parametrized(layer)
    assert layer.training
    assert not parametrize.is_parametrized(frozen)
    x = input_of(layer)
    for found, expected in zip(run(frozen, x), run(rnnkern.convert(layer).eval(), x), strict=True):
        torch.testing.assert_close(found, expected)  # weight_norm's own bits depend on the mode
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not equal(run(rnnkern.freeze(layer), x), run(frozen, x))


def test_the_originals_reparametrisation_is_untouched() -> None:
    """In training mode, spectral_norm changes its buffers when a weight is looked at."""
    layer = parametrizations.spectral_norm(nn.LSTM(5, 6), "weight_hh_l0")
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    rnnkern.freeze(layer)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.weight_hh_l0.requires_grad


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_older_reparametrisations() -> None:
    layers = []
    for reparametrise in (
        lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
        lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
    ):
        layer = rnnkern.LSTM(5, 6).eval()
        reparametrise(layer)
        layers.append(layer)
    for layer in layers:
        x = input_of(layer)
        layer(x)
        frozen = rnnkern.freeze(layer)
        for found, expected in zip(run(frozen, x), run(layer, x), strict=True):
            torch.testing.assert_close(found, expected)
        assert sorted(frozen.state_dict()) == sorted(rnnkern.LSTM(5, 6).state_dict())


def test_a_tensor_over_a_parameter() -> None:
    layer = module("LSTM")
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
    del layer._parameters["weight_ih_l0"]
    layer.weight_ih_l0 = torch.randn(24, 5, requires_grad=True) * 2  # no leaf
    x = input_of(layer)
    assert equal(run(rnnkern.freeze(layer), x), run(layer, x))


def test_frozen_again() -> None:
    layer = module("LSTM")
    frozen = rnnkern.freeze(layer)
    again = rnnkern.freeze(frozen, "bfloat16")
    x = input_of(layer)
    assert equal(run(again, x), run(rnnkern.freeze(layer, "bfloat16"), x))
    assert equal(run(rnnkern.freeze(again), x), run(layer, x))


def test_convert_and_revert_leave_it_alone() -> None:
    frozen = rnnkern.freeze(Model())
    before = [type(m) for m in frozen.modules()]
    rnnkern.revert(rnnkern.convert(frozen))
    assert [type(m) for m in frozen.modules()] == before


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: nn.GRUCell(0, 4), "a size is zero"),
        (lambda: nn.LSTM(4, 4, dtype=torch.complex64), "its weights are torch.complex64"),
        (lambda: nn.LSTM(4, 4, device="meta"), "its weights are on meta"),
        (lambda: nn.GRUCell(4, 4, device="meta"), "its weights are on meta"),
        (lambda: Replaces(4, 4), "Replaces overrides forward"),
        (lambda: _mixed(), "its weights are both torch.float32 and torch.float64"),
        (lambda: _unknown(), "its nonlinearity is 'sin'"),
        (lambda: _own_forward(), "it has a forward of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_refusals(make: Any, error: str) -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.Sequential(make()))
    with pytest.raises(ValueError, match=rf"^1\.0 cannot be frozen: {error}"):
        rnnkern.freeze(model)
    assert type(model[0]) is nn.LSTM
    with pytest.raises(ValueError, match=f"^the module itself cannot be frozen: {error}"):
        rnnkern.freeze(model[1][0])


def _mixed() -> nn.Module:
    layer = nn.GRU(4, 4)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.double())
    return layer


def _unknown() -> nn.Module:
    cell = nn.RNNCell(4, 4)
    cell.nonlinearity = "sin"
    return cell


def _own_forward() -> nn.Module:
    layer = nn.GRU(4, 4)
    layer.forward = lambda x: x
    return layer


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        rnnkern.freeze({})
    assert isinstance(rnnkern.freeze(nn.Linear(2, 2)), nn.Linear)


# A frozen module.


def test_repr() -> None:
    frozen = rnnkern.freeze(module("LSTM", 5, 6, num_layers=2, dtype=torch.float64))
    assert (
        repr(frozen) == "FrozenLSTM(5, 6, num_layers=2, frozen snapshot of its weights in float64)"
    )
    assert "weights in int8)" in repr(rnnkern.freeze(module("GRUCell"), "int8"))


def test_train_has_no_effect() -> None:
    layer = module("LSTM", 5, 6, num_layers=2, dropout=0.5)
    model = nn.ModuleList([rnnkern.freeze(layer)]).train()
    assert not model[0].training
    assert equal(run(model[0], input_of(layer)), run(layer.eval(), input_of(layer)))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str, weights: str) -> None:
    frozen = rnnkern.freeze(module(name), weights)
    x = input_of(frozen)
    expected = run(frozen, x)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    for same in (
        copy.copy(frozen),
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(file, weights_only=False),
    ):
        assert equal(run(same, x), expected)
        assert repr(same) == repr(frozen)
    assert b"_prepacked" not in pickle.dumps(frozen)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_state_dict(name: str, weights: str) -> None:
    """It is the layer's, both ways; what is loaded is packed anew."""
    layer = module(name)
    frozen = rnnkern.freeze(layer, weights)
    theirs = getattr(nn, name)(5, 6)
    theirs.load_state_dict(frozen.state_dict())
    assert equal(list(theirs.parameters()), list(layer.parameters()))
    other = getattr(nn, name)(5, 6)
    x = input_of(layer)
    for assign in (False, True):
        frozen.load_state_dict(other.state_dict(), assign=assign)
        assert equal(run(frozen, x), run(rnnkern.freeze(other, weights), x))
        frozen.load_state_dict(layer.state_dict(), assign=assign)
    before = run(frozen, x)
    with pytest.raises(RuntimeError, match="size mismatch"):
        frozen.load_state_dict(module(name, 5, 7).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        frozen.load_state_dict({})
    assert equal(run(frozen, x), before)


def test_state_dict_of_a_model() -> None:
    model, other = Model(), Model()
    frozen = rnnkern.freeze(model)
    frozen.load_state_dict(other.state_dict())
    model.load_state_dict(frozen.state_dict())
    x = torch.randn(2, 3, 5)
    assert equal(run(frozen, x), run(rnnkern.convert(other), x))
    assert equal(run(rnnkern.convert(model), x), run(other, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_to_another_dtype(name: str, dtype: torch.dtype) -> None:
    layer = module(name)
    frozen, x = rnnkern.freeze(layer), input_of(layer, dtype=dtype)
    assert frozen.to(dtype) is frozen
    assert equal(run(frozen, x), run(layer.to(dtype), x))
    rounded = rnnkern.freeze(module(name), "int8")
    before = run(rounded, x.float())
    with pytest.raises(ValueError, match="weights='int8' is for float32 layers, got"):
        rounded.to(dtype)
    assert rounded.state_dict()[next(iter(rounded.state_dict()))].dtype is torch.float32
    assert equal(run(rounded, x.float()), before)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_to_another_device(name: str) -> None:
    frozen = rnnkern.freeze(module(name))
    x = input_of(frozen)
    before = run(frozen, x)
    for act in (
        lambda: frozen.to("meta"),
        lambda: frozen.to_empty(device="meta"),
        lambda: frozen.to(torch.complex64),
        lambda: frozen.load_state_dict(module(name).to("meta").state_dict(), assign=True),
    ):
        with pytest.raises(
            ValueError, match=f"Frozen{name} cannot pack its weights: its weights are"
        ):
            act()
    assert equal(run(frozen, x), before)
    assert frozen.to("cpu").float() is frozen


def test_refresh() -> None:
    layer, other = module("LSTM", 5, 6, num_layers=2), rnnkern.LSTM(5, 6, num_layers=2)
    frozen = rnnkern.freeze(layer)
    x = input_of(layer)
    with torch.no_grad():
        frozen.weight_hh_l1.copy_(other.weight_hh_l1)
    assert equal(run(frozen, x), run(layer, x))  # a buffer is not read by a call
    frozen.refresh()
    assert not equal(run(frozen, x), run(layer, x))
    frozen.refresh(other)
    assert equal(run(frozen, x), run(other, x))
    for wrong in (rnnkern.LSTM(5, 6), rnnkern.LSTM(5, 7, 2), other.double(), rnnkern.GRU(5, 6, 2)):
        with pytest.raises(ValueError, match="other names, shapes or dtypes"):
            frozen.refresh(wrong)
    assert equal(run(frozen, x), run(other.float(), x))
    tanh, relu = (rnnkern.freeze(rnnkern.RNN(5, 6, nonlinearity=n)) for n in ("tanh", "relu"))
    with pytest.raises(ValueError, match="another cell"):
        tanh.refresh(relu)


def test_refresh_of_a_model() -> None:
    model, other = Model(), Model()
    frozen = rnnkern.freeze(model)
    other.embedding.load_state_dict(model.embedding.state_dict())
    x = torch.randn(2, 3, 5)
    rnnkern.refresh(frozen, other)
    expected = run(rnnkern.convert(copy.deepcopy(other)), x)
    assert equal(run(frozen, x), expected)
    with torch.no_grad():
        frozen.cell.bias_hh.add_(1)
    rnnkern.refresh(frozen)
    assert not equal(run(frozen, x), expected)
    rnnkern.refresh(frozen, frozen)
    before = run(frozen, x)
    del other.cell
    with pytest.raises(ValueError, match="the source has no module cell"):
        rnnkern.refresh(frozen, other)
    assert equal(run(frozen, x), before)


# Calls.


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


# The operators.


def prepacked(**changes: Any) -> tuple[Any, ...]:
    """The arguments of `forward_prepacked`, some of them others."""
    layer = rnnkern.LSTM(4, 6)
    weights = [p.detach() for p in layer.parameters()]
    spec = (0, 1, True, False, False)
    args = {
        "input": torch.randn(3, 2, 4),
        "batch_sizes": None,
        "h_0": None,
        "c_0": None,
        "prepacked": library.prepack(weights, *spec, 0),
        "spec": spec,
        "hidden_size": 6,
        "proj_size": 0,
    } | changes
    return (*list(args.values())[:5], *args["spec"], args["hidden_size"], args["proj_size"])


@pytest.mark.parametrize(
    "changes",
    [
        {"prepacked": torch.zeros(10, dtype=torch.uint8)},
        {"prepacked": torch.zeros(10_000, dtype=torch.uint8)},
        {"prepacked": torch.zeros(10_000)},
        {"spec": (1, 1, True, False, False)},
        {"spec": (0, 2, True, False, False)},
        {"spec": (0, 1, True, True, False)},
        {"hidden_size": 5},
        {"proj_size": 3},
        {"input": torch.randn(3, 2, 5)},
        {"input": torch.randn(3, 2, 4, dtype=torch.float64)},
        {"h_0": torch.zeros(1, 2, 6), "c_0": torch.zeros(1, 2, 7)},
        {"h_0": torch.zeros(1, 3, 6), "c_0": torch.zeros(1, 3, 6)},
    ],
)
def test_operator_refuses(changes: dict[str, Any]) -> None:
    library.forward_prepacked(*prepacked())
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.forward_prepacked(*prepacked(**changes))


def test_operator_refuses_other_memory() -> None:
    """Cut off, moved off its alignment, and packed at another level."""
    args = prepacked()
    memory = args[4]
    moved = torch.zeros(len(memory) + 1, dtype=torch.uint8)[1:].copy_(memory)
    other = memory.clone()
    level = library.info()["isa"].encode()
    at = bytes(memory.numpy()).index(level)
    other[at] += 1
    for wrong in (memory[:-1], memory[:64], moved, other):
        with pytest.raises(RuntimeError, match="rnnkern: "):
            library.forward_prepacked(*args[:4], wrong, *args[5:])


@pytest.mark.parametrize("format", [-1, 3])
def test_prepack_refuses(format: int) -> None:
    weights = [p.detach() for p in rnnkern.LSTM(4, 6).parameters()]
    spec = (0, 1, True, False, False)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack(weights, *spec, format)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack([w.double() for w in weights], *spec, 2)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack(weights[:3], *spec, 0)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack([w.to("meta") for w in weights], *spec, 0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_fake_results(name: str, batch_first: bool) -> None:
    """Shapes, strides and dtypes of the operator's results without data."""
    frozen = rnnkern.freeze(module(name, 5, 6, bidirectional=True))
    spec = frozen._specs[batch_first]
    args = (torch.randn(4, 2, 5), None, None, None, frozen._prepacked[0], *spec, 6, 0)
    real = library.forward_prepacked(*args)
    fake = library.forward_prepacked(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
    with pytest.raises(RuntimeError, match="different devices"):
        library.forward_prepacked(args[0].to("meta"), *args[1:])


def test_packed_sequences_keep_their_order() -> None:
    layer = module("LSTM", 5, 6, num_layers=2, bidirectional=True)
    frozen = rnnkern.freeze(layer)
    packed = pack(torch.randn(4, 3, 5), [2, 4, 3])
    with torch.no_grad():
        found, expected = frozen(packed), layer(packed)
    assert isinstance(found[0], PackedSequence)
    assert torch.equal(found[0].unsorted_indices, expected[0].unsorted_indices)
    assert equal(flat(found), flat(expected))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_in_inference_mode(name: str) -> None:
    """Its buffers are ordinary tensors all the same."""
    layer = module(name)
    with torch.inference_mode():
        frozen = rnnkern.freeze(layer)
    other = getattr(nn, name)(5, 6)
    frozen.load_state_dict(other.state_dict())
    assert not any(w.is_inference() for w in frozen.buffers())
    x = input_of(layer)
    assert equal(run(frozen, x), run(rnnkern.convert(other), x))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_no_other_weights_are_held(name: str) -> None:
    """torch's list of a layer's weights is that of the buffers, whatever happened to them."""
    frozen = rnnkern.freeze(module(name))
    for act in (
        lambda: None,
        lambda: frozen.refresh(module(name)),
        lambda: frozen.load_state_dict(module(name).state_dict(), assign=True),
        lambda: frozen.double(),
    ):
        act()
        assert all(a is b for a, b in zip(frozen._flat_weights, frozen.buffers(), strict=True))
