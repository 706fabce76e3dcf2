"""convert(model): every torch.nn recurrent layer and cell of a model onto rnnkern's kernels.

rnnkern's classes add no state to torch.nn's, so a module changes its class and nothing else: it
stays the same object with the same parameters, buffers, hooks, flags and references to it.
"""

import copyreg
import logging
from abc import ABCMeta
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ._delegation import ask_their_class, replaces_forward
from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .nn._torch_twin import CLASSES, Converted
from .nn.added import is_added

log = logging.getLogger("rnnkern")

OURS: dict[type, type] = {
    CLASSES[ours.__name__]: ours for ours in (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
}
_TORCHS = {ours: torchs for torchs, ours in OURS.items()}

# What torch.nn's forward calls besides the kernels; rnnkern's does not call it every time.
_CHECKS = frozenset(
    {
        "check_forward_args",
        "check_input",
        "check_hidden_size",
        "get_expected_hidden_size",
        "get_expected_cell_size",
        "permute_hidden",
    }
)

_HINT = (
    "Tools that look a layer up by its exact class (torch.ao.quantization, thop, BackPACK) do not "
    "know rnnkern's: call rnnkern.revert(model) before them"
)


def _new(cls: type, *args: Any) -> nn.Module:
    """An empty instance of the class that a converted instance of `cls` has (for pickle)."""
    kind = _ours(cls)
    empty: nn.Module = kind.__new__(kind, *args)
    return empty


def reduce_by(new: Callable[..., nn.Module]) -> Callable[[nn.Module, Any], Any]:
    """`__reduce_ex__` of classes made for the user's, which pickle by the user's class.

    new  (user's class, *args) -> an empty instance of the class made for it
    """

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        made: Any = next(kind for kind in type(self).__mro__ if "_original" in vars(kind))
        reduced = super(made, self).__reduce_ex__(2)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (new, (made._original, *reduced[1][1:]), *reduced[2:])
        return reduced  # by a method of the user's

    return __reduce_ex__


class _Unseen:
    """First of the bases while a class is made: the user's `__init_subclass__` is not called."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _hooks(kinds: Iterable[type]) -> list[type]:
    """The classes that hear of classes derived from them."""
    return [k for k in kinds if "__init_subclass__" in vars(k) and k.__module__ != "typing"]


def derive(cls: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class with the name of `cls`, on those bases, of whose making no code of the user's hears.

    `__subclasses__()` of the bases lists it, as it lists the classes that torch makes for
    parametrisations. The first base gives the layout, which has to be that of `cls`.
    """
    hidden = {"__dict__", "__weakref__", "_abc_impl", "__abstractmethods__"}
    space = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        **{name: value for name, value in members.items() if name not in hidden},
    }
    if not any(_hooks(base.__mro__[:-1]) for base in bases):
        return type(cls.__name__, bases, space)
    made = type(cls.__name__, (_Unseen, *bases), space)
    made.__bases__ = bases
    return made


@cache
def _ours(cls: type) -> type:
    """rnnkern's class for one of torch.nn's, or of the user's that reaches torch.nn's forward."""
    if cls in OURS:
        return OURS[cls]
    ours = OURS[_base(cls)]
    members = {"_original": cls, "__reduce_ex__": reduce_by(_new)}
    return derive(cls, (cls, ours, Converted), members)


def _base(cls: type) -> type:
    """torch's, rnnkern's or an added cell's class, the first that a class derives from."""
    return next(k for k in cls.__mro__ if k in OURS or k in _TORCHS or is_added(k))


def _collision(names: Iterable[str], base: type, ours: type) -> str | None:
    """A name of the user's that rnnkern's class uses for something else."""
    known = set(dir(base))
    added = [kind for kind in ours.__mro__ if kind not in base.__mro__]
    private = {name for kind in added for name in vars(kind) if not name.startswith("__")} - known
    return min(private.intersection(names), default=None)


def _class_refusal(cls: type, ours: type) -> str | None:
    """Why no class on rnnkern's can stand for this one of the user's."""
    base = _base(cls)
    kinds = [k for k in cls.__mro__[: cls.__mro__.index(base)] if k.__module__ != "typing"]
    for kind in kinds:
        for name in sorted(_CHECKS & vars(kind).keys()):
            return f"{kind.__name__} overrides {name}"
        if taken := _collision(vars(kind), base, ours):
            return f"{kind.__name__} has a member {taken}, as rnnkern's class has"
    if reason := replaces_forward(kinds):
        return reason
    if vars(cls).get("__final__"):
        return f"{cls.__name__} is final"
    meta = type(cls)
    if meta.__new__ not in (type.__new__, ABCMeta.__new__) or meta.__init__ is not type.__init__:
        return f"the metaclass {meta.__name__} acts on the classes that derive from it"
    if _hooks(kinds) and ask_their_class(kinds):
        return f"{cls.__name__} registers its subclasses and asks for its exact class"
    return None


def refusal(module: nn.Module, cls: type, ours: type) -> str | None:
    """Why a module of the class `cls` cannot get a class on `ours`, one of rnnkern's."""
    if "forward" in vars(module):
        return "it has a forward of its own"
    for name in sorted(_CHECKS & vars(module).keys()):
        return f"it has a {name} of its own"
    members = {*vars(module), *module._modules, *module._parameters, *module._buffers}
    if taken := _collision(members, _base(cls), ours):
        return f"it has a member {taken}, as rnnkern's class has"
    return None if cls in OURS or cls in _TORCHS else _class_refusal(cls, ours)


@dataclass
class _Step:
    """One module: the class that it gets, or None, and what is said about it."""

    name: str
    module: nn.Module
    target: type | None
    text: str

    def take(self) -> None:
        if self.target is None:
            return
        try:  # past a `__setattr__` of the user's
            object.__setattr__(self.module, "__class__", self.target)
        except TypeError as error:  # another layout in memory, by `__slots__`
            self.target, self.text = None, f"left alone, {error}"

    def report(self, verbose: bool) -> None:
        _say(f"{self.name or 'the model itself'}: {self.text}", verbose)


def _say(text: str, verbose: bool) -> None:
    log.info("%s", text)
    if verbose:
        print(text)


def _swap(module: nn.Module, target: type) -> type:
    """`target`, or for a parametrised module its own class (torch makes one each) on that base."""
    if not is_parametrized(module):
        return target
    return derive(type(module), (target,), dict(vars(type(module))))


def class_of(module: nn.Module) -> type:
    """The class of a module without that of its parametrisations."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def user_class(module: nn.Module) -> type:
    """The module's class without parametrisations and conversions."""
    cls = class_of(module)
    return cls._original if issubclass(cls, Converted) else cls


def _is_torchs(cls: type) -> bool:
    """Whether it is one of torch's classes, or the user's own on one of them; not rnnkern's."""
    return issubclass(cls, tuple(OURS)) and not issubclass(cls, (*_TORCHS, Converted))


def _conversion(name: str, module: nn.Module) -> _Step | None:
    cls = class_of(module)
    if not _is_torchs(cls):
        return None
    reason = refusal(module, cls, OURS[_base(cls)])
    if reason is None:
        try:
            return _Step(
                name, module, _swap(module, _ours(cls)), f"{cls.__name__} now runs on rnnkern"
            )
        except Exception as error:
            reason = f"no class can be derived from {cls.__name__}: {error}"
    return _Step(name, module, None, f"left alone, {reason}")


def _reversion(name: str, module: nn.Module) -> _Step | None:
    cls = class_of(module)
    if issubclass(cls, Converted):
        torchs = cls._original
    elif cls in _TORCHS:
        torchs = _TORCHS[cls]
    elif issubclass(cls, tuple(_TORCHS)):
        return _Step(name, module, None, f"left alone, {cls.__name__} derives from rnnkern's class")
    else:
        return None
    return _Step(name, module, _swap(module, torchs), f"{torchs.__name__} now runs on torch")


def _apply(steps: Iterable[_Step | None], verbose: bool) -> bool:
    """Takes the steps, once all are decided, and reports them; whether a module has changed."""
    decided = [step for step in steps if step is not None]
    for step in decided:
        step.take()
    for step in decided:
        step.report(verbose)
    return any(step.target for step in decided)


def convert(model: nn.Module, verbose: bool = False) -> nn.Module:
    """Puts every nn.LSTM, nn.GRU, nn.RNN and their cells in `model` on rnnkern's kernels, in place.

    Parameters stay the very same tensors, so optimizers made before go on working. Returns `model`;
    what was done is logged (logger "rnnkern", INFO) and, if `verbose`, printed.

    A subclass is converted too if its code reaches torch.nn's forward through `super()` alone. Left
    alone, with the reason, is one that calls torch's kernels, uses the weights or names torch's
    class; a final one; one whose metaclass acts on new classes. Its `__init_subclass__` is not
    called. Every module is decided before the first one is changed.

    Tools that look layers up by their exact class know torch.nn's only: quantize_dynamic and the
    rest of torch.ao.quantization, thop, BackPACK. They leave rnnkern's layers out or count nothing
    for them; call `rnnkern.revert(model)` before such a tool.

    >>> model = rnnkern.convert(model, verbose=True)
    encoder: LSTM now runs on rnnkern
    """
    changed = _apply([_conversion(*found) for found in model.named_modules()], verbose)
    if changed:
        _say(_HINT, verbose)
    return model


def revert(model: nn.Module, verbose: bool = False) -> nn.Module:
    """Undoes `convert`, and turns rnnkern's own layers into torch.nn's; returns `model`.

    Needed before a tool that goes by a layer's exact class, such as quantize_dynamic. Parameters
    stay the very same tensors. A subclass of rnnkern's classes is left alone, and this is said.
    """
    _apply([_reversion(*found) for found in model.named_modules()], verbose)
    return model
