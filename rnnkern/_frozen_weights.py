"""The weights of a layer or cell that is to be frozen: their values now, and whether they fit."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .call_spec import weight_format
from .ops import library

Module = TypeVar("Module", bound=nn.Module)

_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def weight_names(module: nn.Module) -> Sequence[str]:
    """The names of a layer's or cell's weights, in torch's order; a cell's may be None."""
    of_cell: Sequence[str] = getattr(module, "_names", _CELL_WEIGHTS)
    names: Sequence[str] = getattr(module, "_flat_weights_names", of_cell)
    return names


def weights_of(values: dict[str, Any]) -> list[Any]:
    """Those that are there: a cell without bias has None."""
    return [w for w in values.values() if w is not None]


def copied(model: Module, recurrent: Iterable[nn.Module]) -> Module:
    """A deep copy, also where weights of `recurrent` are results of an older reparametrisation."""
    memo: dict[int, Any] = {}
    for module in recurrent:
        for t in (*vars(module).values(), *getattr(module, "_flat_weights", ())):
            if isinstance(t, Tensor) and not t.is_leaf:
                memo[id(t)] = t.detach().clone()
    return copy.deepcopy(model, memo)


def current_values(module: nn.Module) -> dict[str, Any]:
    """The weights of a copied module by name, which loses its reparametrisations."""
    module.eval()
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    with torch.inference_mode(False), torch.no_grad():
        values = {name: getattr(module, name) for name in weight_names(module)}
        if parametrize.is_parametrized(module):
            others = set(cast(nn.ModuleDict, module.parametrizations)) - set(values)
            found = {name: nn.Parameter(getattr(module, name)) for name in others}
            # Not by torch's function: it takes the names off the class, which the original shares.
            del module._modules["parametrizations"]
            module._parameters.update(found)
        return {
            name: w.detach().clone() if isinstance(w, Tensor) else w for name, w in values.items()
        }


def refusal_of(weights: Sequence[Any], name: str) -> str | None:
    """Why these weights cannot be packed in the format of that name."""
    if not weights or not all(isinstance(w, Tensor) for w in weights):
        return "not all of its weights are tensors"
    dtype = weights[0].dtype
    for w in weights:
        if w.device.type != "cpu":
            return f"its weights are on {w.device}, and frozen modules run on the CPU"
        if w.dtype != dtype:
            return f"its weights are both {dtype} and {w.dtype}"
        if w.layout is not torch.strided:
            return f"its weights have the layout {w.layout}"
        if not w.numel():
            return "a size is zero"
    if dtype not in library.DTYPES:
        return f"its weights are {dtype}"
    try:
        weight_format(name, str(dtype).removeprefix("torch."))
    except ValueError as error:
        return str(error)
    return None
