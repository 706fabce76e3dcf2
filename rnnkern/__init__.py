"""rnnkern: fused C++ and CUDA kernels for LSTM, GRU and Elman RNN, a drop-in for torch.nn's layers.

    >>> import rnnkern
    >>> lstm = rnnkern.LSTM(128, 256, num_layers=2, batch_first=True)  # torch.nn.LSTM's signature
    >>> output, (h_n, c_n) = lstm(torch.randn(8, 100, 128))

Everything is loaded on first use, so that `import rnnkern.numpy` needs no torch. Only the operators
are registered as soon as torch is imported too: exported and compiled programs call them by name.
"""

import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

from ._after_import import after_import
from ._missing import NO_TORCH, found

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"), "nn"),
    **dict.fromkeys(("convert", "revert"), "convert"),
    **dict.fromkeys(("freeze", "refresh"), "freeze"),
    **dict.fromkeys(("patch", "unpatch"), "patching"),
    **dict.fromkeys(("explain", "plan"), "inspect.explain"),
    **dict.fromkeys(("trace", "gradient_flow"), "inspect.trace"),
    "watch": "inspect.watch",
    "Stream": "stream",
}
_ROOMS = ("cells", "numpy", "plot", "reference", "rl")
_WITHOUT_TORCH = ("numpy", "reference")


def _public() -> list[str]:
    """The names that can be imported here: torch and matplotlib may be missing."""
    if not found("torch"):
        return [*_WITHOUT_TORCH]
    return [name for name in (*_HOMES, *_ROOMS) if name != "plot" or found("matplotlib")]


__all__ = ["__version__", *_public()]


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name not in _WITHOUT_TORCH and not found("torch"):
            raise ModuleNotFoundError(NO_TORCH, name="torch")
        value = import_module(f"{__name__}.{_HOMES.get(name, name)}")
        if name in _HOMES:
            value = getattr(value, name)
    except Exception as error:  # hasattr, help and inspect.getmembers expect an AttributeError
        if sys._getframe(1).f_code.co_name == "_handle_fromlist":
            raise  # `from rnnkern import LSTM` would hide an AttributeError's words
        raise AttributeError(f"{__name__}.{name} is not available: {error}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing rnnkern.convert would bind the module over the function of that name.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _register_operators(_: ModuleType) -> None:
    with suppress(Exception):  # their first use says what is wrong; `import torch` must not fail
        import_module(f"{__name__}.ops")


after_import("torch", _register_operators)
