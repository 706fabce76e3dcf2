"""Which classes `freeze` takes, which frozen class each of them gets, and what it refuses."""

from typing import Any

from torch import Tensor, nn

from .convert import refusal, user_class
from .nn._torch_twin import CLASSES
from .nn.added import AddedCellModule, AddedLayer

RECURRENT = (*CLASSES.values(), AddedLayer, AddedCellModule)
#: The frozen class for each of them, which frozen.py defines.
FROZEN: dict[type, type[nn.Module]] = {}


def frozen_base(cls: type) -> type[nn.Module]:
    """The frozen class for the one of `RECURRENT` that `cls` derives from."""
    return next(FROZEN[kind] for kind in cls.__mro__ if kind in FROZEN)


def obstacle(module: nn.Module) -> str | None:
    """Why a recurrent module cannot be frozen, whatever its weights are."""
    cls = user_class(module)
    is_frozen = isinstance(module, tuple(FROZEN.values()))
    if not is_frozen and (reason := refusal(module, cls, frozen_base(cls))):
        return reason
    nonlinearity = getattr(module, "nonlinearity", "tanh")
    if nonlinearity not in ("tanh", "relu"):
        return f"its nonlinearity is {nonlinearity!r}"
    return None


def form(module: nn.Module, weights: dict[str, Tensor | None]) -> tuple[Any, ...]:
    """Cell, and names, shapes and dtypes of the weights."""
    own = module.own.mode if isinstance(module, (AddedLayer, AddedCellModule)) else None
    cell = frozen_base(type(module)), getattr(module, "nonlinearity", "tanh"), own
    return cell, {key: None if w is None else (w.shape, w.dtype) for key, w in weights.items()}
