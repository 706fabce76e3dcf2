"""The C++ functions of autograd (csrc/bindings/autograd_module.cpp), where they were built for this
very torch."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..call_spec import CallSpec


class Native(Protocol):
    """Its functions; positional arguments."""

    __file__: str

    def layer(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
        cast_weights: bool,
        resets: Tensor | None = None,
        reset_state: Sequence[Tensor] = (),
        masks: Tensor | None = None,
        /,
    ) -> tuple[Tensor, ...]: ...

    def step(
        self, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], spec: CallSpec, /
    ) -> tuple[Tensor, ...]: ...

    def registered_weights(
        self,
        module: nn.Module,
        names: Sequence[str],
        flat: list[Tensor] | None,
        input: Any,
        hx: Any,
        /,
    ) -> list[Tensor] | None: ...

    def frozen(
        self,
        input: Tensor,
        state: Sequence[Tensor],
        prepacked: Tensor,
        spec: CallSpec,
        hidden_size: int,
        proj_size: int,
        is_step: bool,
        /,
    ) -> tuple[Tensor, ...]: ...

    def stream(self, address: int, x: Tensor, /) -> Tensor: ...

    def cast_weights(self, weights: list[Tensor], dtype: torch.dtype, /) -> list[Tensor]: ...

    def use_lookups(self, lookups: dict[str, Any], /) -> None: ...

    def use_decomposition(self, vjp: Callable[..., list[Tensor | None]], /) -> None: ...

    def use_replaced_kernels(self, names: set[str], /) -> None: ...

    def plain_layer(
        self, module: nn.Module, input: Any, hx: Any, resets: Any = ..., reset_state: Any = ..., /
    ) -> Any: ...

    def plain_cell(
        self, module: nn.Module, names: Sequence[str], mode: str | None, input: Any, hx: Any, /
    ) -> Any: ...

    def plain_frozen(
        self,
        input: Any,
        hx: Any,
        prepacked: Tensor,
        spec: CallSpec,
        hidden_size: int,
        proj_size: int,
        is_step: bool,
        /,
    ) -> Any: ...

    def is_watched(self) -> bool: ...

    def use_plain_calls(
        self,
        is_plain: Callable[[type], bool],
        methods: tuple[str, ...],
        observer: ContextVar[Any],
        forward_ad: dict[str, Any],
        /,
    ) -> None: ...


def load() -> Native | None:
    """The library for this torch, or None."""
    # As setup.py names it: releases that differ in their last number have the same headers.
    release = re.sub(r"^(\d+\.\d+)\.\d+$", r"\1", torch.__version__.partition("+")[0])
    name = "rnnkern._autograd_torch" + re.sub(r"\W", "_", release)
    if importlib.util.find_spec(name) is None:
        return None
    return cast(Native, importlib.import_module(name))
