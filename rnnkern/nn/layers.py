"""LSTM, GRU and RNN: torch.nn's layers with the forward pass on rnnkern's kernels.

Construction, parameters, copies and most messages are torch.nn's own code. Letters: T steps,
B batch rows, I input_size, H hidden_size, L layers, D directions, N rows of packed data.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backend import select_backend
from ..call_spec import CallSpec
from ..ops import autograd, decomposition, library
from ..ops.autograd import Run, layer_call, operator_call
from ..ops.library import BY_MODE, CALL_SPECS, Resets
from ..precision import autocast_dtype, cast_weights, takes_bfloat16
from . import _plain, _torch_twin, _tracing, resets
from .weights import registered_weights

_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_update_flat_weights = nn.RNNBase._update_flat_weights


def _all_to(dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


def _by_layer(state: Sequence[Tensor], layers: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(s.chunk(layers) for s in state), strict=True)) or [()] * layers


class Layer(_torch_twin.RNNBase):
    """What the three layers share: checks, layouts, the stack of layers, the choice of backend."""

    select_backend = select_backend
    _flat_weights: list[Tensor]  # type: ignore[assignment]  # torch allows None while it builds it

    def current_weights(self) -> list[Tensor]:
        """The weights in torch's order, after whatever has been put in the parameters' place."""
        if _is_compiling() and type(self)._update_flat_weights is _update_flat_weights:
            # The list is a cache: refreshing it inside a graph would leave traced tensors in it.
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights

    def forward(
        self,
        input: Any,
        hx: Any = None,
        resets: Any = None,
        reset_state: Any = None,
        return_ends: bool | None = None,  # a False would be an input of programs that torch traces
    ) -> Any:
        """torch.nn's forward: the same arguments, results and errors; and resets (see `LSTM`)."""
        if resets is not None or reset_state is not None or return_ends:
            return _call_with_resets(self, input, hx, resets, reset_state, bool(return_ends))
        if autograd.NATIVE is not None and not _is_compiling():
            results = autograd.NATIVE.plain_layer(self, input, hx)
            if results is not None:
                return results
        return self._any_call(input, hx)

    def _any_call(self, input: Any, hx: Any, resets: Resets | None = None) -> Any:
        """A call of whatever tensors, modules and modes.

        `resets` are checked and go with a batch of padded data; the states are those of all layers.
        Then None is returned where torch.nn's own code has to run, which knows no resets.
        """
        weights: list[Tensor] | None = None
        tensors = hx if resets is None else (*self._state(hx, None), resets.mask, *resets.state)
        if not _is_compiling():
            flat = self._flat_weights
            weights = registered_weights(self, self._flat_weights_names, flat, input, tensors)
        usual = weights is not None
        if weights is None:
            tracer = None if _is_compiling() else _tracing.fx_tracer(input, hx)
            if tracer is not None:
                return _tracing.fx_leaf(tracer, self, input, hx)
            weights = self.current_weights()

        path = self.select_backend(input, weights, tensors, usual)
        run: Run
        if path is None:
            run = layer_call if usual else operator_call
        elif path.name == "decomposition":
            run = decomposition.layer
        elif resets is not None:
            return None
        else:
            if not _is_compiling():
                library.check_memory(input, hx, weights, self._flat_weights_names)
            return super().forward(input, hx)

        if isinstance(input, PackedSequence):
            return self._packed(run, input, hx, weights)
        rank = input.dim()
        if rank == 3:
            batch_first = self.batch_first
            state = self._state(hx, 3)
        elif rank == 2:
            batch_first = False
            state = [s.unsqueeze(1) for s in self._state(hx, 2)]
            input = input.unsqueeze(1)
        else:
            raise self._rank_error(rank)
        self._check(input, state, weights, batch_first)
        spec = self._spec(batch_first)
        output, *states = self._run(run, input, None, state, weights, spec, resets)
        if rank == 2:
            return output.squeeze(1), self._result([s.squeeze(1) for s in states])
        if batch_first and run is layer_call and self.mode == "LSTM" and input.is_cpu:
            output = output.view_as(output)  # torch.nn's is a view too, of a time-major result
        return output, self._result(states)

    # What one state means: LSTM overrides these for its pair.

    def _state(self, hx: Any, rank: int | None) -> Sequence[Tensor]:
        """hx as a sequence of tensors (none if hx is None), each of that rank, if one is given."""
        if hx is None:
            return ()
        if rank and hx.dim() != rank:
            batched = "batched 3-D" if rank == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {batched} input, hx should also be {rank}-D but got {hx.dim()}-D tensor"
            )
        return (hx,)

    def _hx(self, state: Sequence[Tensor]) -> Any:
        """The reverse of `_state`."""
        return state[0]

    def _result(self, states: Sequence[Tensor]) -> Any:
        return states[0]

    def _rank_error(self, rank: int) -> ValueError:
        name = self.mode.partition("_")[0]
        kind = "D tensor" if name == "RNN" else "D"
        return ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}{kind} instead")

    def _check(
        self, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], batch_first: bool
    ) -> None:
        """Raises torch.nn's errors for a 3-D input; what it lets pass the kernels check again."""
        first, second, features = input.shape
        batch, steps = (first, second) if batch_first else (second, first)
        good = features == self.input_size and (input.dtype == weights[0].dtype or _any_autocast())
        if good and state:
            count = 2 * self.num_layers if self.bidirectional else self.num_layers
            good = state[0].shape == (count, batch, self.proj_size or self.hidden_size) and all(
                s.shape == (count, batch, self.hidden_size) for s in state[1:]
            )
        if not good:
            if batch_first != self.batch_first:
                input = input.transpose(0, 1)
            if state:
                self.check_forward_args(input, self._hx(state), None)
            else:
                self.check_input(input, None)
        if input.device != weights[0].device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {weights[0].device}"
            )
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _packed(
        self, run: Run, packed: PackedSequence, hx: Any, weights: Sequence[Tensor]
    ) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        state = self._state(hx, None)  # its sizes are checked whole, as in torch.nn
        if state and not _is_compiling():  # a graph cannot look into batch_sizes; the kernels do
            self.check_forward_args(data, self._hx(state), batch_sizes)
        else:
            self.check_input(data, batch_sizes)
        if sorted_indices is not None:
            if state and not _is_compiling():
                library.check_memory(packed, state)
            state = [s.index_select(1, sorted_indices) for s in state]
        output, *states = self._run(run, data, batch_sizes, state, weights, self._spec(False))
        if unsorted_indices is not None:
            states = [s.index_select(1, unsorted_indices) for s in states]
        result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return result, self._result(states)

    def _spec(self, batch_first: bool) -> CallSpec:
        return CALL_SPECS[
            BY_MODE[self.mode].id,
            2 if self.bidirectional else 1,
            bool(self.bias),
            self.proj_size > 0,
            batch_first,
        ]

    def _run(
        self,
        run: Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
        resets: Resets | None = None,
    ) -> Sequence[Tensor]:
        """The stack of layers on checked arguments: (output, h_n (L·D, B, ·)[, c_n])."""
        if _any_autocast() and torch.is_autocast_enabled(input.device.type):
            last = state[-1] if state else input
            packed = batch_sizes is not None
            dtype = autocast_dtype(self, input, packed, state, weights)
            cast = cast_weights(weights, dtype) if run is layer_call else _all_to(dtype, weights)
            input, *state = _all_to(dtype, (input, *state))
            resets = resets and resets.to(dtype)
            with torch.autocast(input.device.type, enabled=False):
                results = self._run(run, input, batch_sizes, state, cast, spec, resets)
            if self.proj_size and input.is_cpu:  # where torch.nn's c keeps the wider type
                output, h_n, c_n = results
                return output, h_n, c_n.to(torch.promote_types(input.dtype, last.dtype))
            return results
        if run is layer_call and takes_bfloat16(
            self, input, batch_sizes, spec.batch_first, state, weights
        ):
            run = partial(layer_call, cast_weights=True)
            input, *state = _all_to(torch.bfloat16, (input, *state))
            resets = resets and resets.to(torch.bfloat16)
            results = self._run(run, input, batch_sizes, state, weights, spec, resets)
            return [result.to(torch.float32) for result in results]
        layers = self.num_layers
        if layers == 1 and resets is None:
            return run(input, batch_sizes, state, weights, spec)
        each = spec.directions * library.weights_per_direction(spec)
        own = [weights[k * each : (k + 1) * each] for k in range(layers)]
        return self._stack(run, input, batch_sizes, state, own, spec, resets)

    def _stack(
        self,
        run: Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Sequence[Tensor]],
        spec: CallSpec,
        resets: Resets | None = None,
    ) -> Sequence[Tensor]:
        """The layers one after the other; weights[k] are what `run` takes for layer k."""
        layers = self.num_layers
        states = _by_layer(state, layers)
        args: list[tuple[Resets, ...]] = [()] * layers
        if resets is not None:
            args = [(Resets(resets.mask, s),) for s in _by_layer(resets.state, layers)]
        drop = self.dropout if self.training else 0
        finals = []
        for k in range(layers):
            if k and drop:  # on (T, B, ·), as torch.nn's masks are drawn
                steps = input.transpose(0, 1) if spec.batch_first else input
                steps = torch.dropout(steps, drop, True)
                input = steps.transpose(0, 1) if spec.batch_first else steps
            input, *final = run(input, batch_sizes, states[k], weights[k], spec, *args[k])
            finals.append(final)
        return input, *map(torch.cat, zip(*finals, strict=True))

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script compiles Python source: it gets torch's layer on the same parameters.
        return _torch_twin.to_torch(self)


def _call_with_resets(layer: Layer, input: Any, hx: Any, *rest: Any) -> Any:
    return resets.call(layer, partial(Layer.forward, layer), input, hx, *rest)


class LSTM(Layer, _torch_twin.LSTM):
    """torch.nn.LSTM on rnnkern's kernels: the same arguments, parameters, results and errors.

    >>> lstm = rnnkern.LSTM(10, 20, num_layers=2)
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))

    A call takes more than torch.nn's: `lstm(input, hx, resets, reset_state, return_ends)`, so that
    the sequences of a batch may be cut into episodes. So do GRU and RNN, with h alone for a state.

    resets       bool (T, B), (B, T) with batch_first, (T,) without a batch: whether the row's state
                 is replaced by reset_state before the step, also before the first. Gradients end
                 there too
    reset_state  as hx: (h, c), each (L·D, ·), (L·D, B, ·), or one for each step and row,
                 (L·D, T, B, ·), (L·D, B, T, ·) with batch_first; zeros if None; differentiable
    return_ends  whether to return a third result, the states in which the episodes end (`Ends`)

    Every episode is a sequence of its own, in both directions. h_n and c_n are those of each row's
    last episode. On a CPU the bits are those of each episode alone, whether the kernels take the
    mask or the episodes run as one packed batch (`rnnkern.explain` says which).

    Raises RuntimeError for wrong shapes and devices, ValueError for a mask that is not bool and for
    packed input, TypeError for what is no tensor.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype,
        )  # fmt: skip

    def _state(self, hx: Any, rank: int | None) -> Sequence[Tensor]:
        if hx is None:
            return ()
        if isinstance(hx, Tensor):
            raise TypeError("hx must be a pair of tensors (h_0, c_0), got one tensor")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h, c = hx
        if rank and not (h.dim() == c.dim() == rank):
            batched = "batched 3-D" if rank == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {batched} input, hx and cx should also be {rank}-D but got "
                f"({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return (h, c)

    def _hx(self, state: Sequence[Tensor]) -> Sequence[Tensor]:
        return state

    def _result(self, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return states[0], states[1]


class GRU(Layer, _torch_twin.GRU):
    """torch.nn.GRU on rnnkern's kernels: the same arguments, parameters, results and errors.

    >>> gru = rnnkern.GRU(10, 20, bidirectional=True)
    >>> output, h_n = gru(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **refused: Any,  # proj_size and unknown names, for torch's own errors
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, **refused,
        )  # fmt: skip


class RNN(Layer, _torch_twin.RNN):
    """torch.nn.RNN on rnnkern's kernels: the same arguments, parameters, results and errors.

    >>> rnn = rnnkern.RNN(10, 20, nonlinearity="relu")
    >>> output, h_n = rnn(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **refused: Any,  # proj_size and unknown names, for torch's own errors
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype, **refused,
        )  # fmt: skip


_tracing.let_dynamo_trace(Layer)
_plain.serve(LSTM, GRU, RNN)
