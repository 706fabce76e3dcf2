"""torch.nn's own recurrent classes, captured once, and the way back to them from ours.

`torch.nn.LSTM = rnnkern.LSTM` is how a faster layer enters code that one does not own. The names in
torch.nn are therefore no way to torch's classes: the rest of the package takes them from here.
"""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

__all__ = [
    "CLASSES",
    "GRU",
    "LSTM",
    "NAMES",
    "RNN",
    "Converted",
    "GRUCell",
    "LSTMCell",
    "RNNBase",
    "RNNCell",
    "RNNCellBase",
    "to_torch",
    "torch_class",
]

#: Names of the six classes, in torch.nn and in rnnkern.
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")

# By descent instead of by name: the names may be taken before this module is imported.
_OWN: dict[str, Any] = {
    kind.__name__: kind
    for base in (RNNBase, RNNCellBase)
    for kind in base.__subclasses__()
    if kind.__module__ == base.__module__
}

if TYPE_CHECKING:
    from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
else:
    LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell = (_OWN[name] for name in NAMES)

#: torch's six classes by name.
CLASSES: dict[str, type[nn.Module]] = {name: _OWN[name] for name in NAMES}


class Converted:
    """Marks the classes that `convert` makes for the user's subclasses of torch's."""

    _original: type[nn.Module]


def torch_class(cls: type) -> type[nn.Module]:
    """The class of torch's, or the user's own, that a class of rnnkern's stands for."""
    if issubclass(cls, Converted):
        return cls._original
    return next(kind for kind in cls.__mro__ if kind in CLASSES.values())


def to_torch(module: nn.Module) -> nn.Module:
    """A torch.nn module that shares parameters, hooks and flags with one of rnnkern's.

    Raises TypeError for a subclass of rnnkern's that overrides `forward`, which would be lost.
    """
    cls = type(module)
    base = torch_class(cls)
    if not issubclass(cls, Converted):
        for kind in cls.__mro__[: cls.__mro__.index(base)]:
            if "forward" in vars(kind) and kind.__module__.partition(".")[0] != "rnnkern":
                raise TypeError(f"{kind.__name__} overrides forward: torch.nn has no such layer")
    twin = base.__new__(base)
    vars(twin).update(vars(module))
    return twin
