"""Frozen layers and cells: modules for inference that call the kernels with prepacked weights.

A frozen module keeps its weights twice. As buffers under torch.nn's names they serve state_dict,
copies, pickles and export. As `_prepacked`, what the engine multiplies by, they serve calls. The
second is derived from the first wherever the first changes through torch's own ways, and it is no
part of a pickle: it belongs to the instruction-set level of this process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._frozen_kinds import FROZEN, RECURRENT, form, obstacle
from ._frozen_weights import copied, current_values, refusal_of, weight_names, weights_of
from .backend import PLAIN, Backend, tensors_in
from .call_spec import WEIGHT_FORMATS, CallSpec
from .nn import added, cells, layers, masks
from .nn._torch_twin import CLASSES
from .nn._tracing import fx_tracing
from .ops import decomposition, library
from .ops.autograd import NATIVE, OBSERVER, Run, frozen_call, layer_call, prepacked_call
from .ops.library import BY_MODE, CALL_SPECS, CELLS
from .stream import Stream

_any_autocast = torch._C._is_any_autocast_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_exporting = torch.compiler.is_exporting
_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state


class Frozen(nn.Module):
    """What frozen layers and cells share: the two forms of the weights, and no gradient."""

    hidden_size: int
    proj_size: int

    is_frozen = True
    _format = "float32"
    _prepacked: Sequence[Tensor] = ()  # of each layer
    _specs: tuple[CallSpec, CallSpec]  # of its calls, by batch_first

    def current_weights(self) -> list[Tensor]:
        """The weights in torch's order."""
        own = self._buffers
        return weights_of({name: own[name] for name in weight_names(self)})

    def refresh(self, source: nn.Module | None = None) -> None:
        """Packs the weights anew: those of `source`, a layer or cell like the one that was frozen.

        None: the module's own buffers, after they were changed in place.

        Raises ValueError where the source's weights have other names, shapes or dtypes.
        """
        if source is None:
            self._pack()
        else:
            self.take_over(self.weights_like("", source))

    def weights_like(self, name: str, source: nn.Module) -> dict[str, Tensor | None]:
        """The weights of `source`, by name, if they can take the place of this module's.

        name  the module's name in its model, for the errors of `refresh`
        """
        if isinstance(source, RECURRENT):
            values = current_values(copied(source, [source]))
            if reason := obstacle(source) or refusal_of(weights_of(values), self._format):
                raise ValueError(f"{name or 'the module itself'} cannot be frozen: {reason}")
            own = {key: self._buffers[key] for key in weight_names(self)}
            if form(source, values) == form(self, own):
                return values
        raise ValueError(
            f"{name or 'the source'} is another cell, or has weights of other names, shapes or "
            "dtypes"
        )

    def take_over(self, weights: dict[str, Tensor | None]) -> None:
        """Packs these weights, of `weights_like`."""
        with self._packing_anew():
            self._buffers.update(weights)

    def stream(self, batch_size: int = 1, threads: int = 1) -> Stream:
        """The module with its state inside, for input that comes step by step: `y = stream(x)`.

        threads  of each step: a second one pays for wide layers or many rows

        Raises ValueError for counts below one, TypeError for other counts.
        """
        return Stream(list(self._prepacked), self.current_weights()[0].dtype, batch_size, threads)

    def select_backend(
        self, input: Any, weights: Sequence[Any], hx: Any = None, usual: bool = False
    ) -> Backend | None:
        """The layer's; RuntimeError where other code than the kernels would round nothing."""
        path: Backend | None = super().select_backend(input, weights, hx, usual)  # type: ignore[misc]
        if path is not None:
            self._refuse_rounded(str(path))
        return path

    def train(self, mode: bool = True) -> Any:
        """Has no effect: a frozen module is always in eval mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        weights = self.current_weights()[0].dtype if self._format == "float32" else self._format
        own = super().extra_repr()
        return f"{own}, frozen snapshot of its weights in {str(weights).removeprefix('torch.')}"

    if TYPE_CHECKING:  # the layer's, or the cell's below

        def _spec(self, batch_first: bool) -> CallSpec: ...

    def _pack(self) -> None:
        """Fills `_prepacked` from the buffers; ValueError for those that cannot be packed."""
        weights = self.current_weights()
        if reason := refusal_of(weights, self._format):
            raise ValueError(f"{type(self).__name__} cannot pack its weights: {reason}")
        if isinstance(self, nn.RNNBase):
            self._init_flat_weights()
        spec = self._spec(False)
        each = spec.directions * library.weights_per_direction(spec)
        self._specs = (spec, self._spec(True))
        with torch.inference_mode(False), torch.no_grad():
            after = WEIGHT_FORMATS[self._format], *masks.constant_masks(self, weights[0])
            self._prepacked = [
                library.prepack([w.detach() for w in weights[k : k + each]], *spec, *after)
                for k in range(0, len(weights), each)
            ]

    @contextmanager
    def _packing_anew(self) -> Iterator[None]:
        """Packs what the block has made of the buffers, or leaves both as they were."""
        before = dict(self._buffers)
        try:
            yield
            self._pack()
        except Exception:
            self._buffers.update(before)
            raise

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with self._packing_anew():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._packing_anew():
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        for derived in ("_prepacked", "_flat_weight_refs"):
            state.pop(derived, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()

    def __prepare_scriptable__(self) -> nn.Module:
        self._refuse_rounded("torch.jit.script")
        return super().__prepare_scriptable__()  # type: ignore[misc,no-any-return]

    def _refuse_rounded(self, what: str) -> None:
        if self._format != "float32":
            raise RuntimeError(
                f"weights in {self._format} are for rnnkern's kernels alone ({what})"
            )

    def _refuse_gradient(self, input: Any, hx: Any) -> None:
        if _is_grad_enabled() and any(t.requires_grad for t in tensors_in(input, hx)):
            raise RuntimeError(
                f"{type(self).__name__} is frozen: no gradient passes through it. Call it under "
                "torch.no_grad() or torch.inference_mode(), or use the layer that it was made from"
            )

    def _plain_call(self, input: Any, hx: Any, spec: CallSpec, proj_size: int, step: bool) -> Any:
        """The usual call of one layer or of a cell, in C++; None for any other."""
        if NATIVE is None or len(self._prepacked) != 1 or _is_compiling():
            return None
        packed = self._prepacked[0]
        try:
            return NATIVE.plain_frozen(input, hx, packed, spec, self.hidden_size, proj_size, step)
        except (RuntimeError, TypeError):
            return None  # the layer's checks say what is wrong in torch.nn's words

    def _plain_state(self, hx: Any) -> tuple[Tensor, ...] | None:
        """The states of hx; None if they are not plain tensors, one or a tuple of them."""
        if hx is None:
            return ()
        state = hx if type(hx) is tuple else (hx,)
        count = len(CELLS[self._specs[0].cell].states)
        fits = len(state) == count and (type(hx) is tuple) == (count > 1)
        return state if fits and PLAIN.issuperset(map(type, state)) else None


def _plain(input: Any) -> bool:
    """Whether nothing stands between the call and the kernels."""
    if type(input) is not Tensor or _is_compiling() or fx_tracing():
        return False
    if NATIVE is not None:
        return not NATIVE.is_watched()
    return (
        not _any_autocast()
        and OBSERVER.get() is None
        and forward_ad._current_level < 0
        and not _functorch_active()
        and _tracing_state() is None
    )


class FrozenLayer(Frozen, layers.Layer):
    """A frozen layer: the call of LSTM, GRU or RNN, with the same results and errors."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        resets: Any = None,
        reset_state: Any = None,
        return_ends: bool | None = None,
    ) -> Any:
        """The layer's forward, without gradients."""
        if resets is not None or reset_state is not None or return_ends:
            self._refuse_gradient(input, (hx, reset_state))
            return super().forward(input, hx, resets, reset_state, return_ends)
        specs = self._specs
        result = self._plain_call(input, hx, specs[self.batch_first], self.proj_size, False)
        if result is not None:
            return result
        self._refuse_gradient(input, hx)
        state = self._plain_state(hx)
        if state is not None and _plain(input) and input.dim() == 3:
            spec = self._specs[self.batch_first]
            try:
                output, *states = self._run_stack(frozen_call, input, None, state, spec)
            except (RuntimeError, TypeError):
                pass  # the layer's checks say what is wrong in torch.nn's words
            else:
                return output, self._result(states)
        return super().forward(input, hx)

    def _run_stack(
        self,
        call: Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        spec: CallSpec,
    ) -> Sequence[Tensor]:
        H, P = self.hidden_size, self.proj_size
        if self.num_layers == 1:
            return call(input, batch_sizes, state, self._prepacked[0], spec, H, P)
        return self._stack(
            lambda x, sizes, s, packed, spec: call(x, sizes, s, packed[0], spec, H, P),
            *(input, batch_sizes, state, [[p] for p in self._prepacked], spec),
        )

    def stream(self, batch_size: int = 1, threads: int = 1) -> Stream:
        """The stack with its state inside, as a cell's; ValueError for two directions."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the whole sequence: it has no stream")
        return super().stream(batch_size, threads)

    def _run(
        self,
        run: Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
        resets: library.Resets | None = None,  # never given: they run by episodes
    ) -> Sequence[Tensor]:
        """The stack on checked arguments, in the weights' dtype, autocast or not."""
        if _any_autocast():
            input, *state = (t.to(weights[0].dtype) for t in (input, *state))
            with torch.autocast(input.device.type, enabled=False):
                return self._run(run, input, batch_sizes, state, weights, spec)
        if run is decomposition.layer or _is_exporting():
            self._refuse_rounded("torch.export")
            return super()._run(run, input, batch_sizes, state, weights, spec)
        if not _is_compiling() and OBSERVER.get() is not None:
            self._refuse_rounded("trace and watch")
            return super()._run(layer_call, input, batch_sizes, state, weights, spec)
        return self._run_stack(prepacked_call, input, batch_sizes, state, spec)


class FrozenCell(Frozen, cells.Cell):
    """A frozen cell: the call of LSTMCell, GRUCell or RNNCell, with the same results and errors."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The cell's forward, without gradients."""
        result = self._plain_call(input, hx, self._specs[False], 0, True)
        if result is not None:
            return result
        self._refuse_gradient(input, hx)
        state = self._plain_state(hx)
        if state is not None and _plain(input) and input.dim() == 2:
            packed, spec, joined = self._prepacked[0], self._specs[False], self._joined(state)
            try:
                states = frozen_call(input, None, joined, packed, spec, self.hidden_size, 0, True)
            except (RuntimeError, TypeError):
                pass  # as in a layer
            else:
                return self._result(states)
        if _any_autocast() and isinstance(input, Tensor):
            dtype = self.current_weights()[0].dtype
            hx = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx
            hx = hx.to(dtype) if isinstance(hx, Tensor) else hx
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input.to(dtype), hx)
        return super().forward(input, hx)

    def _spec(self, batch_first: bool) -> CallSpec:
        bias = any(self._buffers.get(name) is not None for name in ("bias_ih", "bias_hh"))
        return CALL_SPECS[BY_MODE[str(self._mode)].id, 1, bias, False, batch_first]

    def _operator_call(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
        masks: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if _is_exporting():
            self._refuse_rounded("torch.export")
            return super()._operator_call(input, batch_sizes, state, weights, spec, masks)
        return prepacked_call(
            input, batch_sizes, state, self._prepacked[0], spec, self.hidden_size, 0
        )

    def _torch_forward(self, input: Any, hx: Any) -> Any:
        result = super()._torch_forward(input, hx)  # raises torch.nn's error
        self._refuse_rounded("torch.nn's own code")
        return result


class FrozenLSTM(FrozenLayer, layers.LSTM):
    """A frozen LSTM."""


class FrozenGRU(FrozenLayer, layers.GRU):
    """A frozen GRU."""


class FrozenRNN(FrozenLayer, layers.RNN):
    """A frozen RNN."""


class FrozenLSTMCell(FrozenCell, cells.LSTMCell):
    """A frozen LSTMCell."""


class FrozenGRUCell(FrozenCell, cells.GRUCell):
    """A frozen GRUCell."""


class FrozenRNNCell(FrozenCell, cells.RNNCell):
    """A frozen RNNCell."""


class FrozenAddedLayer(FrozenLayer, added.AddedLayer):
    """A frozen layer of a cell that is not built in."""

    def _run_stack(
        self,
        call: Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        spec: CallSpec,
    ) -> Sequence[Tensor]:
        joined = added.joined(state)
        output, *states = super()._run_stack(call, input, batch_sizes, joined, spec)
        return output, *added.split(states, self.hidden_size)


class FrozenAddedCell(FrozenCell, added.AddedCellModule):
    """A frozen cell that is not built in."""


FROZEN.update(
    {
        CLASSES["LSTM"]: FrozenLSTM,
        CLASSES["GRU"]: FrozenGRU,
        CLASSES["RNN"]: FrozenRNN,
        CLASSES["LSTMCell"]: FrozenLSTMCell,
        CLASSES["GRUCell"]: FrozenGRUCell,
        CLASSES["RNNCell"]: FrozenRNNCell,
        added.AddedLayer: FrozenAddedLayer,
        added.AddedCellModule: FrozenAddedCell,
    }
)
