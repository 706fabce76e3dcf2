"""convert(model): every torch.nn recurrent layer and cell of a model onto rnnkern's kernels.

rnnkern's classes add no state to torch.nn's, so a module changes its class and nothing else: it
stays the same object with the same parameters, buffers, hooks, flags and references to it.
"""

import logging
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .cell_modules import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN

log = logging.getLogger("rnnkern")

_OURS: dict[type, type] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

# A subclass that overrides one of these has a forward pass of its own.
_FORWARD = {
    "forward",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
}


def _new(cls: type) -> nn.Module:
    """An empty instance of the class that a converted instance of `cls` has (for pickle)."""
    kind = _ours(cls)
    return kind.__new__(kind)


class _Converted:
    """Marks the classes made for the user's subclasses; pickles them by the user's class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(2)
        return (_new, (type(self).__bases__[1],), *reduced[2:])


@cache
def _ours(cls: type) -> type:
    """rnnkern's class for a class of torch.nn's, or of the user's that keeps torch.nn's forward."""
    if cls in _OURS:
        return _OURS[cls]
    base = next(b for b in cls.__mro__ if b in _OURS)
    return type(cls.__name__, (_Converted, cls, _OURS[base]), {"__module__": cls.__module__})


def _rebased(cls: type, base: type) -> type:
    """A parametrised module's own class (torch makes one for each) on another base."""
    return type(cls.__name__, (base,), {k: v for k, v in vars(cls).items() if k != "__weakref__"})


def _refusal(module: nn.Module, cls: type) -> str | None:
    base = next(b for b in cls.__mro__ if b in _OURS)
    for kind in cls.__mro__[: cls.__mro__.index(base)]:
        for name in sorted(_FORWARD & vars(kind).keys()):
            return f"{kind.__name__} overrides {name}"
    return "it has a forward of its own" if "forward" in vars(module) else None


def _report(verbose: bool, name: str, text: str) -> None:
    log.info("%s: %s", name or "the model itself", text)
    if verbose:
        print(f"{name or 'the model itself'}: {text}")


def convert(model: nn.Module, verbose: bool = False) -> nn.Module:
    """Puts every nn.LSTM, nn.GRU, nn.RNN and their cells in `model` on rnnkern's kernels, in place.

    Parameters stay the very same tensors, so optimizers made before go on working. A subclass that
    keeps torch.nn's forward is converted too; one that overrides it is left alone. Returns `model`;
    what was done is logged (logger "rnnkern", INFO) and, if `verbose`, printed.

    >>> model = rnnkern.convert(model, verbose=True)
    encoder: LSTM(128, 256, batch_first=True) now runs on rnnkern
    """
    for name, module in model.named_modules():
        parametrized = is_parametrized(module)
        cls = type(module).__bases__[0] if parametrized else type(module)
        if not issubclass(cls, tuple(_OURS)) or issubclass(cls, (*_TORCHS, _Converted)):
            continue
        refusal = _refusal(module, cls)
        if refusal is not None:
            _report(verbose, name, f"left alone, {refusal}")
            continue
        ours = _ours(cls)
        module.__class__ = _rebased(type(module), ours) if parametrized else ours
        _report(verbose, name, f"{cls.__name__} now runs on rnnkern")
    return model


def revert(model: nn.Module, verbose: bool = False) -> nn.Module:
    """Undoes `convert`, and turns rnnkern's own layers into torch.nn's; returns `model`."""
    for name, module in model.named_modules():
        parametrized = is_parametrized(module)
        cls = type(module).__bases__[0] if parametrized else type(module)
        if issubclass(cls, _Converted):
            torchs = cls.__bases__[1]
        elif cls in _TORCHS:
            torchs = _TORCHS[cls]
        else:
            continue
        module.__class__ = _rebased(type(module), torchs) if parametrized else torchs
        _report(verbose, name, f"{torchs.__name__} now runs on torch")
    return model


def to_torch(module: nn.Module) -> nn.Module:
    """A torch.nn module that shares parameters, hooks and flags with one of rnnkern's."""
    base = next(b for b in type(module).__mro__ if b in _OURS)
    twin = base.__new__(base)
    vars(twin).update(vars(module))
    return twin
