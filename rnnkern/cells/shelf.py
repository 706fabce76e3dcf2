"""The cells that the package ships as headers and compiles at their first use.

For each its equations once more, as a step in torch's operations: x = W_ih x + b_ih and, if there
is a W_hh, y = W_hh h + b_hh (B, G·H), the states before, the learned values per unit -> the states
after.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, logsigmoid

FOLDER = Path(__file__).parent / "headers"


def _cifg(x: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    f, g, o = (x + y).chunk(3, -1)
    f, g = torch.sigmoid(f), torch.tanh(g)
    c = f * c + (1 - f) * g
    return torch.sigmoid(o) * torch.tanh(c), c


def _ind_rnn(x: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    return (torch.relu(x + u * h),)


def _li_gru(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    a, z = (x + y).chunk(2, -1)
    a, z = torch.relu(a), torch.sigmoid(z)
    return (z * h + (1 - z) * a,)


def _mgu(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    x_f, x_n = x.chunk(2, -1)
    y_f, y_n = y.chunk(2, -1)
    f = torch.sigmoid(x_f + y_f)
    return ((1 - f) * h + f * torch.tanh(x_n + f * y_n),)


def _min_gru(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    z, g = x.chunk(2, -1)
    z = torch.sigmoid(z)
    return ((1 - z) * h + z * g,)


def _min_lstm(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    f, i, g = x.chunk(3, -1)
    f, i = torch.sigmoid(f), torch.sigmoid(i)
    return (f / (f + i) * h + i / (f + i) * g,)


def _peephole_lstm(
    x: Tensor, y: Tensor, h: Tensor, c: Tensor, p_i: Tensor, p_f: Tensor, p_o: Tensor
) -> tuple[Tensor, ...]:
    i, f, g, o = (x + y).chunk(4, -1)
    new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return torch.sigmoid(o + p_o * new) * torch.tanh(new), new


def _slstm(x: Tensor, y: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    i, f, z, o = (x + y).chunk(4, -1)
    decayed = logsigmoid(f) + m
    m = torch.maximum(i, decayed)
    i, f = torch.exp(i - m), torch.exp(decayed - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


def _sru(x: Tensor, h: Tensor, c: Tensor, v_f: Tensor, v_r: Tensor) -> tuple[Tensor, ...]:
    g, f, r, highway = x.chunk(4, -1)
    f, r = torch.sigmoid(f + v_f * c), torch.sigmoid(r + v_r * c)
    c = f * c + (1 - f) * g
    return r * c + (1 - r) * highway, c


def _recurrent_dropout_lstm(
    x: Tensor, y: Tensor, h: Tensor, c: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    i, f, g, o = (x + y).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * (mask * torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def _li_gru_of_sums(x: Tensor, y: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    a, z = (x + y).chunk(2, -1)
    a, z = mask * torch.relu(a), torch.sigmoid(z)
    return (z * h + (1 - z) * a,)


def _layer_norm_lstm(
    x: Tensor, y: Tensor, h: Tensor, c: Tensor, *params: Tensor
) -> tuple[Tensor, ...]:
    *gains, gain_c, bias_c = params
    i, f, g, o = (x + torch.cat(gains) * layer_norm(y, y.shape[-1:])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(layer_norm(c, c.shape[-1:], gain_c, bias_c)), c


def _one_mask_per_row(self: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Dropout of self.recurrent_dropout, the same in all steps of time-major data; 1 in
    evaluation."""
    ones = like.new_ones(shape[-1:])
    if not (self.training and self.recurrent_dropout):
        return ones
    return torch.dropout(ones.expand(shape[0], 1, *shape[2:]), self.recurrent_dropout, True)


class Entry(NamedTuple):
    """A header in `FOLDER`, which says where its equations are from, its step, and what draws its
    masks."""

    header: str
    step: Callable[..., tuple[Tensor, ...]]
    masks: Callable[[Any, tuple[int, ...], Tensor], Tensor] | None = None


#: By the name of the struct.
SHELF = {
    "CIFG": Entry("cifg.h", _cifg),
    "IndRNN": Entry("ind_rnn.h", _ind_rnn),
    "LiGRU": Entry("li_gru.h", _li_gru),
    "MGU": Entry("mgu.h", _mgu),
    "MinGRU": Entry("min_gru.h", _min_gru),
    "MinLSTM": Entry("min_lstm.h", _min_lstm),
    "PeepholeLSTM": Entry("peephole_lstm.h", _peephole_lstm),
    "SLSTM": Entry("slstm.h", _slstm),
    "SRU": Entry("sru.h", _sru),
}
#: Those that take masks, which their classes draw.
MASKED = {
    "RecurrentDropoutLSTM": Entry("recurrent_dropout_lstm.h", _recurrent_dropout_lstm),
}
#: Those of given sums, parts of the layers in normalized.py.
OF_SUMS = {
    "LiGRUOfSums": Entry("li_gru_of_sums.h", _li_gru_of_sums, _one_mask_per_row),
    "LayerNormLSTMOfSums": Entry("layer_norm_lstm_of_sums.h", _layer_norm_lstm),
}
