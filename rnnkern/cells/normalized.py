"""Layers whose W x is normalised: a product, a normalisation and a cell of given sums.

T steps, B batch rows, I inputs, H hidden units, L layers, D directions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..nn.recurrent_dropout import checked_rate
from .loading import load
from .shelf import FOLDER, OF_SUMS

State = Any


def _recurrence(name: str, *args: Any, **options: Any) -> Any:
    """A layer of the cell on the shelf that takes given sums."""
    entry = OF_SUMS[name]
    kind = load(FOLDER / entry.header, name=name, step=entry.step, masks=entry.masks).layer
    return kind(*args, **options)


class _Stack(nn.Module):
    """Layers one after the other, and what their calls share."""

    layers: nn.ModuleList
    num_states: int
    dropout = 0.0

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int, bidirectional: bool
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if size < 1:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bidirectional = bidirectional

    def _inputs(self) -> Iterator[int]:
        """The features that each layer takes."""
        yield self.input_size
        yield from [self.hidden_size * (1 + self.bidirectional)] * (self.num_layers - 1)

    def _states(self, hx: State) -> list[Sequence[Tensor] | None]:
        """Those of each layer, (D, B, H) for each state."""
        if hx is None:
            return [None] * self.num_layers
        given = hx if isinstance(hx, tuple) else (hx,)
        directions = 1 + self.bidirectional
        if len(given) != self.num_states or any(
            not isinstance(s, Tensor)
            or s.dim() != 3
            or s.shape[::2] != (self.num_layers * directions, self.hidden_size)
            for s in given
        ):
            raise RuntimeError(
                f"hx must have {self.num_states} state(s) of the shape "
                f"({self.num_layers * directions}, batch, {self.hidden_size})"
            )
        return list(zip(*(s.split(directions) for s in given), strict=True))

    def _run(self, x: Any, hx: State) -> tuple[Any, list[Tensor]]:
        """Output and final states (L·D, B, H) of time-major or packed input."""
        finals = []
        for k, (layer, states) in enumerate(zip(self.layers, self._states(hx), strict=True)):
            if k and self.training and self.dropout:
                x = _on_rows(x, lambda rows: torch.dropout(rows, self.dropout, True))
            x, final = layer(x, states)
            finals.append(final)
        return x, [torch.cat(s) for s in zip(*finals, strict=True)]

    def _check_input(self, x: Tensor, rank: int) -> None:
        if x.dim() != rank or x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input must have {rank} dimensions and {self.input_size} features, got "
                f"{tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class _LiGRULayer(nn.Module):
    """W x, its batch normalisation, and the recurrence, which two directions share."""

    def __init__(self, inputs: int, hidden: int, dropout: float, both: bool, **where: Any) -> None:
        super().__init__()
        self.w = nn.Linear(inputs, 2 * hidden, bias=False, **where)
        self.norm = nn.BatchNorm1d(2 * hidden, momentum=0.05, **where)
        self.recurrence = _recurrence("LiGRUOfSums", 2 * hidden, hidden, bias=False, **where)
        self.recurrence.recurrent_dropout = dropout
        nn.init.orthogonal_(self.recurrence.weight_hh_l0)
        self.both = both

    def forward(self, x: Tensor, states: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        sums = self.norm(self.w(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.both:  # as rows of one batch
            sums = torch.cat([sums, sums.flip(0)], 1)
        hx = None if states is None else states[0].flatten(0, 1)[None]
        output, h_n = self.recurrence(sums, hx)
        if self.both:
            ahead, back = output.chunk(2, 1)
            output = torch.cat([ahead, back.flip(0)], -1)
            h_n = h_n[0].unflatten(0, (2, -1))
        return output, [h_n]


class BatchNormLiGRU(_Stack):
    """Light GRU (Ravanelli et al. 2018) with batch normalisation of W x, as SpeechBrain's LiGRU.

    recurrent_dropout  how often a candidate's unit is dropped in training: one mask for all steps
                       of a row
    bidirectional      the second direction runs over the reversed rows with the same weights

    Of each layer: `layers[k].w.weight` (2·H, I), `layers[k].norm` (a BatchNorm1d of 2·H features
    over all steps and rows, momentum 0.05) and `layers[k].recurrence.weight_hh_l0` (2·H, H), which
    are SpeechBrain's `rnn.k.w.weight`, `rnn.k.norm` and `rnn.k.u.weight`. The final state is that
    after each direction's last step; the running variance is that of the T·B rows, also of two
    directions.

    Raises ValueError for sizes below 1 and a rate outside of [0, 1).
    """

    num_states = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        recurrent_dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bidirectional)
        self.batch_first, self.recurrent_dropout = batch_first, checked_rate(recurrent_dropout)
        self.layers = nn.ModuleList(
            _LiGRULayer(
                inputs, hidden_size, self.recurrent_dropout, bidirectional,
                device=device, dtype=dtype,
            )
            for inputs in self._inputs()
        )  # fmt: skip

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input (T, B, I), with batch_first (B, T, I), and hx (L·D, B, H), or None for zeros ->
        output (T, B, D·H) or (B, T, D·H), and the final state (L·D, B, H).

        Raises RuntimeError for other sizes, TypeError for packed input: padding takes part in the
        moments of a batch in SpeechBrain.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        self._check_input(input, 3)
        output, (h_n,) = self._run(input.transpose(0, 1) if self.batch_first else input, hx)
        return (output.transpose(0, 1) if self.batch_first else output), h_n


class _LayerNormLSTMLayer(nn.Module):
    """W x of each direction, its layer normalisation, and the recurrences."""

    def __init__(self, inputs: int, hidden: int, both: bool, **where: Any) -> None:
        super().__init__()
        directions = 1 + both
        self.w = nn.Linear(inputs, directions * 4 * hidden, bias=False, **where)
        self.norms = nn.ModuleList(nn.LayerNorm(4 * hidden, **where) for _ in range(directions))
        self.recurrence = _recurrence(
            "LayerNormLSTMOfSums", directions * 4 * hidden, hidden, bias=False, bidirectional=both,
            **where,
        )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.recurrence.named_parameters():
                if name.startswith("params"):  # gains, and the bias of c
                    parameter[:5], parameter[5] = 1, 0

    def forward(self, x: Any, states: Sequence[Tensor] | None) -> tuple[Any, list[Tensor]]:
        output, final = self.recurrence(_on_rows(x, self._sums), states)
        return output, list(final)

    def _sums(self, rows: Tensor) -> Tensor:
        parts = self.w(rows).chunk(len(self.norms), -1)
        sums = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        return torch.cat(sums, -1) if len(sums) > 1 else sums[0]


class LayerNormLSTM(_Stack):
    """LSTM with layer normalisation (Ba et al. 2016) of W_ih x, of W_hh h and of c.

    i, f, g, o are the parts of LN(W_ih x) + LN(W_hh h), each over its 4·H values;
    c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(LN(c')), over the H units. PyTorch's benchmark
    (benchmarks/fastrnns/custom_lstms.py) has it so.

    Of each layer: `layers[k].w.weight` (D·4·H, I), `layers[k].norms[d]`, a LayerNorm of 4·H
    features for each direction, and in `layers[k].recurrence` weight_hh_l0 (4·H, H) and params_l0
    (6, H): the gains of LN(W_hh h) for i, f, g and o, then gain and bias of LN(c). The bias of
    LN(W_hh h) would only add to that of LN(W_ih x). Epsilon is 1e-5.

    Raises ValueError for sizes below 1 and a dropout outside of [0, 1].
    """

    num_states = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, bidirectional)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        self.batch_first, self.dropout = batch_first, float(dropout)
        self.layers = nn.ModuleList(
            _LayerNormLSTMLayer(inputs, hidden_size, bidirectional, device=device, dtype=dtype)
            for inputs in self._inputs()
        )

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, tuple[Tensor, Tensor]]:
        """input (T, B, I), with batch_first (B, T, I), or packed, and hx, the pair of h and c, each
        (L·D, B, H), or None for zeros -> output (T, B, D·H) as input is laid out, and the pair of
        final states.

        Raises RuntimeError for other sizes, TypeError for input that is no tensor.
        """
        packed = isinstance(input, PackedSequence)
        if not packed and not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        self._check_input(input.data if packed else input, 2 if packed else 3)
        swaps = self.batch_first and not packed
        output, (h_n, c_n) = self._run(input.transpose(0, 1) if swaps else input, hx)
        return (output.transpose(0, 1) if swaps else output), (h_n, c_n)


def _on_rows(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of a tensor, or of the data of a packed one."""
    if isinstance(x, PackedSequence):
        return x._replace(data=function(x.data))
    return function(x)
