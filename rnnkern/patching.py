"""patch(): torch.nn's names stand for rnnkern's classes, for code that builds its own layers."""

import copyreg
import threading
from types import ModuleType
from typing import Any

from torch import nn

from .convert import OURS
from .nn._torch_twin import CLASSES

_PLACES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)

_lock = threading.RLock()
_holders: list["Patch"] = []  # the names stay swapped until the last of them lets go
_found: dict[tuple[ModuleType, str], Any] = {}  # what the names stood for before the first


def _new(name: str) -> nn.Module:
    """An empty layer of torch's own (for pickle, while the name in torch.nn is another class's)."""
    return CLASSES[name].__new__(CLASSES[name])


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    return (_new, (type(module).__name__,), *module.__reduce_ex__(2)[2:])


def _swap() -> None:
    for name, torchs in CLASSES.items():
        for place in _PLACES:
            _found[place, name] = getattr(place, name)
            setattr(place, name, OURS[torchs])
        # pickle finds a class by its name, which is taken now.
        copyreg.pickle(torchs, _reduce)


def _restore() -> None:
    for (place, name), value in _found.items():
        if getattr(place, name) is OURS[CLASSES[name]]:  # else someone has assigned it since
            setattr(place, name, value)
    for torchs in CLASSES.values():
        if copyreg.dispatch_table.get(torchs) is _reduce:
            del copyreg.dispatch_table[torchs]
    _found.clear()


class Patch:
    """What `patch` returns: one hold on the swapped names, given back at the end of a `with`."""

    def __init__(self) -> None:
        self._entered = False
        self._hold()

    def _hold(self) -> None:
        with _lock:
            if not _holders:
                _swap()
            _holders.append(self)

    def __enter__(self) -> "Patch":
        with _lock:
            if self._entered or self not in _holders:  # entered again, or after unpatch()
                self._hold()
            self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            if self in _holders:  # not after unpatch()
                _holders.remove(self)
                if not _holders:
                    _restore()
            self._entered = self in _holders


def patch() -> Patch:
    """Puts rnnkern's LSTM, GRU, RNN and their cells in the place of torch.nn's.

    From now on `torch.nn.LSTM(…)` in any code makes a rnnkern.LSTM, and `class Mine(torch.nn.LSTM)`
    derives from it. `unpatch()` ends this; as a context manager it ends with the block. Calls nest:
    the names return when the last block has ended, or at `unpatch()`.

    - Call it before the code that builds the layers is imported: a name taken from torch.nn earlier
      (`from torch.nn import LSTM`) stays torch's class. `python -m rnnkern run script.py` does so.
    - Layers that exist already are not changed: `rnnkern.convert(model)` is for them. They still
      run, copy and pickle, but `isinstance(old, torch.nn.LSTM)` is False while the name is
      rnnkern's, as rnnkern's class derives from torch's and not the reverse. A name taken earlier
      recognises both.
    - A model pickled meanwhile needs rnnkern to be loaded; a state_dict does not. A file with
      torch.nn's layers that is loaded meanwhile gives rnnkern's.
    - torch's own tables keep torch's classes: unpatch and `revert` before quantize_dynamic.
    - The names belong to the process: all threads see the swap. Blocks of several threads may
      overlap in any order. Child processes that are spawned start without it.

    >>> with rnnkern.patch():
    ...     model = package.build_model()
    """
    return Patch()


def unpatch() -> None:
    """Gives torch.nn's names back what they stood for before `patch`, whatever blocks are open.

    Modules made meanwhile stay rnnkern's (`rnnkern.revert(model)` turns them into torch.nn's). Does
    nothing if nothing is patched; a name that someone else has assigned since is left alone.
    """
    with _lock:
        if _holders:
            _holders.clear()
            _restore()
