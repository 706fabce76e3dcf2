"""Cells that are not built in, for the tests of their CUDA kernels, simulated and on a GPU.

Those here need all that a header may ask for: learned values, several states, masks, heads, no
W_hh, gates of W_hh in another order.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import rnnkern
from rnnkern.call_spec import CallSpec
from rnnkern.nn.added import AddedLayer
from rnnkern.ops import library
from rnnkern.saved_layout import saved_values

Layers = dict[str, type[AddedLayer]]
F64 = torch.float64
T, B, I, H = 7, 3, 5, 12
SHELF = ("PeepholeLSTM", "RecurrentDropoutLSTM", "SLSTM", "SRU")
NAMES = (*SHELF, "Zoneout", "Turned")
CPU_FORWARD = library.forward  # a test may put other operators in its place
#: The largest error of a result, relative to its norm or to 1.
CLOSE = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}

# W_hh has the gates the other way round, and fewer values are saved than there are gates.
TURNED = """
#include "cells/cell.h"
struct Turned : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"forget", "new"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"forget"};
  static constexpr int kGates = 2, kPreacts = 2, kStates = 1, kSaved = 1;
  static constexpr int hidden_gate(int s) { return 1 - s; }

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    saved[0] = sigmoid(preact[0]);
    next[0] = saved[0] * prev[0] + (V(1) - saved[0]) * preact[1];
  }
  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* next, V* dnext, V* dprev,
                                  V* dgates) {
    const V f = saved[0];
    dgates[0] = dnext[0] * f * (prev[0] - next[0]);
    dgates[1] = dnext[0] * (V(1) - f);
    dprev[0] = dnext[0] * f;
  }
};
"""


def _turned(x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    f, n = (x + y.roll(y.shape[-1] // 2, -1)).chunk(2, -1)
    f = torch.sigmoid(f)
    return (f * h + (1 - f) * n,)


def load_layers(folder: Path) -> Layers:
    """The layer classes by name; the header of one is written to the folder."""
    header = folder / "turned.h"
    if not header.exists() or header.read_text() != TURNED:
        header.write_text(TURNED)
    found = {name: getattr(rnnkern.cells, name) for name in SHELF}
    found["Zoneout"] = rnnkern.cells.zoneout(rnnkern.cells.SLSTM).layer
    found["Turned"] = rnnkern.cells.load(header, step=_turned).layer
    return found


def make(kind: type[AddedLayer]) -> tuple[AddedLayer, Tensor, Tensor | None]:
    """A layer in float64, its input and, if the cell takes some, masks that are the same for all
    batch rows."""
    layer = kind(I, H, bidirectional=True, dtype=F64)
    x, kinds = torch.randn(T, B, I, dtype=F64), len(library.BY_MODE[layer.own.mode].masks)
    if not kinds:
        return layer, x, None
    return layer, x, torch.rand(2, T, 1, kinds, H, dtype=F64).expand(2, T, B, kinds, H)


def results(
    layer: AddedLayer, x: Tensor, masks: Tensor | None, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """What the operators return for it, with flows, and what they save, by name."""
    cell = library.BY_MODE[layer.own.mode]
    spec = CallSpec(cell.id, 2)
    weights = [p.detach().to(device, dtype) for p in layer.parameters()]
    x = x.to(device, dtype)
    more = [] if masks is None else [None, None, None, masks.to(device, dtype)]
    output, h_n, c_n, saved, c_states = library.forward(
        x, None, None, None, weights, *spec, True, *more
    )
    dy, dh_n = torch.ones_like(output), torch.ones_like(h_n)
    dx, _, _, grads, flow_h, flow_c, *_ = library.backward(
        dy, dh_n, None, x, None, None, None, weights, output, saved, c_states, *spec, 7, True, *more
    )
    found = [output, h_n, c_n, dx, *grads, flow_h, flow_c]
    blocked = device == "cpu" and library.forward is CPU_FORWARD
    for workspace, names in ((saved, cell.saved), (c_states, cell.states[1:])):
        for values in saved_values(workspace, names, 2, H, [B] * T, blocked=blocked):
            found += values.values()
    return found


def assert_close(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for mine, other in zip(found, truth, strict=True):
        assert mine.shape == other.shape
        error = (mine.to("cpu", F64) - other).norm()
        assert error <= CLOSE[dtype] * other.norm().clamp(min=1)
