"""A tensor that comes before a parameter in `getattr(module, name)` is the weight of the call.

torch.nn looks every weight up that way at every call. Each test lays tensors over the parameters of
torch.nn's module and of ours in one way, and compares results and the tensors' gradients.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from twins import CELLS, LAYERS, close, flat, loss, twins

import rnnkern
from rnnkern.nn import cells, layers, weights


@pytest.fixture(params=["whole call", "C++", "Python"], autouse=True)
def lookup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways to recognise the usual call: where C++ does all of it, or its weights alone."""
    if request.param != "whole call" and weights.NATIVE is not None:
        for function in ("plain_layer", "plain_cell"):
            monkeypatch.setattr(weights.NATIVE, function, lambda *_: None)
    if request.param == "Python":
        for room in (layers, cells):
            monkeypatch.setattr(room, "registered_weights", weights._registered_weights)
    elif weights.NATIVE is None:
        pytest.skip("the C++ library is not built for this torch")


def names_of(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def drawn(module: nn.Module) -> dict[str, Tensor]:
    """Other values for every weight, leaves that need a gradient."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(p.shape, generator=generator).mul_(0.3).requires_grad_()
        for name, p in module.named_parameters()
    }


def input_of(module: nn.Module) -> Tensor:
    shape = (2, 3) if isinstance(module, nn.RNNCellBase) else (5, 2, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def same(
    theirs: nn.Module, ours: nn.Module, over: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    """Both modules, after one plain call and `over`, give the same and train the same tensors."""
    found = []
    for module in (theirs, ours):
        module(input_of(module))
        laid = over(module)
        result = module(input_of(module))
        wanted = [*laid.values(), *module.parameters()]
        grads = torch.autograd.grad(loss(result), wanted, allow_unused=True)
        found.append(
            (flat(result), [g is None for g in grads], [g for g in grads if g is not None])
        )
    close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    close(found[1][2], found[0][2])


@pytest.mark.parametrize("name", LAYERS)
def test_overridden_refresh(name: str) -> None:
    """A subclass that writes its own weights into the flat list (weight dropout, LoRA)."""

    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = drawn(module)

        class Mine(type(module)):  # type: ignore[misc]
            def _update_flat_weights(self) -> None:
                self._flat_weights = list(laid.values())

        module.__class__ = Mine
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", LAYERS)
def test_overridden_change_test(name: str, where: str) -> None:
    """`_weights_have_changed` that always says yes makes torch.nn read every weight anew."""

    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = drawn(module)
        if where == "class":
            members = {"_weights_have_changed": lambda self: True}
            module.__class__ = type("Mine", (type(module),), members)
        else:
            module._weights_have_changed = lambda: True
        vars(module).update(laid)
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_instance_attribute(name: str, count: int) -> None:
    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = dict(list(drawn(module).items())[:count])
        vars(module).update(laid)
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_class_attribute(name: str) -> None:
    """Properties of a class that is swapped in later, as parametrizations do."""

    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = drawn(module)
        members = {n: property(lambda self, n=n: laid[n]) for n in laid}
        module.__class__ = type("Mine", (type(module),), members)
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("hook", ["__getattr__", "__getattribute__"])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_overridden_lookup(name: str, hook: str) -> None:
    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = drawn(module)
        original = getattr(type(module), hook)

        def get(self: nn.Module, attribute: str) -> object:
            return laid[attribute] if attribute in laid else original(self, attribute)

        module.__class__ = type("Mine", (type(module),), {hook: get})
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_lookup_patched_on_the_class_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute set on our own class reaches modules that have been called before."""

    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = drawn(module)
        for key, value in laid.items():
            monkeypatch.setattr(type(module), key, value, raising=False)
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("name", LAYERS)
def test_list_assigned(name: str) -> None:
    """`higher` assigns the flat list; torch.nn then uses it as long as no parameter changes."""

    def over(module: nn.Module) -> dict[str, Tensor]:
        laid = drawn(module)
        module._flat_weights = list(laid.values())
        return laid

    same(*twins(name, 3, 4), over)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_dropout_in_a_converted_subclass(name: str) -> None:
    """The real weight is trained through the dropped one, in `rnnkern.convert`ed code too."""
    base = getattr(nn, name)

    class Dropped(base):  # type: ignore[misc, valid-type]
        def _update_flat_weights(self) -> None:
            raw = self.weight_hh_l0
            mask = torch.arange(raw.numel()).reshape(raw.shape) % 2
            self._flat_weights = [
                raw * mask if n == "weight_hh_l0" else getattr(self, n)
                for n in self._flat_weights_names
            ]

    theirs = Dropped(3, 4)
    ours = rnnkern.convert(Dropped(3, 4))
    ours.load_state_dict(theirs.state_dict())
    assert rnnkern.explain(ours, input_of(ours)).name == "fused"
    same(theirs, ours, lambda module: {})


def usual_modules() -> Iterator[nn.Module]:
    yield from (rnnkern.LSTM(3, 4, 2, bidirectional=True), rnnkern.GRU(3, 4, bias=False))
    yield from (rnnkern.LSTMCell(3, 4), rnnkern.GRUCell(3, 4, bias=False))


def test_the_usual_call_is_recognised() -> None:
    """Nothing laid over: the parameters themselves, in order, and no question to torch's code."""
    for module in usual_modules():
        cell = isinstance(module, nn.RNNCellBase)
        names = cells._NAMES if cell else module._flat_weights_names
        found = (cells if cell else layers).registered_weights(
            module, names, None if cell else module._flat_weights, input_of(module), None
        )
        assert [id(w) for w in found] == [id(p) for p in module.parameters()]
