"""Stream: a frozen layer that takes its input step by step and keeps the state between calls."""

from collections.abc import Callable
from ctypes import c_char
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import numpy
from .ops.autograd import NATIVE


class Stream(numpy.Stream):
    """A frozen stack of layers, or a frozen cell, with its state inside: `y = stream(x)`.

    `stream` of a frozen layer or cell makes it. The weights are that module's, shared and read
    only, and a snapshot: `refresh` does not reach a stream made before. One thread at a time may
    use a stream; any number of streams of one module may run at once. No gradient passes through.

    The state of a layer in half precision is float32 where the kernels carry float32 from step to
    step: c of bfloat16; all of float16 and of odd sizes, there between layers too. It may be given
    in the layer's dtype.

    >>> stream = rnnkern.freeze(lstm).stream(batch_size=2)
    >>> y = stream(x)  # x (B, I) gives (B, R); x (T, B, I) gives (T, B, R)
    >>> stream.reset(rows=[1])
    """

    def __init__(
        self, packed: list[Tensor], dtype: torch.dtype, batch_size: int, threads: int
    ) -> None:
        """packed: of each layer, what `library.prepack` returned; dtype: of x and y."""
        super().__init__([p.numpy() for p in packed], batch_size, threads)
        self.dtype = dtype
        self._own = getattr(torch, self._engine.dtype)  # half precision may be computed in float32
        self._run: Callable[[Tensor], Tensor] = self._run_checked
        if dtype != self._own:
            self._run = self._converted
        elif NATIVE is not None:
            self._run = partial(NATIVE.stream, self._engine.address)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs of one step, (B, I) -> (B, R), or of several, (T, B, I) -> (T, B, R).

        Raises TypeError for what is no tensor, RuntimeError for another shape, dtype or device and
        where a gradient is asked for.
        """
        return self._run(x)

    def _run_checked(self, x: Tensor) -> Tensor:
        """What `NATIVE.stream` does, for a torch that it was not built for."""
        self._check(x)
        x = x.detach().contiguous()
        y = torch.empty(*x.shape[:-1], self._engine.width, dtype=self._own, device="cpu")
        self._engine.run_at(x.data_ptr(), x.shape[0] if x.dim() == 3 else 1, y.data_ptr())
        return y

    def _converted(self, x: Tensor) -> Tensor:
        """In half precision that the kernels compute in float32."""
        if isinstance(x, Tensor) and x.dtype != self.dtype:
            raise RuntimeError(f"expected input of {self.dtype}, got {x.dtype}")
        return self._run_checked(x.to(self._own)).to(self.dtype)

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        row = (self.batch_size, self.input_size)
        if x.dim() not in (2, 3) or x.shape[-2:] != row or not len(x):
            raise RuntimeError(
                f"expected input of shape {row} or (steps, {row[0]}, {row[1]}), "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != self._own or not x.is_cpu or x.layout is not torch.strided:
            raise RuntimeError(
                f"expected input of {self._own} on the CPU, got {x.dtype} on {x.device}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a stream computes no gradients: call it under torch.no_grad(), or detach its input"
            )

    def _check_state(self, value: Any, memory: Tensor) -> Tensor:
        if not isinstance(value, Tensor):
            raise ValueError(f"the state must be of tensors, got {type(value).__name__}")
        if value.shape != memory.shape or value.dtype not in (memory.dtype, self.dtype):
            raise ValueError(
                f"the state must be {tuple(memory.shape)} {memory.dtype}, "
                f"got {tuple(value.shape)} {value.dtype}"
            )
        return value.detach()

    def _memory(self, address: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        own: torch.dtype = getattr(torch, dtype)
        memory = (c_char * (prod(shape) * own.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=own).view(shape)

    def _copy(self, memory: Tensor) -> Tensor:
        return memory.clone()
