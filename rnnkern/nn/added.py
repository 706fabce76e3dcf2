"""Layers and cells of cells that are not built in, with what LSTM and LSTMCell have.

Where the kernels do not take a call, a step in torch's operations serves, if the cell has one.
Letters as in layers.py.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import own_cell, own_cell_cuda
from ..backend import Backend, select_backend
from ..call_spec import CallSpec
from ..ops import library
from ..ops.autograd import Run, layer_call, without_first
from ..ops.library import BY_MODE, Resets
from ..own_cell import AddedCell
from . import _torch_twin
from .cells import Cell
from .layers import Layer
from .masks import masked, no_masks


class _Refusing:
    """Stands where torch.nn's own code is for the built-in cells."""

    def forward(self, input: Any, hx: Any = None) -> NoReturn:
        raise TypeError(f"input and weights must be tensors, got {type(input).__name__}")


class _NoTorchLayer(_Refusing, _torch_twin.RNNBase):
    pass


class _NoTorchCell(_Refusing, _torch_twin.RNNCellBase):
    pass


def _backend(module: Any, path: Backend | None, input: Any) -> Backend | None:
    """The backend of a call for which `select_backend` says `path`."""
    data = input[0] if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        return path
    refusal = own_cell_cuda.refusal(module.own.mode) if path is None and data.is_cuda else ""
    if refusal:
        return Backend("decomposition", refusal)
    if path is not None and path.name == "torch":
        return Backend("decomposition", path.reason)
    return path


def joined(state: Sequence[Tensor]) -> list[Tensor]:
    """All states as the operators take them: h, and the others side by side."""
    return [state[0], torch.cat(list(state[1:]), -1)] if len(state) > 2 else list(state)


def _joined_after_resets(resets: Resets, batch_first: bool) -> Resets:
    """The states after resets side by side; if one is given for each step, all are."""
    states, by_step = list(resets.state), 2 if batch_first else 1
    steps = max((s.shape[by_step] for s in states if s.dim() == 4), default=0)
    if steps:
        sizes = [-1] * 4
        sizes[by_step] = steps
        states = [s if s.dim() == 4 else s.unsqueeze(by_step).expand(sizes) for s in states]
    return Resets(resets.mask, joined(states))


def split(states: Sequence[Tensor], hidden_size: int) -> list[Tensor]:
    """The reverse of `joined`."""
    apart = [states[0]]
    for others in states[1:]:
        apart.extend(others.chunk(others.shape[-1] // hidden_size, -1))
    return apart


def _result(states: Sequence[Tensor]) -> Any:
    return tuple(states) if len(states) > 1 else states[0]


def _checked_heads(own: AddedCell, hidden_size: int, num_heads: int) -> int:
    if num_heads != 1 and BY_MODE[own.mode].recurrent != "heads":
        raise ValueError(f"{own.name} has no heads, got num_heads={num_heads}")
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads must divide hidden_size, got num_heads={num_heads} and "
            f"hidden_size={hidden_size}"
        )
    return num_heads


def _shapes(
    own: AddedCell, input_size: int, hidden_size: int, bias: bool, heads: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of a direction's parameters by name, in the operators' order."""
    cell = BY_MODE[own.mode]
    rows = len(cell.gates) * hidden_size
    recurrent = {
        "none": (),
        "dense": (rows, hidden_size),
        "heads": (heads, rows // heads, hidden_size // heads),
    }[cell.recurrent]
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": () if cell.given_sums else (rows, input_size),
        "weight_hh": recurrent,
        "bias_ih": (rows,) if bias and cell.biases[0] else (),
        "bias_hh": (rows,) if bias and cell.biases[1] else (),
        "params": (len(cell.params), hidden_size) if cell.params else (),
    }
    return {name: shape for name, shape in shapes.items() if shape}


def _check_given_sums(own: AddedCell, input_size: int, hidden_size: int, directions: int) -> None:
    cell = BY_MODE[own.mode]
    if not cell.given_sums:
        return
    wanted = directions * len(cell.gates) * hidden_size
    if input_size != wanted:
        raise ValueError(
            f"{own.name} takes the sums of its gates as input: input_size must be {wanted} "
            f"(directions x {len(cell.gates)} gates x hidden_size), got {input_size}"
        )


def _heads_repr(module: Any) -> str:
    return f", num_heads={module.num_heads}" if module.num_heads > 1 else ""


def _unscriptable(module: Any) -> NoReturn:
    raise TypeError(
        f"torch.jit.script compiles Python source, and {type(module).__name__} has none: its cell "
        "is a library of this process, which a saved program would not find. torch.compile takes it"
    )


class AddedLayer(Layer, _NoTorchLayer):
    """A stack of layers of an added cell: torch.nn.LSTM's arguments without proj_size.

    Parameters are those of torch.nn's layers, weight_ih_l0 (G·H, I) and so on with the cell's G
    gates; a cell with learned values per unit has params_l0 (their number, H) too. A cell whose
    W_hh is in heads has weight_hh_l0 (num_heads, G·H/num_heads, H/num_heads), one without a W_hh
    neither weight_hh_l0 nor bias_hh_l0. One whose input sums are given has neither weight_ih_l0
    nor bias_ih_l0: its input has input_size = D·G·H columns, those of a direction side by side,
    and it has one layer. hx and the final states are a tensor (L·D, B, H), or a tuple of them for a
    cell with several states, in the order of the cell's names. `LSTM` has the arguments of a call.
    Raises ValueError for num_heads that do not divide hidden_size, or that the cell does not have,
    and with given sums for another input_size and for more layers.
    """

    own: AddedCell
    masks = no_masks
    _flat_weights_names: list[str]

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
        num_heads: int = 1,
    ) -> None:
        # torch's constructor knows its own modes alone: it checks, and names a one-gate layer's.
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device="meta",
        )  # fmt: skip
        self.mode = self.own.mode
        _check_given_sums(self.own, input_size, hidden_size, 2 if bidirectional else 1)
        if num_layers > 1 and BY_MODE[self.mode].given_sums:
            raise ValueError(
                f"{self.own.name} takes the sums of its gates as input, which a layer below does "
                f"not give: num_layers must be 1, got {num_layers}"
            )
        self.num_heads = _checked_heads(self.own, hidden_size, num_heads)
        inputs = {name: p.shape[-1] for name, p in self.named_parameters()}
        self._flat_weights_names = []
        self._parameters.clear()
        for group in self._all_weights:
            suffix = group[0].removeprefix("weight_ih")
            shapes = _shapes(self.own, inputs[group[0]], hidden_size, bias, num_heads)
            group[:] = [name + suffix for name in shapes]
            for name, shape in zip(group, shapes.values(), strict=True):
                empty = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(empty))
            self._flat_weights_names += group
        self._init_flat_weights()
        self.reset_parameters()

    def extra_repr(self) -> str:
        """torch's, and the heads."""
        return super().extra_repr() + _heads_repr(self)

    def select_backend(
        self, input: Any, weights: Sequence[Any], hx: Any = None, usual: bool = False
    ) -> Backend | None:
        """As the built-in layers', with the cell's step in the place of torch.nn's code."""
        return _backend(self, select_backend(self, input, weights, hx, usual), input)

    def _state(self, hx: Any, rank: int | None) -> Sequence[Tensor]:
        names = BY_MODE[self.mode].states
        if len(names) == 1 or hx is None:
            return super()._state(hx, rank)
        if isinstance(hx, Tensor) or len(hx) != len(names):
            got = "one tensor" if isinstance(hx, Tensor) else f"{len(hx)}"
            raise TypeError(f"hx must be a tuple of the states ({', '.join(names)}), got {got}")
        if rank and any(s.dim() != rank for s in hx):
            batched = "batched 3-D" if rank == 3 else "unbatched 2-D"
            raise RuntimeError(f"For {batched} input, each state of hx should also be {rank}-D")
        return tuple(hx)

    def _hx(self, state: Sequence[Tensor]) -> Any:
        return _result(state)

    def _result(self, states: Sequence[Tensor]) -> Any:
        return _result(states)

    def _rank_error(self, rank: int) -> ValueError:
        return ValueError(f"{self.own.name}: Expected input to be 2D or 3D, got {rank}D instead")

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raises RuntimeError or ValueError, as torch.nn's layers do."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        given = hidden if isinstance(hidden, tuple) else (hidden,)
        for name, s in zip(BY_MODE[self.mode].states, given, strict=True):
            self.check_hidden_size(s, expected, f"Expected {name} of hx to be {{}}, got {{}}")

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
        run = masked(run, self)
        if resets is not None and len(resets.state) > 2:
            resets = _joined_after_resets(resets, spec.batch_first)
        output, *states = super()._run(
            run, input, batch_sizes, joined(state), weights, spec, resets
        )
        return output, *split(states, self.hidden_size)

    def __prepare_scriptable__(self) -> nn.Module:
        _unscriptable(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, True) or super().__reduce_ex__(protocol)


class AddedCellModule(Cell, _NoTorchCell):
    """One step of an added cell: torch.nn.LSTMCell's arguments, input and states.

    Parameters are weight_ih (G·H, I), weight_hh (G·H, H), bias_ih, bias_hh (G·H) and, for a cell
    with learned values per unit, params (their number, H). Heads as in the layer.
    """

    own: AddedCell
    masks = no_masks

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device="meta")
        _check_given_sums(self.own, input_size, hidden_size, 1)
        self.num_heads = _checked_heads(self.own, hidden_size, num_heads)
        self._parameters.clear()
        shapes = _shapes(self.own, input_size, hidden_size, bias, num_heads)
        for name, shape in shapes.items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        for name in ("bias_ih", "bias_hh"):
            if name not in shapes:
                self.register_parameter(name, None)
        self._names = tuple(shapes)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """torch's, and the heads."""
        return super().extra_repr() + _heads_repr(self)

    @property
    def _mode(self) -> str:
        return self.own.mode

    def current_weights(self) -> list[Tensor]:
        """w_ih[, w_hh][, b_ih[, b_hh]][, params], whatever is in the parameters' place."""
        return [getattr(self, name) for name in self._names]

    def _has_bias(self, weights: Sequence[Tensor]) -> bool:
        return bool(self.bias)

    select_backend = AddedLayer.select_backend

    def _masked_step(
        self, input: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], spec: CallSpec
    ) -> Sequence[Tensor]:
        if not BY_MODE[self._mode].masks:
            return super()._masked_step(input, state, weights, spec)
        lifted = [s.unsqueeze(0) for s in state]
        _, *states = self._masked_run(layer_call)(input.unsqueeze(0), None, lifted, weights, spec)
        return [without_first(s) for s in states]

    def _masked_run(self, run: Run) -> Run:
        return masked(run, self)

    def _joined(self, state: Sequence[Tensor]) -> Sequence[Tensor]:
        return joined(state)

    def _result(self, states: Sequence[Tensor]) -> Any:
        return _result(split(states, self.hidden_size))

    def _torch_forward(self, input: Any, hx: Any) -> NoReturn:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        names = BY_MODE[self._mode].states
        raise RuntimeError(
            f"expected input (B, {self.input_size}) or ({self.input_size}) in the weights' dtype, "
            f"without autocast, and for hx None or {', '.join(names)}, each (B, "
            f"{self.hidden_size}) or ({self.hidden_size}); got input {tuple(input.shape)} of "
            f"{input.dtype}"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        _unscriptable(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, False) or super().__reduce_ex__(protocol)


#: The classes to derive a cell's from, by the template around it, or by its struct.
BASES: dict[str, tuple[type[AddedLayer], type[AddedCellModule]]] = {
    "": (AddedLayer, AddedCellModule)
}


@cache
def classes(own: AddedCell) -> tuple[type[AddedLayer], type[AddedCellModule]]:
    """The layer class and the cell class of an added cell; with a GPU, its CUDA kernels."""
    library.read_cells()
    if "cuda" in library.DEVICES:
        own_cell_cuda.add_kernels(own, own_cell_cuda.not_taken(library.BY_MODE[own.mode]))
    facts = {"own": own, "__module__": __name__}
    layer, cell = BASES.get(own.around or own.struct, BASES[""])
    layer = type(own.name, (layer,), {**facts, "__doc__": layer.__doc__})
    return layer, type(f"{own.name}Cell", (cell,), {**facts, "__doc__": cell.__doc__})


def is_added(cls: type) -> bool:
    """Whether it is one of `classes`, and not one derived from it."""
    return isinstance(vars(cls).get("own"), AddedCell)


def class_of(own: AddedCell, is_layer: bool) -> type[nn.Module]:
    """The layer class or the cell class, in whatever process: the header is where it was.

    Raises RuntimeError where the header has changed, and what `own_cell.add` raises.
    """
    found = own_cell.added(own.mode)
    if found is None:
        found = own_cell.add_source(own, library.info()["isa"])
        if found.mode != own.mode:
            raise RuntimeError(f"{own.header} has changed since the module was pickled")
    return classes(found)[0 if is_layer else 1]


def _new(own: AddedCell, is_layer: bool) -> nn.Module:
    """An empty instance (for pickle)."""
    kind = class_of(own, is_layer)
    empty: nn.Module = kind.__new__(kind)
    return empty


def _reduced(module: Any, is_layer: bool) -> tuple[Any, ...] | None:
    """How pickle takes a module whose class it cannot find by name; None for the user's classes."""
    if not is_added(type(module)):
        return None
    state = module.__getstate__() if is_layer else dict(vars(module))
    return _new, (module.own, is_layer), state
