"""Which weights a call uses: a module's registered parameters, or what has been put over them.

torch.nn asks `getattr(module, name)` for every weight at every call. An attribute of the instance
or of its class comes before the parameter, and subclasses may override the lookup itself. The usual
call has none of that; it is recognised here without the cost of asking.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from ..backend import PLAIN, tensors_in
from ..ops.autograd import NATIVE

#: The methods by which torch.nn looks weights up; a class or an instance may override them.
LOOKUPS = {
    "__getattribute__": object.__getattribute__,
    "__getattr__": nn.Module.__getattr__,
    "_update_flat_weights": nn.RNNBase._update_flat_weights,
    "_weights_have_changed": nn.RNNBase._weights_have_changed,
    "_init_flat_weights": nn.RNNBase._init_flat_weights,
}


def has_torch_lookups(module: nn.Module) -> bool:
    """Whether no method of torch.nn's that looks weights up is overridden in this module."""
    cls = type(module)
    return vars(module).keys().isdisjoint(LOOKUPS) and all(
        getattr(cls, name, method) is method for name, method in LOOKUPS.items()
    )


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
    NATIVE.use_lookups(LOOKUPS)

#: (module, names, flat, input, hx) -> the module's parameters of these names, where they are what
#: torch.nn would take (`flat`: a layer's list of them; None for a cell) and all tensors of the call
#: are plain. None where that is not so, or not sure: torch's own code is to be asked.
registered_weights = _registered_weights if NATIVE is None else NATIVE.registered_weights
