"""Lets torch.compile and torch.fx trace rnnkern's layers.

Dynamo refuses every instance of nn.LSTM, nn.GRU and nn.RNN, subclasses included, unless
torch._dynamo.config.allow_rnn is set. Setting it would change how the user's own nn.LSTM compiles
(its float32 training then fails on a CPU), so it is set only while one of our layers is looked at.
"""

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, cast

from torch import fx, nn
from torch.fx import _symbolic_trace

from .._after_import import after_import
from . import _torch_twin

_BUILDER = "torch._dynamo.variables.builder"
_REFUSED = (_torch_twin.LSTM, _torch_twin.GRU, _torch_twin.RNN)


def _refuse(builder: ModuleType, value: nn.Module) -> None:
    """What Dynamo does with torch's own layers, which it looks up under names that we may hold."""
    if not builder.config.allow_rnn and hasattr(builder, "unimplemented"):
        builder.unimplemented(
            gb_type="Attempted to wrap RNN, GRU, or LSTM",
            context=str(value),
            explanation="Dynamo does not support RNN, GRU, or LSTM.",
            hints=["rnnkern.convert(model) puts the layer on kernels that Dynamo supports."],
        )


def _patch(builder: ModuleType, kind: type[nn.Module]) -> None:
    """Wraps VariableBuilder.wrap_module; without that private name Dynamo breaks the graph."""
    original = getattr(builder.VariableBuilder, "wrap_module", None)
    if original is None:
        return

    @functools.wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if isinstance(value, kind):
            with builder.config.patch(allow_rnn=True):
                return original(self, value)
        if isinstance(value, _REFUSED) and not isinstance(value, (nn.LSTM, nn.GRU, nn.RNN)):
            _refuse(builder, value)
        return original(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


def let_dynamo_trace(kind: type[nn.Module]) -> None:
    """Lets torch.compile into layers of this class, as soon as Dynamo is imported.

    Importing Dynamo itself takes seconds.
    """
    after_import(_BUILDER, lambda builder: _patch(builder, kind))


def fx_tracing() -> bool:
    """Whether torch.fx traces: torch 2.14 keeps that per thread, earlier ones in a global."""
    per_thread = getattr(_symbolic_trace, "_get_is_fx_tracing", None)
    return bool(per_thread() if per_thread else _symbolic_trace._is_fx_tracing_flag)


def fx_tracer(*args: Any) -> fx.Tracer | None:
    """The tracer of a running torch.fx trace that records modules, if there is one.

    torch.fx takes a module for a leaf if its class comes from torch.nn, so it enters ours. One of
    the arguments names the tracer if it is a proxy. If all of them are constants, the tracer is
    found in the wrapper that it puts on nn.Module.__call__ while it traces.
    """
    if not fx_tracing():
        return cast(fx.Tracer | None, next((proxy.tracer for proxy in _proxies_in(args)), None))
    variables = getattr(nn.Module.__call__, "__closure__", None) or ()
    tracers = (v.cell_contents for v in variables if isinstance(v.cell_contents, fx.Tracer))
    tracer = next(tracers, None)
    if tracer is None or _records_operators(tracer):
        return None
    return tracer


def _proxies_in(values: Any) -> Iterator[fx.Proxy]:
    for value in values:
        if isinstance(value, fx.Proxy):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _proxies_in(value)


def _records_operators(tracer: fx.Tracer) -> bool:
    """Whether it is make_fx's, which goes into every module. (Importing that takes long.)"""
    made = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return made is not None and isinstance(tracer, made.PythonKeyTracer)


def fx_leaf(tracer: fx.Tracer, module: nn.Module, input: Any, hx: Any, **named: Any) -> Any:
    """The proxy of a call of the module as a whole, as torch.fx makes for torch.nn's."""
    args = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, named)
