// One call of a layer, with all its directions, as the bindings hand it to the engine. The caller
// owns every buffer; inputs are never written.
//
// Letters: T steps, B batch rows, I input features, H hidden units, D directions, G gates, P units
// of a projection, R width of h (P with a projection, else H), C width of c: H for each state but
// h, one after the other. T is also the element type of the tensors; Acc<T> is the type of sums and
// of what is carried over time.
//
// A "row" is one (step, batch row) pair. Rows are in time-major order, t * B + b, or as packed.
// `saved` and `c_states` have steps in that order and the layout of saved_layout.h within a step.
#pragma once
#include <cstdint>

#include "../cells/registry.h"
#include "prepacked.h"

namespace rnnkern {

// The rows of a sequence. Packed: offsets[t] is the first row of step t, offsets[T] the number of
// rows, and the batch never grows with t. Padded: offsets is null.
// A part of a batch is a sequence too: it skips `first` rows of each step and leaves out `others`.
struct Sequence {
  int64_t steps, batch;
  const int64_t* offsets;
  int64_t first = 0, others = 0;

  int64_t active(int64_t t) const {
    if (!offsets) return batch;
    const int64_t left = offsets[t + 1] - offsets[t] - first;
    return left < 0 ? 0 : left < batch ? left : batch;
  }
  int64_t row(int64_t t) const { return (offsets ? offsets[t] : t * (batch + others)) + first; }
  // Rows of steps [t0, t1).
  int64_t rows(int64_t t0, int64_t t1) const {
    if (!offsets) return (t1 - t0) * batch;
    int64_t sum = 0;
    for (int64_t t = t0; t < t1; ++t) sum += active(t);
    return sum;
  }
  // All rows of the whole batch.
  int64_t rows() const { return offsets ? offsets[steps] : steps * batch; }

  // On the way through the batch rows of a packed batch, from block to block of so many.
  struct BlockCursor {
    int64_t blocks, t0, t1, total;   // total: rows of steps [t0, t1)
    int64_t end = t1;                // where batch row b ends
    int64_t b = 0, rows_before = 0;  // rows_before: of the batch rows below b
  };
  // To the first batch row of block i, from that of an earlier block, or to the batch's end. Blocks
  // have about equal numbers of rows, and at least one batch row.
  int64_t advance(BlockCursor& at, int64_t i) const {
    const int64_t wanted = at.total * i / at.blocks;
    for (; at.b < batch; ++at.b) {
      while (at.end > at.t0 && active(at.end - 1) <= at.b) --at.end;
      const int64_t rows = at.end - at.t0;
      if (at.b >= i && 2 * at.rows_before + rows > 2 * wanted) break;
      at.rows_before += rows;
    }
    return at.b;
  }

  // The first batch row of block i of so many, or the end of the last one. Those of a packed batch
  // have about equal numbers of rows in steps [t0, t1).
  int64_t block_begin(int64_t i, int64_t blocks, int64_t t0, int64_t t1) const {
    const int64_t each = (batch + blocks - 1) / blocks;
    if (!offsets) return i * each < batch ? i * each : batch;
    BlockCursor at{blocks, t0, t1, rows(t0, t1)};
    return advance(at, i);
  }
  int64_t block_begin(int64_t i, int64_t blocks) const { return block_begin(i, blocks, 0, steps); }
  // Batch rows of the largest block.
  int64_t largest_block(int64_t blocks) const {
    if (!offsets) return (batch + blocks - 1) / blocks;
    int64_t most = 0;
    BlockCursor at{blocks, 0, steps, rows(0, steps)};
    for (int64_t i = 1; i <= blocks; ++i) {
      const int64_t begin = at.b, count = advance(at, i) - begin;
      if (count > most) most = count;
    }
    return most;
  }

  Sequence part(int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    Sequence s{steps, count, offsets, first + begin, batch + others - count};
    while (s.steps > 1 && s.active(s.steps - 1) == 0) --s.steps;
    return s;
  }
};

// A tensor of rows with contiguous features. A packed sequence uses only b_stride.
template <class T>
struct SequenceView {
  T* data;
  int64_t t_stride, b_stride;  // elements from one t, and from one b, to the next

  T* at(const Sequence& s, int64_t t) const {
    return data + (s.offsets ? s.offsets[t] * b_stride : t * t_stride) + s.first * b_stride;
  }
};

template <class T>
struct Weights {
  const T *ih, *hh;            // (G H, I); (G H, R), (heads, G H / heads, H / heads) or null
  const T *bias_ih, *bias_hh;  // (G H) or null
  const T* hr;                 // (P, H), null without a projection
  const T* params;             // (kParams, H), null without
};

template <class T>
struct WeightGrads {
  T *ih, *hh, *bias_ih, *bias_hh, *hr, *params;  // shapes as Weights; null where not wanted
};

constexpr int kMaxDirections = 2;

template <class T>
struct LayerParams {
  CellId cell;
  Sequence sequence;
  int64_t input_size, hidden_size, proj_size;  // P, 0 without a projection
  int directions;                              // the second runs from the last step to the first
  int64_t heads = 1;                           // blocks of W_hh: 1 if dense, 0 without W_hh
  SequenceView<const T> x;
  Weights<T> weights[kMaxDirections];
  const T* h0;       // (D, B, R) or null for zeros
  const Acc<T>* c0;  // (D, B, C) or null for zeros
  // Where `resets` is not 0, a row takes reset_h and reset_c for its states before the step, also
  // before the first; null: zeros. Their strides may be 0. For padded data in one direction.
  SequenceView<const uint8_t> resets;  // (T, B), or null
  SequenceView<const T> reset_h;       // (T, B, R)
  SequenceView<const Acc<T>> reset_c;  // (T, B, C)
  // What a cell with masks asks for; both strides may be 0, and that from one direction to the
  // next.
  SequenceView<const Acc<T>> masks;  // (D, T, B, kMasks, H)
  int64_t masks_d_stride;
  // The weights as prepack() left them, for forward passes: `weights` is not read then, nor
  // `masks`. Or null.
  const PrepackedHeader* prepacked;

  int64_t h_size() const { return proj_size ? proj_size : hidden_size; }  // R
  WeightFormat weight_format() const { return prepacked ? prepacked->format : WeightFormat::same; }
};

template <class T>
struct ForwardParams : LayerParams<T> {
  SequenceView<T> y;  // features (D, R)
  T* h_n;             // (D, B, R)
  Acc<T>* c_n;        // (D, B, C), null where the cell has no c
  T* saved;           // D * rows * kSaved * H, null in inference
  Acc<T>* c_states;   // D * rows * C: every c_t; null in inference
};

template <class T>
struct BackwardParams : LayerParams<T> {
  SequenceView<const T> y;
  const T* saved;
  const Acc<T>* c_states;
  SequenceView<const T> dy;  // features (D, R); data is null for zeros
  const Acc<T>*dh_n, *dc_n;  // as h_n, c_n, or null for zeros
  SequenceView<Acc<T>> dx;   // contiguous (rows, I); data is null where not wanted
  Acc<T>*dh_0, *dc_0;        // as h0, c0, or null
  WeightGrads<Acc<T>> grads[kMaxDirections];
  // Those of reset_h and reset_c are added to what is there; null where not wanted.
  SequenceView<Acc<T>> dreset_h, dreset_c;
  Acc<T>*flow_h, *flow_c;  // (D, rows, R), (D, rows, C): dL/dh_t and dL/dc_t; or null
};

}  // namespace rnnkern
