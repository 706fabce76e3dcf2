// Weight gradients of a chunk of steps: products over its rows of the gate gradients with what the
// weights were multiplied by. Each element is summed by one thread, whatever the team.
#pragma once
#include "pack.h"
#include "params.h"
#include "team.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
struct ChunkGradients {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

  const Sequence& sequence;
  int64_t t0, t1;  // steps of the chunk
  const T* dsums;  // (rows, stride): gradients of sums, each `hidden` wide
  int64_t stride, hidden;
  int gates;
  bool first;  // nothing has been summed yet
  Team team;
  T* buffer;  // for one panel of the right operand

  int64_t rows() const {
    return (t1 == sequence.steps ? sequence.rows() : sequence.row(t1)) - sequence.row(t0);
  }

  // grad (gates H, columns) += dsums^T right, over the chunk's rows; the team splits grad's rows.
  template <class GateOf, class RowAt>
  void add_to(T* grad, const Panels<T>& panels, int first_sum, GateOf gate_of, RowAt row_at) const {
    const int64_t H = hidden, depth = rows(), columns = panels.units;
    const int64_t begin = team.begin(gates * H), end = team.end(gates * H);
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      int64_t t = t0, b = -1;
      pack_rows(
          panels, panel, depth,
          [&](int64_t) {
            if (++b == sequence.active(t)) b = 0, ++t;
            return row_at(t, b);
          },
          buffer);
      const int width = int(panels.step(panel));
      const int64_t left = columns - panels.first_unit(panel);
      for (int64_t k = begin; k < end;) {  // gate by gate
        const int64_t s = k / H, stop = least((s + 1) * H, end);
        T* const out = grad + (gate_of(int(s)) - s) * H * columns + panels.first_unit(panel);
        for_row_tiles(stop - k, [&](int64_t r, int n) {
          alignas(64) T tile[kTileRows * kTileVectors * kLanes];
          const Term<T> term{dsums + first_sum * H + k + r, 1, stride, depth, buffer, width};
          product(n, panels.vectors(panel), &term, 1, Tile<T>{kZeroSums<T>, 0, tile, width});
          add_tile(tile, width, n, left, out + (k + r) * columns, columns, !first);
        });
        k = stop;
      }
    }
  }

  // The same for a left operand of few columns: its transpose is a tile of `columns` rows, and
  // dsums the panel. operand(t) gives the term of step t but for its depth and panel; if its rows
  // lie evenly over all steps, one term serves the chunk. The team splits the units.
  template <class GateOf, class Operand>
  void add_thin(T* grad, int columns, int first_sum, GateOf gate_of, bool even,
                Operand operand) const {
    const int64_t H = hidden, blocks = (H + kLanes - 1) / kLanes;
    constexpr int kWidth = kTileVectors * kLanes;
    const int64_t last = team.end(blocks) * kLanes;
    for (int s = 0; s < gates; ++s)
      for (int64_t u = team.begin(blocks) * kLanes; u < last; u += kWidth) {
        alignas(64) T tile[kTileRows * kWidth] = {};
        const int vectors = int(least<int64_t>((last - u) / kLanes, kTileVectors));
        const T* b = dsums + (first_sum + s) * H + u;
        for (int64_t t = t0; t < t1; t = even ? t1 : t + 1) {
          Term<T> term = operand(t);
          term.depth = even ? rows() : sequence.active(t);
          term.b = b, term.panel_step = stride;
          b += term.depth * stride;
          product(columns, vectors, &term, 1, Tile<T>{tile, kWidth, tile, kWidth});
        }
        T* const out = grad + (gate_of(s) * H + u) * columns;
        const int64_t units = least<int64_t>(H - u, vectors * kLanes);
        for (int64_t l = 0; l < units; ++l)
          for (int c = 0; c < columns; ++c) {
            T& to = out[l * columns + c];
            to = first ? tile[c * kWidth + l] : to + tile[c * kWidth + l];
          }
      }
  }
};

}  // namespace rnnkern::RNNKERN_ISA
