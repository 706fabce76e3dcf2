"""LSTMCell, GRUCell and RNNCell: torch.nn's cells on the same kernels, as one step of a layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import select_backend, tensors_in
from ..call_spec import CallSpec
from ..ops import autograd, decomposition, library
from ..ops.autograd import Run, operator_call, step_call, without_first
from ..ops.library import BY_MODE, CALL_SPECS
from . import _plain, _torch_twin, _tracing
from .weights import registered_weights

_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Cell(_torch_twin.RNNCellBase):
    """What the three cells share. Shapes: input (B, I) or (I), states (B, H) or (H)."""

    select_backend = select_backend
    proj_size = 0
    _names: Sequence[str] = _NAMES

    @property
    def _mode(self) -> str | None:
        """The mode of `cell_spec.Cell`; None for a nonlinearity that torch.nn refuses."""
        raise NotImplementedError

    def current_weights(self) -> list[Tensor]:
        """w_ih, w_hh[, b_ih, b_hh], whatever has been put in the parameters' place."""
        weights = [getattr(self, name) for name in self._names]
        return weights[:2] if weights[2:4] == [None, None] else weights

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """torch.nn's forward: the same arguments, results and errors."""
        weights: list[Tensor] | None = None
        if not _is_compiling():
            if autograd.NATIVE is not None:
                results = autograd.NATIVE.plain_cell(self, self._names, self._mode, input, hx)
                if results is not None:
                    return results
            weights = registered_weights(self, self._names, None, input, hx)
        usual = weights is not None
        if weights is None:
            tracer = None if _is_compiling() else _tracing.fx_tracer(input, hx)
            if tracer is not None:
                return _tracing.fx_leaf(tracer, self, input, hx)
            weights = self.current_weights()

        path = self.select_backend(input, weights, hx, usual)
        if path is not None and path.name == "torch":
            return self._torch_forward(input, hx)
        rank = input.dim()
        mode = self._mode
        if mode is None or not self._regular(input, rank, hx, weights):
            return self._torch_forward(input, hx)

        spec = CALL_SPECS[BY_MODE[mode].id, 1, self._has_bias(weights), False, False]
        given = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
        state: Sequence[Tensor] = self._joined(given)
        if rank == 1:
            input, state = input.unsqueeze(0), [s.unsqueeze(0) for s in state]
        states: Sequence[Tensor]
        if path is None and usual:
            states = self._masked_step(input, state, weights, spec)
        else:
            run = self._masked_run(self._operator_call if path is None else decomposition.layer)
            state = [s.unsqueeze(0) for s in state]
            _, *states = run(input.unsqueeze(0), None, state, weights, spec)
            states = [without_first(s) for s in states]
        if rank == 1:
            states = [s.squeeze(0) for s in states]
        return self._result(states)

    # What an added cell overrides.

    def _masked_step(
        self, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], spec: CallSpec
    ) -> Sequence[Tensor]:
        return step_call(input, state, weights, spec)

    def _masked_run(self, run: Run) -> Run:
        """A call of one layer as this cell makes it."""
        return run

    def _has_bias(self, weights: Sequence[Tensor]) -> bool:
        return len(weights) > 2

    def _joined(self, state: Sequence[Tensor]) -> Sequence[Tensor]:
        """[], [h] or [h, c], as the operators take them."""
        return state

    def _result(self, states: Sequence[Tensor]) -> Any:
        return (states[0], states[1]) if len(states) == 2 else states[0]

    def _operator_call(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return operator_call(input, batch_sizes, state, weights, spec, masks=masks)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script compiles Python source: it gets torch's cell on the same parameters.
        return _torch_twin.to_torch(self)

    def _torch_forward(self, input: Any, hx: Any) -> Any:
        """torch.nn's own code, kept from what it would read past."""
        if not _is_compiling():
            library.check_memory(input, hx, self.current_weights(), self._names)
        if isinstance(input, Tensor) and input.dim() == 1:
            for k, s in enumerate(tensors_in(hx)):
                if s.dim() == 2:
                    which = f"hx[{k}]" if self._mode == "LSTM" else "hx"
                    raise RuntimeError(
                        f"For unbatched 1-D input, {which} should also be 1-D but got 2-D tensor"
                    )
        return super().forward(input, hx)

    def _regular(self, input: Tensor, rank: int, hx: Any, weights: list[Tensor]) -> bool:
        """Whether the arguments fit together; if not, torch.nn's code raises its errors.

        Autocast is torch.nn's as well: a cell has little to gain there.
        """
        if (
            rank not in (1, 2)
            or self._mode is None
            or input.shape[-1] != self.input_size
            or input.dtype != weights[0].dtype
            or _any_autocast()
        ):
            return False
        if hx is None:
            return True
        shape = (*input.shape[:-1], self.hidden_size)
        count = len(BY_MODE[self._mode].states)
        if count == 1:
            return isinstance(hx, Tensor) and hx.shape == shape
        return (
            isinstance(hx, (tuple, list)) and len(hx) == count and all(s.shape == shape for s in hx)
        )


class LSTMCell(Cell, _torch_twin.LSTMCell):
    """torch.nn.LSTMCell on rnnkern's kernels: the same arguments, parameters, results and errors.

    >>> cell = rnnkern.LSTMCell(10, 20)
    >>> h, c = cell(torch.randn(3, 10))
    """

    _mode = "LSTM"


class GRUCell(Cell, _torch_twin.GRUCell):
    """torch.nn.GRUCell on rnnkern's kernels: the same arguments, parameters, results and errors.

    >>> cell = rnnkern.GRUCell(10, 20)
    >>> h = cell(torch.randn(3, 10))
    """

    _mode = "GRU"


class RNNCell(Cell, _torch_twin.RNNCell):
    """torch.nn.RNNCell on rnnkern's kernels: the same arguments, parameters, results and errors.

    >>> cell = rnnkern.RNNCell(10, 20, nonlinearity="relu")
    >>> h = cell(torch.randn(3, 10))
    """

    @property
    def _mode(self) -> str | None:
        return _NONLINEARITIES.get(self.nonlinearity)


_NONLINEARITIES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}

_plain.serve(LSTMCell, GRUCell, RNNCell)
