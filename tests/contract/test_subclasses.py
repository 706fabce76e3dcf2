"""Every tensor of a call may be of a subclass: weights and states too, not the input alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from twins import CELLS, LAYERS, close, flat, loss, pack, state, twins

import rnnkern


class Marked(Tensor):
    """A subclass that only carries its type."""


class Scaled(Tensor):
    """Stands for a multiple of its data, which every function of torch is to see."""

    factor = 3.0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.device.__get__):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(cls.value, (args, kwargs or {}))
            return func(*args, **kwargs)

    @classmethod
    def value(cls, t: Any) -> Any:
        return t.as_subclass(Tensor) * cls.factor if isinstance(t, Scaled) else t


class AtenOnly(Tensor):
    """A wrapper that passes torch's own operators to its tensor, and knows no others."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "AtenOnly":
        new = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not str(func).startswith(("aten.", "prim.")):
            raise NotImplementedError(f"{cls.__name__} does not know {func}")

        def unwrap(t: Any) -> Any:
            return t.inner if isinstance(t, AtenOnly) else t

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        out = tree_map(lambda t: AtenOnly(t) if isinstance(t, Tensor) else t, out)
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


def arguments(name: str, packed: bool = False) -> tuple[Any, Any]:
    """Input and hx for a module of 3 inputs and 4 units."""
    if name in CELLS:
        return torch.randn(2, 3), state(name, 2, 4)
    x = torch.randn(5, 2, 3)
    return (pack(x, [5, 3]) if packed else x), state(name, 1, 2, 4)


def as_class(cls: type[Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.as_subclass(cls)
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.as_subclass(cls))
    return type(value)(as_class(cls, v) for v in value)


def types_of(result: Any) -> list[type]:
    return [type(t) for t in flat(result)]


PLACES = ["input", "hx", "weight"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_types_are_torchs(name: str, place: str, packed: bool) -> None:
    """Results have the type that torch.nn's have, and the values of plain tensors."""
    if packed and name in CELLS:
        pytest.skip("cells take no packed sequences")
    x, hx = arguments(name, packed)
    found = []
    for module in twins(name, 3, 4):
        plain = flat(module(x, hx))
        if place == "weight":
            first = next(n for n, _ in module.named_parameters())
            weight = nn.Parameter(getattr(module, first).detach().as_subclass(Marked))
            setattr(module, first, weight)
            assert type(weight) is Marked
        given = as_class(Marked, x) if place == "input" else x
        result = module(given, as_class(Marked, hx) if place == "hx" else hx)
        close([t.as_subclass(Tensor) for t in flat(result)], plain, 1e-6)
        loss(result).backward()
        assert all(p.grad is not None for p in module.parameters())
        found.append(types_of(result))
    assert found[0] == found[1]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_functions_are_seen(name: str, place: str) -> None:
    """A class with a `__torch_function__` of its own is asked, and its numbers are used."""
    x, hx = arguments(name)
    (theirs, ours), (plain, _) = twins(name, 3, 4), twins(name, 3, 4)
    if place == "weight":
        for p in plain.parameters():
            p.data *= Scaled.factor
        for module in (theirs, ours):
            for n, p in list(module.named_parameters()):
                delattr(module, n)
                setattr(module, n, p.detach().as_subclass(Scaled))
    given = as_class(Scaled, x) if place == "input" else x
    before = as_class(Scaled, hx) if place == "hx" else hx
    expected = flat(plain(*(tree_map(Scaled.value, value) for value in (given, before))))
    for module in (theirs, ours):
        close(flat(module(given, before)), expected)
    assert rnnkern.explain(ours, given, before).name == "torch"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_dispatch_classes_that_know_aten_only(name: str, place: str) -> None:
    x, hx = arguments(name)
    theirs, ours = twins(name, 3, 4)
    expected = flat(theirs(x, hx))
    if place == "weight":
        for n, p in list(ours.named_parameters()):
            delattr(ours, n)
            setattr(ours, n, AtenOnly(p.detach()))
    given = AtenOnly(x) if place == "input" else x
    if place == "hx":
        hx = tuple(map(AtenOnly, hx)) if isinstance(hx, tuple) else AtenOnly(hx)
    assert rnnkern.explain(ours, given, hx).name == "composite"
    result = flat(ours(given, hx))
    assert all(type(t) is AtenOnly for t in result)
    close([t.inner for t in result], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_wrappers_of_two_tensors(name: str) -> None:
    layer = getattr(rnnkern, name)(3, 4, 2)
    x = torch.randn(5, 2, 3)
    both = layer(TwoTensor(x, x.clone() * 2))
    assert type(both[0]) is TwoTensor
    close([both[0].a, both[0].b], [layer(x)[0], layer(x * 2)[0]])
