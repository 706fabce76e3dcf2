"""Lets torch.compile trace rnnkern's layers.

Dynamo refuses every instance of nn.LSTM, nn.GRU and nn.RNN, subclasses included, unless
torch._dynamo.config.allow_rnn is set. Setting it would change how the user's own nn.LSTM compiles
(its float32 training then fails on a CPU), so it is set only while one of our layers is looked at.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import _torch_twin
from ._after_import import after_import

_BUILDER = "torch._dynamo.variables.builder"
_REFUSED = (_torch_twin.LSTM, _torch_twin.GRU, _torch_twin.RNN)


def exporting_to_onnx() -> bool:
    """torch.onnx.is_in_onnx_export(), to which Dynamo answers False whatever the truth is."""
    return torch.onnx.is_in_onnx_export()


# Dynamo calls it then instead of tracing it. This is what torch.compiler.assume_constant_result
# does, which would import Dynamo.
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse(builder: ModuleType, value: nn.Module) -> None:
    """What Dynamo does with torch's own layers, which it looks up under names that we may hold."""
    if not builder.config.allow_rnn and hasattr(builder, "unimplemented"):
        builder.unimplemented(
            gb_type="Attempted to wrap RNN, GRU, or LSTM",
            context=str(value),
            explanation="Dynamo does not support RNN, GRU, or LSTM.",
            hints=["rnnkern.convert(model) puts the layer on kernels that Dynamo supports."],
        )


def _patch(builder: ModuleType) -> None:
    """Wraps VariableBuilder.wrap_module; without that private name Dynamo breaks the graph."""
    original = getattr(builder.VariableBuilder, "wrap_module", None)
    if original is None:
        return

    @functools.wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        from .modules import Layer

        if isinstance(value, Layer):
            with builder.config.patch(allow_rnn=True):
                return original(self, value)
        if isinstance(value, _REFUSED) and not isinstance(value, (nn.LSTM, nn.GRU, nn.RNN)):
            _refuse(builder, value)
        return original(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


def install() -> None:
    """Called once, when the layers are first imported; importing Dynamo itself takes seconds."""
    after_import(_BUILDER, _patch)
