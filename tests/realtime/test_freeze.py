"""rnnkern.freeze: what it takes, and what a frozen module is when it is copied, saved or moved."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from freezing import FORMATS, NAMES, Model, equal, input_of, module, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkern


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
