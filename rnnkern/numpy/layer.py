"""Layer: a stack of layers on arrays. Letters as in __init__.py."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import episodes
from ..call_spec import CallSpec, weight_format
from ..episodes import Ends, Episodes
from ..own_cell import built_in_source, source_of
from ..saved_layout import saved_values
from ..state_dict import Weights, layers
from .batch_sizes import check_sizes, whole
from .cells import added_cell, cell_of, constant_masks, hidden_size_of, zoneout_masks
from .library import _numpy
from .stream import Stream

Array = np.ndarray
State = Array | tuple[Array, ...]


class Layer:
    """A stack of LSTM, GRU or RNN layers from the arrays of a state_dict, for inference.

    state_dict    torch.nn's names to float32 or float64 arrays, as `np.load` of an .npz gives them
    prefix        the layer's name in a larger model's state_dict, with its dot ("encoder.")
    batch_first   inputs and outputs are (B, T, ·) instead of (T, B, ·)
    nonlinearity  "tanh" or "relu", for an RNN: the weights do not tell
    weights       what float32 weights are rounded to: "bfloat16" or "int8"; "float32" rounds
                  nothing, whatever their dtype is
    cell          the header of a cell that is not built in, as `rnnkern.cells.load` takes it: its
                  weights may look like those of another cell. It is compiled at its first use
    zoneout       of a layer with zoneout (`rnnkern.cells.zoneout`) around its cell, built in or
                  not: the rate of all states, or of each in their order
    masks         of a cell that takes some: those of evaluation, the same for all steps and rows;
                  what is broadcast to (their number, H)

    The weights are packed here, once: calls and streams do not see later changes of the arrays.
    `record` reads the arrays.

    Raises ValueError where the arrays are not those of one stack of layers, for `weights` that are
    unknown or do not go with the arrays' dtype, and for masks or rates that the cell does not take,
    lacks or that have another shape; for a cell what `rnnkern.cells.load` raises.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        prefix: str = "",
        *,
        batch_first: bool = False,
        nonlinearity: str = "tanh",
        weights: str = "float32",
        cell: str | os.PathLike[str] | None = None,
        zoneout: float | Sequence[float] | None = None,
        masks: Any = None,
    ) -> None:
        self.batch_first = batch_first
        self._source = None if cell is None else source_of(cell)
        added = None if self._source is None else added_cell(self._source)
        products = (True, True) if added is None else (not added.given_sums, added.recurs)
        biases = (True, True) if added is None else added.biases
        self.weights = layers(state_dict, prefix, products, biases)
        first = self.weights[0][0]
        self.cell = added or cell_of(first, nonlinearity)
        if zoneout is not None:
            masks = zoneout_masks(self.cell, zoneout, masks)
            self._source = (self._source or built_in_source(self.cell.mode)).inside("Zoneout")
            self.cell = added_cell(self._source)
        self.directions = len(self.weights[0])
        self.hidden_size = hidden_size_of(self.cell, first)
        self.proj_size = 0 if first.w_hr is None else first.w_hr.shape[0]
        gate_sums = self.directions * len(self.cell.gates) * self.hidden_size
        self.input_size = gate_sums if self.cell.given_sums else first.w_ih.shape[1]
        self.dtype = first.arrays[0].dtype
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"weights must be float32 or float64, got {self.dtype}")
        self._check_weights()
        self._masks = constant_masks(self.cell, masks, self.hidden_size, self.dtype)
        self.weight_format = weights
        self._packed = self._pack()

    def _pack(self) -> list[Array]:
        format = weight_format(self.weight_format, str(self.dtype))
        spec = self._spec(False)
        return [_numpy.prepack(_arrays(w), spec, format, self._masks) for w in self.weights]

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: packed weights, the number of an added cell."""
        own = {"_packed"} if self._source is None else {"_packed", "cell"}
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._source is not None:
            self.cell = added_cell(self._source)
        self._packed = self._pack()

    def __repr__(self) -> str:
        projection = f"proj_size={self.proj_size}, " if self.proj_size else ""
        rounded = "" if self.weight_format == "float32" else f", weights={self.weight_format!r}"
        return (
            f"Layer({self.cell.mode}, {self.input_size}, {self.hidden_size}, {projection}"
            f"num_layers={len(self.weights)}, bidirectional={self.directions == 2}, {self.dtype}"
            f"{rounded})"
        )

    def __call__(
        self,
        x: Array,
        hx: State | None = None,
        batch_sizes: Sequence[int] | None = None,
        resets: Array | None = None,
        reset_state: State | None = None,
        return_ends: bool = False,
    ) -> Any:
        """Runs the stack: (output, h_n), for an LSTM (output, (h_n, c_n)).

        x            (T, B, I), (B, T, I) with batch_first, (T, I) without a batch; packed (N, I)
        hx           h_0 (L·D, B, R) or (L·D, R), for an LSTM the pair of it and c_0, (L·D, B, H)
                     or (L·D, H); zeros if None
        batch_sizes  packed x only: how many sequences, sorted by falling length, reach each step
        resets       bool, of x's shape without features: whether the row's state is replaced by
                     reset_state before the step; cuts the rows into episodes, as in rnnkern.LSTM
        reset_state  as hx: (L·D, R), (L·D, B, R), or with the dimensions of resets in the middle
        return_ends  with resets only: whether to return the `Ends` of the episodes too

        Raises ValueError for wrong ranks, sizes or dtypes, TypeError for batch_sizes that are no
        whole numbers.
        """
        if resets is None and reset_state is None and not return_ends:
            return self._run(x, hx, batch_sizes, train=False)[:2]
        if resets is None:
            raise ValueError("reset_state and return_ends belong to a call with resets")
        if batch_sizes is not None:
            raise ValueError("of packed x give each episode as a sequence of its own, not resets")
        results = self._by_episodes(np.asarray(x), hx, np.asarray(resets), reset_state)
        return results if return_ends else results[:2]

    def record(
        self, x: Array, hx: State | None = None, batch_sizes: Sequence[int] | None = None
    ) -> tuple[Array, State, list[list[dict[str, Array]]]]:
        """As a call, and a third result: what happened inside, `steps[layer][direction][name]`.

        The names are "hidden", for an LSTM "cell_state", and the gates ("input", "forget", "cell",
        "output"; GRU "reset", "update", "new"), each (N, H), "hidden" (N, R), with row t·B + b, or
        packed as x is.

        Raises ValueError also for rounded weights.
        """
        if self.weight_format != "float32":
            raise ValueError(f"record is not there for weights={self.weight_format!r}")
        return self._run(x, hx, batch_sizes, train=True)

    def stream(self, batch_size: int = 1, threads: int = 1) -> Stream:
        """The stack with its state inside, for input that comes step by step.

        threads  of each step: a second one pays for wide layers or many rows

        Raises ValueError for two directions and for counts below one, TypeError for other counts.
        """
        if self.directions > 1:
            raise ValueError("a bidirectional layer needs the whole sequence: it has no stream")
        return Stream(self._packed, batch_size, threads)

    def _run(
        self, x: Array, hx: State | None, batch_sizes: Sequence[int] | None, train: bool
    ) -> tuple[Array, State, list[list[dict[str, Array]]]]:
        x = np.asarray(x)
        batch_sizes = None if batch_sizes is None else whole(batch_sizes)
        unbatched = x.ndim == 2 and batch_sizes is None
        if x.ndim != (3 if batch_sizes is None else 2) and not unbatched:
            wanted = "2 or 3" if batch_sizes is None else "2 (packed)"
            raise ValueError(f"input must have {wanted} dimensions, got {x.ndim}")
        if x.shape[-1] != self.input_size:
            raise ValueError(f"input must have {self.input_size} features, got {x.shape[-1]}")
        if x.dtype != self.dtype:
            raise ValueError(f"input is {x.dtype}, but the weights are {self.dtype}")
        if batch_sizes is not None:
            check_sizes(batch_sizes, len(x))
        x = np.ascontiguousarray(x)
        batch_first = self.batch_first and x.ndim == 3
        if unbatched:
            x = x[:, None]
        batch = batch_sizes[0] if batch_sizes is not None else x.shape[not batch_first]
        states = self._state(hx, batch, unbatched)
        spec = self._spec(batch_first)
        finals, steps = [], []
        for k, layer in enumerate(self.weights):
            rows = slice(k * self.directions, (k + 1) * self.directions)
            state = self._joined([s[rows] for s in states])
            if not train:
                x, h_n, c_n = _numpy.forward_prepacked(
                    x, batch_sizes, state, self._packed[k], spec, self.hidden_size, self.proj_size
                )
            else:
                x, h_n, c_n, saved, c_states = _numpy.forward(
                    x, batch_sizes, state, _arrays(layer), spec, True, self._masks
                )
            finals.append([h_n, *self._others(c_n)])
            if train:
                sizes = [batch] * x.shape[batch_first] if batch_sizes is None else batch_sizes
                steps.append(self._steps(x, sizes, saved, c_states, batch_first))
        final = [np.concatenate(s) for s in zip(*finals, strict=True)]
        if unbatched:
            x, final = x[:, 0], [s[:, 0] for s in final]
        return x, tuple(final) if len(final) > 1 else final[0], steps

    def _by_episodes(
        self, x: Array, hx: State | None, resets: Array, reset_state: State | None
    ) -> tuple[Array, State, Ends]:
        """Output, final state and ends of a call with resets, as one packed call."""
        if resets.shape != x.shape[:-1] or not resets.size or x.ndim not in (2, 3):
            raise ValueError(
                f"resets must have the shape of an input without its features, {x.shape[:-1]}, "
                f"and not be empty, got {resets.shape}"
            )
        if resets.dtype != bool:
            raise ValueError(f"resets must be bool, got {resets.dtype}")
        unbatched = x.ndim == 2
        mask = resets[:, None] if unbatched else resets
        plan = episodes.pack(mask, self.batch_first and not unbatched)
        state = [s[:, plan.packed_row] for s in self._state(hx, len(plan.last), unbatched)]
        fresh = self._after_reset(reset_state, mask.shape, plan, unbatched)
        zeros = [np.zeros((), self.dtype)] * len(state or fresh)
        begin = [
            np.where(plan.keeps_hx[:, None], kept, new)
            for kept, new in zip(state or zeros, fresh or zeros, strict=True)
        ]
        packed = x.reshape(-1, x.shape[-1])[plan.to_packed]
        output, final, _ = self._run(packed, self._hx(begin), plan.batch_sizes.tolist(), False)
        states = list(final) if isinstance(final, tuple) else [final]
        last = plan.last[0] if unbatched else plan.last
        ends = Ends(self._hx([s[:, plan.rank] for s in states]), plan.row, plan.end)
        by_row = output[plan.from_packed].reshape(*x.shape[:-1], -1)
        return by_row, self._hx([s[:, last] for s in states]), ends

    def _hx(self, states: Sequence[Array]) -> Any:
        """States as a call takes and returns them."""
        return None if not states else tuple(states) if len(states) > 1 else states[0]

    def _joined(self, states: Sequence[Array]) -> list[Array]:
        """All states as the kernels take them: h, and the others side by side."""
        if len(states) < 3:
            return list(states)
        return [states[0], np.concatenate(states[1:], axis=-1)]

    def _others(self, c: Array) -> list[Array]:
        """The states but h, of what the kernels return."""
        return np.split(c, len(self.cell.states) - 1, axis=-1) if c.size else []

    def _after_reset(
        self, reset_state: State | None, by_step: tuple[int, ...], plan: Episodes, unbatched: bool
    ) -> list[Array]:
        """(L·D, 1 or N, ·) of each state after resets, in packed order."""
        if reset_state is None:
            return []
        given = reset_state if isinstance(reset_state, (tuple, list)) else (reset_state,)
        if len(given) != len(self.cell.states):
            raise ValueError(f"reset_state must be {', '.join(self.cell.states)}")
        count, found = len(plan.row), []
        for s, width in zip(map(np.asarray, given), self._widths, strict=True):
            if s.shape[:1] + s.shape[-1:] != (len(self.weights) * self.directions, width):
                raise ValueError(f"reset_state cannot have the shape {s.shape}")
            if s.dtype != self.dtype:
                raise ValueError(f"reset_state is {s.dtype}, but the weights are {self.dtype}")
            between = s.shape[1:-1]
            if not between:
                found.append(s[:, None])
            elif between == ((by_step[0],) if unbatched else by_step):
                found.append(s.reshape(len(s), -1, width)[:, plan.to_packed[:count]])
            elif between == (len(plan.last),) and not unbatched:
                found.append(s[:, plan.packed_row])
            else:
                raise ValueError(f"reset_state cannot have the shape {s.shape}")
        return found

    def _spec(self, batch_first: bool) -> CallSpec:
        return CallSpec(self.cell.id, self.directions, self._bias, self.proj_size > 0, batch_first)

    @property
    def _bias(self) -> bool:
        first = self.weights[0][0]
        return first.b_ih is not None or first.b_hh is not None

    def _steps(
        self,
        output: Array,
        sizes: Sequence[int],
        saved: Array,
        c_states: Array,
        batch_first: bool,
    ) -> list[dict[str, Array]]:
        cell, shape = self.cell, (self.directions, self.hidden_size, sizes)
        gates = saved_values(saved, cell.saved, *shape)
        names = ["cell_state" if name == "c" else name for name in cell.states[1:]]
        cell_states = saved_values(c_states, names, *shape)
        rows = output.swapaxes(0, 1) if batch_first else output
        hidden = np.split(rows.reshape(-1, rows.shape[-1]), self.directions, axis=1)
        return [
            {"hidden": h} | c | {name: v for name, v in values.items() if name in cell.gates}
            for h, c, values in zip(hidden, cell_states, gates, strict=True)
        ]

    def _state(self, hx: State | None, batch: int, unbatched: bool) -> list[Array]:
        if hx is None:
            return []
        given = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        names = [f"{name}_0" for name in self.cell.states]
        if len(given) != len(names):
            raise ValueError(f"hx must be {', '.join(names)}, got {len(given)} arrays")
        states = []
        for name, s, width in zip(names, given, self._widths, strict=True):
            wanted = (len(self.weights) * self.directions, batch, width)
            s = np.asarray(s)[:, None] if unbatched and np.ndim(s) == 2 else np.asarray(s)
            if s.shape != wanted:
                raise ValueError(f"{name} must have the shape {wanted}, got {s.shape}")
            if s.dtype != self.dtype:
                raise ValueError(f"{name} is {s.dtype}, but the weights are {self.dtype}")
            states.append(s)
        return states

    @property
    def _widths(self) -> list[int]:
        """Of each state."""
        width = self.proj_size or self.hidden_size
        return [width] + [self.hidden_size] * (len(self.cell.states) - 1)

    def _check_weights(self) -> None:
        gate_rows = len(self.cell.gates) * self.hidden_size
        width = self.proj_size or self.hidden_size
        first, cell = self.weights[0][0], self.cell
        for name, weight, there in (
            ("params_l0", first.params, bool(cell.params)),
            ("weight_ih_l0", first.w_ih, not cell.given_sums),
            ("weight_hh_l0", first.w_hh, cell.recurs),
            ("bias_ih_l0", first.b_ih, cell.biases[0] and self._bias),
            ("bias_hh_l0", first.b_hh, cell.biases[1] and self._bias),
        ):
            if (weight is not None) != there:
                raise ValueError(f"the state_dict {'lacks' if there else 'has'} {name}")
        if cell.given_sums and len(self.weights) > 1:
            raise ValueError(
                "a cell whose input sums are given has one layer, got "
                f"{len(self.weights)} layers of weights"
            )
        recurrent: tuple[int, ...] = (gate_rows, width)
        if cell.recurrent == "heads":
            heads = first.w_hh.shape[0] if first.w_hh.ndim == 3 else 0
            recurrent = (heads, gate_rows // heads, width // heads) if heads else ()
        for k, layer in enumerate(self.weights):
            inputs = self.directions * width if k else self.input_size
            wanted: list[tuple[int, ...]] = [(gate_rows, inputs), recurrent, *[(gate_rows,)] * 2]
            wanted += [(width, self.hidden_size), (len(self.cell.params), self.hidden_size)]
            for given in (w for direction in layer for w in direction.arrays):
                if given.dtype != self.dtype:
                    raise ValueError(f"the weights are both {self.dtype} and {given.dtype}")
            for d, direction in enumerate(layer):
                for name, w, shape in zip(direction._fields, direction, wanted, strict=False):
                    if w is not None and w.shape != shape:
                        raise ValueError(
                            f"{name} of layer {k}, direction {d} must have the shape {shape}, "
                            f"got {w.shape}"
                        )


def _arrays(layer: Sequence[Weights]) -> list[Array]:
    """A layer's weights, as the kernels take them."""
    return [w for direction in layer for w in direction.arrays]
