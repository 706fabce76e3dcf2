"""What tells a plain class from one that changes a call, for the C++ functions that serve the usual
call without the cost of Python: `plain_layer` and `plain_cell` of csrc/bindings/plain_call.cpp.

They do what `Layer.forward` and `Cell.forward` do and return None for anything unusual. Which class
is plain is asked here, once for each version of a class.
"""

from typing import Any

from torch import nn
from torch.autograd import forward_ad

from ..ops import native
from ..ops.autograd import OBSERVER
from .weights import LOOKUPS

# What a call asks of its module, besides the weights: methods, and the module's own attributes.
_METHODS = ("select_backend", "_state", "_result", "_check", "_spec", "_run", "_mode", "_regular")
_ATTRIBUTES = (
    "_flat_weights", "_flat_weights_names", "_parameters", "batch_first", "bias", "bidirectional",
    "hidden_size", "input_size", "mode", "num_layers", "proj_size",
)  # fmt: skip

_originals: dict[type[nn.Module], dict[str, Any]] = {}


def _looked_up(cls: type) -> dict[str, Any]:
    return {name: getattr(cls, name, None) for name in (*LOOKUPS, *_METHODS, *_ATTRIBUTES)}


def is_plain(cls: type) -> bool:
    """Whether a class has all that a call uses from the one of ours that it is or descends from."""
    original = next((_originals[kind] for kind in cls.__mro__ if kind in _originals), None)
    return original is not None and all(
        found is original[name] for name, found in _looked_up(cls).items()
    )


def serve(*classes: type[nn.Module]) -> None:
    """Lets the C++ functions serve modules of these classes as they are now."""
    for cls in classes:
        _originals[cls] = _looked_up(cls)


# Not NATIVE, which tests set to None for a while, maybe before this module is imported.
_library = native.load()
if _library is not None:
    _library.use_plain_calls(is_plain, (*LOOKUPS, *_METHODS), OBSERVER, vars(forward_ad))
