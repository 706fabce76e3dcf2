// Weight gradients in parts (parts.h): as in weight_gradient.h, but walked the other way round. The
// right operand, [x | h] of the chunk's rows, is packed once, by the whole team; a block of columns
// of dsums, split and transposed, stays in the second-level cache while all of it passes by.
#pragma once
#include "weight_gradient.h"

namespace rnnkern::RNNKERN_ISA {

// Empty where products do not go in parts.
template <class T>
class PartsGradient {
  using P = Operand<T>;
  static constexpr int kLanes = Vec<T>::kLanes;
  static constexpr int64_t kMostColumns = 256;

 public:
  // Columns of dsums in a block, for a chunk of so many rows.
  static int64_t block(int64_t rows) {
    const int64_t fit = resident() / (stride(rows) * int64_t(sizeof(P)));
    return greatest<int64_t>(least(fit, kMostColumns) / kGroupRows, 1) * kGroupRows;
  }
  // In pairs, for chunks of at most so many rows.
  static int64_t block_size(int64_t rows) {
    const int64_t fit = resident() / int64_t(sizeof(P));
    return greatest(least(fit, kMostColumns * stride(rows)), kGroupRows * stride(rows));
  }

  // One weight: its gradient (gates H, columns), null where not wanted, and the first of its sums.
  struct Weight {
    Sum<T>* grad;
    int64_t columns;
    int gates, first_sum;
    int (*gate_of)(int);

    Panels<P> panels() const { return {columns, 1}; }
    // Panels that are not thin.
    int64_t count() const { return panels().count() - (ThinGradient<T>::columns(panels()) > 0); }
  };

  // The right operand of chunks of at most so many rows stands in `scratch`.
  PartsGradient(int64_t rows, const Weight& ih, const Weight& hh, Arena& scratch)
      : weights_{ih, hh} {
    for (int i = 0; i < 2; ++i)
      packed_[i] = kInParts<T> && weights_[i].grad
                       ? scratch.take<P>(weights_[i].panels().row() * pairs_in_parts(rows))
                       : nullptr;
  }

  // row_at(k, t, b): of the chunk's row k, batch row b of step t (weight_gradient.h). Thin columns
  // are only gathered.
  template <class RowAt>
  void pack(const ChunkGradients<T>& chunk, int weight, RowAt row_at, ThinGradient<T>& thin,
            PartsCheck& check) const {
    const Weight& w = weights_[weight];
    if (!w.grad) return;
    const Team team = chunk.team;
    if (const int64_t thin_columns = ThinGradient<T>::columns(w.panels()))
      thin.gather(chunk, w.grad, w.columns, w.columns - thin_columns, thin_columns, row_at);
    for (int64_t panel = team.begin(w.count()); panel < team.end(w.count()); ++panel)
      split_panel(w.panels(), panel, chunk.rows, chunk.in_turn(row_at),
                  at(weight, panel, chunk.rows), check);
  }

  // All gradients += those of the chunk, of `sums` sums; the team splits dsums' columns.
  void add(const ChunkGradients<T>& chunk, int sums, P* block) const {
    const Team team = chunk.team;
    const int64_t H = chunk.hidden, rows = chunk.rows, most = this->block(rows);
    const int64_t first = team.begin(sums * H), last = team.end(sums * H);
    for (int64_t c = first, stop; c < last; c = stop) {
      const int s = int(c / H);
      stop = least(least(c + most, last), (s + 1) * H);
      transpose(chunk, c, stop, block);
      for (int i = 0; i < 2; ++i) {
        const Weight& w = weights_[i];
        const int gate = s - w.first_sum;
        if (w.grad && gate >= 0 && gate < w.gates)
          multiply(chunk, i, w.gate_of(gate) * H + c % H, stop - c, block);
      }
    }
  }

 private:
  static int64_t stride(int64_t rows) { return odd_lines<P>(pairs_in_parts(rows)); }

  P* at(int weight, int64_t panel, int64_t rows) const {
    return packed_[weight] + weights_[weight].panels().before(panel) * pairs_in_parts(rows);
  }

  // Columns [c, stop) of dsums, as rows in parts.
  static void transpose(const ChunkGradients<T>& chunk, int64_t c, int64_t stop, P* block) {
    using V = Vec<T>;
    const int64_t stride = PartsGradient::stride(chunk.rows);
    for (int64_t n; c < stop; c += n, block += n * stride) {
      n = least<int64_t>(kLanes - c % kLanes, stop - c);
      for (int64_t r = 0; r < chunk.rows; r += 2 * kMatrixDepth) {
        alignas(64) P pairs[kParts][kMatrixDepth * kLanes];
        PartsCheck checked(0.f);  // as rows
        for (int k = 0; k < kMatrixDepth; ++k) {
          const auto take = [&](int64_t row) __attribute__((always_inline)) {
            return Parts(row < chunk.rows ? V::load(chunk.dsums.at(row, c), int(n)) : V(T(0)),
                         checked);
          };
          store_pairs(take(r + 2 * k), take(r + 2 * k + 1), pairs[0] + k * kLanes,
                      kMatrixDepth * kLanes);
        }
        for (int i = 0; i < kParts; ++i)
          for (int k = 0; k < kMatrixDepth; k += kLanes)
            pack_transposed(pairs[i] + k * kLanes, kLanes, kLanes, n,
                            block + pairs_in_parts(r) + i * kMatrixDepth + k, stride, false);
      }
    }
  }

  // Rows [row, row + count) of a gradient.
  void multiply(const ChunkGradients<T>& chunk, int weight, int64_t row, int64_t count,
                const P* block) const {
    const Weight& w = weights_[weight];
    const Panels<P> panels = w.panels();
    const int64_t depth = pairs_in_parts(chunk.rows), stride = PartsGradient::stride(chunk.rows);
    for (int64_t panel = 0; panel < w.count(); ++panel) {
      const int64_t column = panels.first_unit(panel);
      const int width = int(panels.step(panel));
      for_row_groups(count, [&](int64_t r, int n) {
        alignas(64) T tile[kGroupRows * kTileVectors * kLanes];
        const Term<P> term{
            block + r * stride, stride, 1, depth, at(weight, panel, chunk.rows), width,
            kSumBlock,          r == 0};
        parts_product(n, panels.vectors(panel), term, Tile<T>{nullptr, 0, tile, width});
        add_tile(tile, width, n, w.columns - column, w.grad + (row + r) * w.columns + column,
                 w.columns, !chunk.first);
      });
    }
  }

  const Weight weights_[2];
  P* packed_[2];  // [panel][pair][vector]
};

}  // namespace rnnkern::RNNKERN_ISA
