// Cells that put a mask on h before W_hh multiplies it: the backward pass of that product. dh gets
// mask (dgates W_hh), and W_hh's gradient is that of what W_hh has multiplied.
#pragma once
#include "../../core/layer_params.h"
#include "../gemm/operands.h"
#include "gate_grads.h"
#include "given_sums.h"
#include "masks.h"
#include "time_loop.h"
#include "wgrad.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class HiddenMask {
  using S = Acc<T>;
  using F = PackedElem<T>;

 public:
  // Of the batch rows of `seq`; `rows` of a chunk, at most.
  HiddenMask(const BackwardParams<T>& p, const Sequence& seq, int direction, int64_t rows,
             Arena& scratch)
      : p_(p),
        seq_(seq),
        d_(direction),
        masked_(Cell::kMasksHidden ? scratch.alloc<T>(rows * p.hidden_size) : nullptr) {}

  // dh += mask (dgates W_hh), for the rows of the range below `active` and its panels. `sums` has
  // room for a panel of them.
  template <class HiddenWeights>
  void propagate_dh(const HiddenWeights& hh, int64_t s, int64_t t, const WorkRange& range,
                    int64_t active, BlockedMatrix<F> dgates, S* sums, StridedRows<S> dh) const {
    const int64_t rows = active - range.b0, H = p_.hidden_size;
    const StepMasks<S, Cell::kMasks> masks = masks_of(t, range.b0);
    for (int64_t i = range.p0; i < range.p1; ++i) {
      const int64_t panel = serpentine(i, s, range), first = hh.panels.first_unit(panel);
      const int64_t width = hh.panels.ldb(panel), columns = min(width, H - first);
      std::memset(sums, 0, rows * width * sizeof(S));
      hh.gemm_accumulate(dgates.at_row(range.b0, Products<Cell>::kHidden * H), rows, panel,
                         {sums, width}, next_serpentine(i, s, range));
      for (int64_t b = 0; b < rows; ++b) {
        S* const to = dh[range.b0 + b] + first;
        const S* const mask = masks.hidden_mask(b, H) + first;
        for (int64_t u = 0; u < columns; ++u) to[u] += mask[u] * sums[b * width + u];
      }
    }
  }

  // Makes mask h for a chunk's rows, which the team shares. h(t, b): of batch row b before step t.
  template <class HAt>
  void multiply(const WgradArgs<T>& chunk, HAt h_before) const {
    const int64_t H = p_.hidden_size;
    int64_t row = 0;
    for (int64_t t = chunk.t0; t < chunk.t1; row += seq_.active(t++)) {
      const StepMasks<S, Cell::kMasks> masks = masks_of(t, 0);
      const int64_t active = seq_.active(t), end = chunk.team.end(active);
      for (int64_t b = chunk.team.begin(active); b < end; ++b)
        masks.mask_hidden(StridedRows<const T>{h_before(t, b), 0}, b, b + 1, H,
                          masked_ + (row + b) * H);
    }
    chunk.team.sync();
  }

  // Of the chunk's row k.
  const T* row(int64_t k) const { return masked_ + k * p_.hidden_size; }

 private:
  StepMasks<S, Cell::kMasks> masks_of(int64_t t, int64_t first) const {
    StepMasks<S, Cell::kMasks> masks;
    masks.set_masks(p_, seq_, d_, t, first);
    return masks;
  }

  const BackwardParams<T>& p_;
  const Sequence& seq_;
  const int d_;
  T* const masked_;
};

}  // namespace rnnkern::RNNKERN_ISA
