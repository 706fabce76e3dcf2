"""rnnkern: fused C++ and CUDA kernels for LSTM, GRU and Elman RNN, a drop-in for torch.nn's layers.

    >>> import rnnkern
    >>> lstm = rnnkern.LSTM(128, 256, num_layers=2, batch_first=True)  # torch.nn.LSTM's signature
    >>> output, (h_n, c_n) = lstm(torch.randn(8, 100, 128))

Everything is loaded on first use, so that `import rnnkern.numpy` needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "LSTM": "modules",
    "GRU": "modules",
    "RNN": "modules",
    "LSTMCell": "cell_modules",
    "GRUCell": "cell_modules",
    "RNNCell": "cell_modules",
    "explain": "path",
    "plan": "path",
    "convert": "convert",
    "revert": "convert",
    "trace": "trace",
    "gradient_flow": "trace",
    "watch": "watch",
}
_ROOMS = ("numpy", "plot", "reference")

__all__ = ["__version__", *_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _ROOMS:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing rnnkern.trace would bind the module over the function of that name.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
