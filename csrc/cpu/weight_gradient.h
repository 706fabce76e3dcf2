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
  // A tile loads one value per row and one vector per vector of its panel for each k: with fewer
  // than three vectors the loads take longer than the multiply-adds.
  static constexpr int kWideEnough = 3 * kLanes;

  const Sequence& sequence;
  int64_t t0, t1, rows;  // steps of the chunk, and their rows
  const T* dsums;        // (rows, stride): gradients of sums, each `hidden` wide
  int64_t stride, hidden;
  int gates;
  bool first;  // nothing has been summed yet
  Team team;
  T* buffer;  // for one panel of the right operand

  // grad (gates H, columns) += dsums^T right, over the chunk's rows; the team splits grad's rows.
  // row_at(k, t, b): the right operand's row of the chunk's row k, batch row b of step t.
  template <class GateOf, class RowAt>
  void add_to(T* grad, const Panels<T>& panels, int first_sum, GateOf gate_of, RowAt row_at) const {
    const int64_t H = hidden, depth = rows, columns = panels.units;
    const int64_t begin = team.begin(gates * H), end = team.end(gates * H);
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      int64_t t = t0, b = -1;
      pack_rows(
          panels, panel, depth,
          [&](int64_t k) {
            for (++b; b >= sequence.active(t); ++t) b = 0;
            return row_at(k, t, b);
          },
          buffer);
      const int width = int(panels.step(panel));
      const int64_t left = columns - panels.first_unit(panel);
      if (width < kWideEnough) {
        add_thin(grad + panels.first_unit(panel), least<int64_t>(width, left), columns, first_sum,
                 gate_of, true, [&](int64_t) { return Term<T>{buffer, 1, width, 0, nullptr, 0}; });
        continue;
      }
      for (int64_t k = begin; k < end;) {  // gate by gate
        const int64_t s = k / H, stop = least((s + 1) * H, end);
        T* const out = grad + (gate_of(int(s)) - s) * H * columns + panels.first_unit(panel);
        for_row_groups(stop - k, [&](int64_t r, int n) {
          alignas(64) T tile[kGroupRows * kTileVectors * kLanes];
          const Term<T> term{dsums + first_sum * H + k + r, 1, stride, depth, buffer, width};
          product(n, panels.vectors(panel), &term, 1, Tile<T>{kZeroSums<T>, 0, tile, width});
          add_tile(tile, width, n, left, out + (k + r) * columns, columns, !first);
        });
        k = stop;
      }
    }
  }

  // The same for few columns, of a gradient with `ld` of them: transposed, so that dsums is the
  // panel, as it lies, and tiles are wide. operand(t) gives the term of step t but for its depth
  // and panel; if its rows lie evenly over all steps, one term serves the chunk.
  template <class GateOf, class Operand>
  void add_thin(T* grad, int64_t columns, int64_t ld, int first_sum, GateOf gate_of, bool even,
                Operand operand) const {
    const int64_t H = hidden, blocks = (gates * H + kLanes - 1) / kLanes;
    const int64_t begin = team.begin(blocks) * kLanes;
    const int64_t end = least(team.end(blocks) * kLanes, gates * H);
    constexpr int kWidth = kTileVectors * kLanes;
    for (int64_t k = begin; k < end; k += kWidth) {
      const int64_t sums = least<int64_t>(end - k, kWidth);
      const int vectors = int((sums + kLanes - 1) / kLanes);
      for_row_groups(columns, [&](int64_t c0, int n) {
        alignas(64) T tile[kGroupRows * kWidth];
        std::memset(tile, 0, n * kWidth * sizeof(T));
        const T* b = dsums + first_sum * H + k;
        for (int64_t t = t0; t < t1; t = even ? t1 : t + 1) {
          Term<T> term = operand(t);
          term.a += c0 * term.row;
          term.depth = even ? rows : sequence.active(t);
          term.b = b, term.panel_step = stride;
          b += term.depth * stride;
          product(n, vectors, &term, 1, Tile<T>{tile, kWidth, tile, kWidth});
        }
        for (int64_t l = 0; l < sums; ++l) {
          const int64_t s = (k + l) / H;
          T* const out = grad + ((gate_of(int(s)) - s) * H + k + l) * ld + c0;
          for (int c = 0; c < n; ++c)
            out[c] = first ? tile[c * kWidth + l] : out[c] + tile[c * kWidth + l];
        }
      });
    }
  }
};

}  // namespace rnnkern::RNNKERN_ISA
