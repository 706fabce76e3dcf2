"""Lets torch.compile and torch.fx trace rnnkern's layers.

Dynamo refuses every instance of nn.LSTM, nn.GRU and nn.RNN, subclasses included, unless
torch._dynamo.config.allow_rnn is set. Setting it would change how the user's own nn.LSTM compiles
(its float32 training then fails on a CPU), so it is set only while one of our layers is looked at.
"""

import functools
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace

_BUILDER = "torch._dynamo.variables.builder"


def exporting_to_onnx() -> bool:
    """torch.onnx.is_in_onnx_export(), to which Dynamo answers False whatever the truth is."""
    return torch.onnx.is_in_onnx_export()


# Dynamo calls it then instead of tracing it. This is what torch.compiler.assume_constant_result
# does, which would import Dynamo.
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        return original(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


class _AfterImport(MetaPathFinder):
    """Patches the builder when it is imported, and is gone then: importing Dynamo takes seconds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _patch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Called once, when the layers are first imported."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _AfterImport())


def fx_tracer(*args: Any) -> fx.Tracer | None:
    """The tracer of a running torch.fx trace that records modules, if there is one.

    torch.fx takes a module for a leaf if its class comes from torch.nn, so it enters ours. One of
    the arguments names the tracer if it is a proxy. If all of them are constants, the tracer is
    found in the wrapper that it puts on nn.Module.__call__ while it traces.
    """
    if not _symbolic_trace._is_fx_tracing_flag:
        return next((proxy.tracer for proxy in _proxies_in(args)), None)
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


def fx_leaf(tracer: fx.Tracer, module: nn.Module, input: Any, hx: Any) -> Any:
    """The proxy of a call of the module as a whole, as torch.fx makes for torch.nn's."""
    args = (input,) if hx is None else (input, hx)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
