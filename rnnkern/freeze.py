"""freeze(model): a copy for inference whose recurrent layers and cells run on prepacked weights.

A frozen module keeps its weights twice. As buffers under torch.nn's names they serve state_dict,
copies, pickles and export. As `_prepacked`, what the engine multiplies by, they serve calls. The
second is derived from the first wherever the first changes through torch's own ways, and it is no
part of a pickle: it belongs to the instruction-set level of this process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._frozen_weights import copied, current_values, refusal_of, weight_names, weights_of
from .backend import PLAIN, Backend, select_backend, tensors_in
from .call_spec import WEIGHT_FORMATS, CallSpec, weight_format
from .convert import class_of, derive, reduce_by, refusal
from .nn import cells, layers
from .nn._torch_twin import CLASSES, Converted
from .nn._tracing import fx_tracing
from .ops import decomposition, library
from .ops.autograd import NATIVE, OBSERVER, frozen_call, layer_call, prepacked_call
from .ops.library import BY_MODE, CALL_SPECS, CELLS
from .stream import Stream

_any_autocast = torch._C._is_any_autocast_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_is_exporting = torch.compiler.is_exporting
_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state

Module = TypeVar("Module", bound=nn.Module)


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
            _adopt("", self, freeze(source, self._format))

    def select_backend(
        self, input: Any, weights: Sequence[Any], hx: Any = None, usual: bool = False
    ) -> Backend | None:
        """The layer's; RuntimeError where other code than the kernels would round nothing."""
        path = select_backend(self, input, weights, hx, usual)
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
        format = WEIGHT_FORMATS[self._format]
        spec = self._spec(False)
        each = spec.directions * spec.weights_per_direction
        self._specs = (spec, self._spec(True))
        with torch.inference_mode(False), torch.no_grad():
            self._prepacked = [
                library.prepack([w.detach() for w in weights[k : k + each]], *spec, format)
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
        """hx as the operators take it; None if it is not of plain tensors, one or a pair."""
        if hx is None:
            return ()
        state = hx if type(hx) is tuple else (hx,)
        is_pair = len(CELLS[self._specs[0].cell].states) > 1
        fits = len(state) == 1 + is_pair and (type(hx) is tuple) == is_pair
        return state if fits and PLAIN.issuperset(map(type, state)) else None

    def _run_layer(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        packed: Sequence[Tensor],
        spec: CallSpec,
    ) -> tuple[Tensor, ...]:
        """One layer by the kernels; `packed` is its prepacked weights alone."""
        return prepacked_call(
            input, batch_sizes, state, packed[0], spec, self.hidden_size, self.proj_size
        )


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
                output, *states = self._run_stack(self._run_plain, input, None, state, spec)
            except (RuntimeError, TypeError):
                pass  # the layer's checks say what is wrong in torch.nn's words
            else:
                return output, self._result(states)
        return super().forward(input, hx)

    def _run_stack(
        self,
        run: layers.Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        spec: CallSpec,
    ) -> Sequence[Tensor]:
        if self.num_layers == 1:
            return run(input, batch_sizes, state, self._prepacked, spec)
        packed = [[p] for p in self._prepacked]
        return self._stack(run, input, batch_sizes, state, packed, spec)

    def _run_plain(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        packed: Sequence[Tensor],
        spec: CallSpec,
    ) -> tuple[Tensor, ...]:
        """`_run_layer` for a plain call of padded data."""
        return frozen_call(input, state, packed[0], spec, self.hidden_size, self.proj_size, False)

    def stream(self, batch_size: int = 1, threads: int = 1) -> Stream:
        """The stack with its state inside, for input that comes step by step.

        threads  of each step: a second one pays for wide layers or many rows

        Raises ValueError for two directions and for counts below one, TypeError for other counts.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer needs the whole sequence: it has no stream")
        return Stream(list(self._prepacked), self.current_weights()[0].dtype, batch_size, threads)

    def _run(
        self,
        run: layers.Run,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
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
        return self._run_stack(self._run_layer, input, batch_sizes, state, spec)


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
            packed, spec = self._prepacked[0], self._specs[False]
            try:
                states = frozen_call(input, state, packed, spec, self.hidden_size, 0, True)
            except (RuntimeError, TypeError):
                pass  # as in a layer
            else:
                return states if len(states) > 1 else states[0]
        if _any_autocast() and isinstance(input, Tensor):
            dtype = self.current_weights()[0].dtype
            hx = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx
            hx = hx.to(dtype) if isinstance(hx, Tensor) else hx
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input.to(dtype), hx)
        return super().forward(input, hx)

    def stream(self, batch_size: int = 1, threads: int = 1) -> Stream:
        """The cell with its state inside: `h = stream(x)`.

        Raises ValueError for counts below one, TypeError for what is no whole number.
        """
        return Stream(list(self._prepacked), self.current_weights()[0].dtype, batch_size, threads)

    def _spec(self, batch_first: bool) -> CallSpec:
        bias = self._buffers["bias_ih"] is not None
        return CALL_SPECS[BY_MODE[str(self._mode)].id, 1, bias, False, batch_first]

    def _operator_call(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        state: Sequence[Tensor],
        weights: Sequence[Tensor],
        spec: CallSpec,
    ) -> tuple[Tensor, ...]:
        if _is_exporting():
            self._refuse_rounded("torch.export")
            return super()._operator_call(input, batch_sizes, state, weights, spec)
        return self._run_layer(input, batch_sizes, state, self._prepacked, spec)

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


#: The frozen class for each of torch's.
_FROZEN: dict[type, type[nn.Module]] = {
    CLASSES["LSTM"]: FrozenLSTM,
    CLASSES["GRU"]: FrozenGRU,
    CLASSES["RNN"]: FrozenRNN,
    CLASSES["LSTMCell"]: FrozenLSTMCell,
    CLASSES["GRUCell"]: FrozenGRUCell,
    CLASSES["RNNCell"]: FrozenRNNCell,
}


def _frozen_base(cls: type) -> type[nn.Module]:
    return next(_FROZEN[kind] for kind in cls.__mro__ if kind in _FROZEN)


def _new(cls: type, *args: Any) -> nn.Module:
    """An empty instance of the class that a frozen instance of `cls` has (for pickle)."""
    kind = _frozen_class(cls)
    empty: nn.Module = kind.__new__(kind, *args)
    return empty


@cache
def _frozen_class(cls: type) -> type[nn.Module]:
    """The frozen class for one of torch.nn's, of rnnkern's, or of the user's that delegates."""
    base = _frozen_base(cls)
    if cls in _FROZEN or cls.__module__.startswith("rnnkern.nn."):
        return base
    members = {"_original": cls, "__reduce_ex__": reduce_by(_new)}
    return derive(cls, (cls, base), members)


def _obstacle(module: nn.Module) -> str | None:
    """Why a recurrent module cannot be frozen, whatever its weights are."""
    cls = _user_class(module)
    if not isinstance(module, Frozen) and (reason := refusal(module, cls, _frozen_base(cls))):
        return reason
    nonlinearity = getattr(module, "nonlinearity", "tanh")
    if nonlinearity not in ("tanh", "relu"):
        return f"its nonlinearity is {nonlinearity!r}"
    return None


def _user_class(module: nn.Module) -> type:
    """The module's class without parametrisations and conversions."""
    cls = class_of(module)
    return cls._original if issubclass(cls, Converted) else cls


def _recurrent(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [found for found in model.named_modules() if isinstance(found[1], tuple(_FROZEN))]


def _freeze(module: Any, weights: str) -> None:
    """Turns a layer or cell of a copied model into a frozen one, in place."""
    if not isinstance(module, Frozen):
        target = _frozen_class(_user_class(module))
        values = current_values(module)
        if reason := refusal_of(weights_of(values), weights):
            raise ValueError(reason)
        object.__setattr__(module, "__class__", target)
        for name in values:
            vars(module).pop(name, None)
            module._parameters.pop(name, None)
        module._buffers.update(values)
    elif reason := refusal_of(module.current_weights(), weights):
        raise ValueError(reason)
    module._format = weights
    module.eval()
    module._pack()


def freeze(module: Module, weights: str = "float32") -> Module:
    """A copy for inference: every recurrent layer and cell in it runs on weights packed once.

    module   a layer, a cell or a whole model: torch.nn's recurrent layers and cells, rnnkern's, and
             subclasses whose `forward` reaches theirs through `super()` alone
    weights  "float32" rounds nothing, whatever the dtype is: results have the bits of the layer's.
             "bfloat16" and "int8" are for float32 layers, and round the weight matrices; "int8"
             also rounds inputs and h in each step. Biases, sums and states stay float32

    The original is untouched. A frozen module is called as the layer is. It is a snapshot: later
    changes of the original's weights are not seen; `refresh` takes them over. Weights are buffers
    under torch.nn's names, so that state_dict fits the layer, and load_state_dict packs anew. Calls
    do not read them: after a change in place, `refresh` does. Weights take their memory twice.
    Reparametrised ones are taken with their current values. Autocast does not change the dtype of
    the computation, nor do torch's settings for float32 products.

    Raises ValueError, with the name of the layer, for one that cannot be frozen: on another device
    than the CPU, of size zero, of a dtype that the kernels or `weights` do not take, or a subclass
    that does more than to call its base. A call raises RuntimeError where a gradient is asked for.

    >>> frozen = rnnkern.freeze(model)
    >>> with torch.inference_mode():
    ...     output, (h_n, c_n) = frozen.lstm(x)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    weight_format(weights, "float32")  # a wrong name
    parts = dict(_recurrent(module))
    for name, part in parts.items():
        if reason := _obstacle(part):
            raise ValueError(f"{name or 'the module itself'} cannot be frozen: {reason}")
    frozen = copied(module, parts.values())
    for name, part in _recurrent(frozen):
        try:
            _freeze(part, weights)
        except ValueError as error:
            raise ValueError(f"{name or 'the module itself'} cannot be frozen: {error}") from None
    return frozen


def refresh(frozen: nn.Module, source: nn.Module | None = None) -> None:
    """Packs the weights of all frozen layers and cells in `frozen` anew, in place.

    source  the model that was frozen, or one like it: its recurrent layers' weights are taken over.
            None: the frozen modules' own buffers, after they were changed in place

    Other modules stay as they are; `load_state_dict` takes over all of a model.

    Raises ValueError where the source has no layer of a frozen one's name, or one with weights of
    other names, shapes or dtypes.
    """
    parts = {name: m for name, m in frozen.named_modules() if isinstance(m, Frozen)}
    if source is None:
        for part in parts.values():
            part.refresh()
        return
    found = dict(source.named_modules())
    if missing := sorted(parts.keys() - found.keys()):
        raise ValueError(f"the source has no module {missing[0]}")
    fresh = {name: freeze(found[name], part._format) for name, part in parts.items()}
    for name, part in parts.items():
        _check_alike(name, part, fresh[name])
    for name, part in parts.items():
        _adopt(name, part, fresh[name])


def _check_alike(name: str, frozen: Frozen, fresh: nn.Module) -> None:
    def form(module: Frozen) -> tuple[Any, ...]:
        own = [(key, module._buffers[key]) for key in weight_names(module)]
        return module._specs, [(key, None if w is None else (w.shape, w.dtype)) for key, w in own]

    if not isinstance(fresh, Frozen) or form(fresh) != form(frozen):
        raise ValueError(
            f"{name or 'the source'} is another cell, or has weights of other names, shapes or "
            "dtypes"
        )


def _adopt(name: str, frozen: Frozen, fresh: Any) -> None:
    """Gives a frozen module the weights of another one like it."""
    _check_alike(name, frozen, fresh)
    for key in weight_names(frozen):
        frozen._buffers[key] = fresh._buffers[key]
    if isinstance(frozen, nn.RNNBase):
        frozen._init_flat_weights()
    frozen._prepacked = fresh._prepacked
