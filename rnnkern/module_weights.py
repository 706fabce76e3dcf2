"""Which weights a call uses: a module's registered parameters, or what has been put over them.

torch.nn asks `getattr(module, name)` for every weight at every call. An attribute of the instance
or of its class comes before the parameter, and subclasses may override the lookup itself. The usual
call has none of that; it is recognised here without the cost of asking.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .autograd import NATIVE

#: Types with nothing between them and the kernels.
PLAIN = frozenset({Tensor, nn.Parameter})

# The methods by which torch.nn looks weights up; a class or an instance may override them.
_LOOKUPS = {
    "__getattribute__": object.__getattribute__,
    "__getattr__": nn.Module.__getattr__,
    "_update_flat_weights": nn.RNNBase._update_flat_weights,
    "_weights_have_changed": nn.RNNBase._weights_have_changed,
    "_init_flat_weights": nn.RNNBase._init_flat_weights,
}


def has_torch_lookups(module: nn.Module) -> bool:
    """Whether no method of torch.nn's that looks weights up is overridden in this module."""
    cls = type(module)
    return vars(module).keys().isdisjoint(_LOOKUPS) and all(
        getattr(cls, name, method) is method for name, method in _LOOKUPS.items()
    )


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in a tree of tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(*value)


def _registered_weights(
    module: nn.Module, names: Sequence[str], flat: list[Tensor] | None, input: Any, hx: Any
) -> list[Tensor] | None:
    own, cls = module._parameters, type(module)
    weights = [own.get(name) for name in names]
    if flat is None and weights[2:] == [None, None] and "bias_hh" in own:
        del weights[2:]
    usual = (
        (flat is None or (len(flat) == len(weights) and all(map(is_, weights, flat))))
        and PLAIN.issuperset(map(type, weights))
        and PLAIN.issuperset(map(type, tensors_in(input, hx)))
        and has_torch_lookups(module)
        and vars(module).keys().isdisjoint(names)
        and not any(hasattr(cls, name) for name in names)
    )
    return weights if usual else None  # type: ignore[return-value]


if NATIVE is not None:
    NATIVE.use_lookups(_LOOKUPS)

#: (module, names, flat, input, hx) -> the module's parameters of these names, where they are what
#: torch.nn would take (`flat`: a layer's list of them; None for a cell) and all tensors of the call
#: are plain. None where that is not so, or not sure: torch's own code is to be asked.
registered_weights = _registered_weights if NATIVE is None else NATIVE.registered_weights


def foreign(tensors: Iterable[Tensor]) -> tuple[type[Tensor], bool] | None:
    """The first class among the tensors' that may know torch's own operators alone; else None.

    Second, whether it sees functions, by a `__torch_function__` of its own: it may wait for the
    very function that torch.nn calls. Others, with a `__torch_dispatch__`, see operators.
    """
    for cls in map(type, tensors):
        if cls in PLAIN or issubclass(cls, (FakeTensor, FunctionalTensor)):
            continue
        function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
        if function not in _PASSIVE:
            return cls, True
        if cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return cls, False
    return None


# What a class has that lets every function pass.
_PASSIVE = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
