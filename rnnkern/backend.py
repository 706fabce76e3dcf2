"""Which backend runs a call: the fused kernels, the decomposition, or torch.nn's own code.

`select_backend` decides, for the modules' forward and for `explain` alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from .ops import library

_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_NONE = type(None)
_DTYPES = library.DTYPES
_STRIDED = torch.strided

#: Types with nothing between them and the kernels.
PLAIN = frozenset({Tensor, nn.Parameter})


@dataclass(frozen=True)
class Backend:
    """name: "fused", "decomposition" or "torch"; reason: why, in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


FUSED = Backend("fused", "rnnkern's kernels")
_TRANSFORM = Backend(
    "decomposition", "inside torch.func or forward-mode AD, which need torch's operations"
)
_JIT = Backend("torch", "torch.jit.trace or the ONNX exporter records torch's operators")
_PROJECTION = Backend("torch", "the kernels of this device do not cover proj_size yet")
_SIZE = Backend("torch", "a size is zero")
_NOT_TENSORS = Backend("torch", "input or weights are not tensors")


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in a tree of tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(*value)


# What a class has that lets every function pass.
_PASSIVE = (
    Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
    torch._C._disabled_torch_function_impl,
)


def foreign(tensors: Iterable[Tensor]) -> tuple[type[Tensor], bool] | None:
    """The first class among the tensors' that may know torch's own operators alone; else None.

    Second, whether it sees functions, by a `__torch_function__` of its own: it may wait for the
    very function that torch.nn calls. Others, with a `__torch_dispatch__`, see operators.
    """
    for tensor in tensors:
        cls = type(tensor)
        if cls in PLAIN or issubclass(cls, (FakeTensor, FunctionalTensor)):
            continue
        function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
        if function not in _PASSIVE:
            return cls, True
        if cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return cls, False
    return None


def exporting_to_onnx() -> bool:
    """torch.onnx.is_in_onnx_export(), to which Dynamo answers False whatever the truth is."""
    return torch.onnx.is_in_onnx_export()


# Dynamo calls it then instead of tracing it. This is what torch.compiler.assume_constant_result
# does, which would import Dynamo.
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select_backend(
    module: nn.Module, input: Any, weights: Sequence[Any], hx: Any = None, usual: bool = False
) -> Backend | None:
    """Why the fused kernels do not take this call and who does; None if they do.

    Shapes and the agreement of dtypes are not looked at: every backend checks them. `usual` says
    that every tensor of the call is known to be a plain one (`registered_weights`).
    """
    if _functorch_active() or forward_ad._current_level >= 0:
        return _TRANSFORM
    data = input[0] if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or (not usual and _NONE in map(type, weights)):
        return _NOT_TENSORS
    if not usual:
        found = foreign(tensors_in(input, hx, weights))
        if found is not None:
            cls, sees_functions = found
            name = "torch" if sees_functions else "decomposition"
            return Backend(name, f"{cls.__name__} may know torch's operators only")
    if data.dtype not in _DTYPES:
        return Backend("torch", f"dtype {data.dtype}")
    if data.layout is not _STRIDED:  # sparse and the like: torch.nn's cells take some of them
        return Backend("torch", f"layout {data.layout}")
    if not (data.is_cpu or data.device.type in library.DEVICES):
        return Backend("torch", f"device {data.device}")
    if module.proj_size and data.device.type not in library.PROJECTION:
        return _PROJECTION
    if not (module.input_size and module.hidden_size):
        return _SIZE
    if _tracing_state() is not None or (_is_compiling() and exporting_to_onnx()):
        return _JIT
    return None
