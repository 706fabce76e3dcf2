// The gradients of the sums ("dsums") of a chunk of steps, in the layouts that its products read.
#pragma once
#include "../gemm/pack.h"
#include "../runtime/arena.h"
#include "../runtime/team.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
class GateGrads {
  using F = PackedElem<T>;
  static constexpr int kLanes = Vec<F>::kLanes;
  static constexpr bool kInterleaves = kVnniFactor<T> > 1, kTransposes = kHasAmx && kInterleaves;

 public:
  // Factors in a column of so many rows, filled up to what matrix registers take.
  static int64_t depth(int64_t rows) {
    const int64_t factors = (rows + kVnniFactor<T> - 1) / kVnniFactor<T>;
    return kTransposes ? amx_padded_k(factors) : factors;
  }

  // Of at most `rows` rows.
  GateGrads(int64_t rows, int64_t sums, bool is_blocked, Arena& scratch)
      : sums_(sums),
        rows_(allocate(rows, sums / kVnniFactor<T>, is_blocked, scratch)),
        vnni_(kInterleaves ? allocate(depth(rows), sums, is_blocked, scratch) : rows_),
        transposed_{
            kTransposes ? scratch.alloc<F>(sums * pad_to_odd_lines<F>(depth(rows))) : nullptr,
            pad_to_odd_lines<F>(depth(rows))} {}

  // From row r, and from sum c on, with which a block begins.
  BlockedMatrix<F> at_row(int64_t r, int64_t c) const {
    return rows_.at_row(r, c / kVnniFactor<T>);
  }
  static T* element(BlockedMatrix<F> rows, int64_t r, int64_t c) {
    return reinterpret_cast<T*>(rows.at(r, c / kVnniFactor<T>));
  }

  // What the weight gradients add up over: the rows, or once paired, pairs of two; and a row for
  // each column of these, filled up with zeros, or null.
  BlockedMatrix<const F> vnni() const { return vnni_; }
  StridedRows<const F> transposed() const { return {transposed_.data, transposed_.stride}; }

  void interleave_rows(int64_t rows, Team team) const {
    if constexpr (kInterleaves) {
      const int64_t depth = this->depth(rows);
      for (int64_t k = team.begin(depth); k < team.end(depth); ++k)
        for (int64_t c = 0; c < sums_; c += kLanes) {
          const int lanes = int(min<int64_t>(sums_ - c, kLanes));
          const T* const row = 2 * k < rows ? element(rows_, 2 * k, c) : nullptr;
          const T* const next = 2 * k + 1 < rows ? element(rows_, 2 * k + 1, c) : nullptr;
          const Vec<F> pairs =
              row ? vnni_interleave(row, next, lanes) : Vec<F>(typename Vec<F>::Raw{});
          pairs.store(vnni_.at(k, c), lanes);
        }
      team.sync();
      if constexpr (kTransposes) transpose(depth, team);
    }
  }

 private:
  // Many sums stand in blocks: in rows, each row of a column that the weight gradients read would
  // be on a page of its own, more of them than the first-level TLB has entries.
  static BlockedMatrix<F> allocate(int64_t rows, int64_t sums, bool is_blocked, Arena& scratch) {
    if (is_blocked) {
      const int64_t block = rows * kKC + kLineElems<F>;
      return {scratch.alloc<F>(sums / kKC * block), kKC, block};
    }
    const int64_t row = pad_to_odd_lines<F>(sums);
    return {scratch.alloc<F>(rows * row), row, kKC};
  }

  void transpose(int64_t depth, Team team) const {
    const int64_t last = team.end(sums_);
    for (int64_t c = team.begin(sums_), stop; c < last; c = stop) {
      stop = vnni_.is_blocked() ? min(last, (c / kKC + 1) * kKC) : last;
      for (int64_t k = 0; k < depth; k += kLanes)
        pack_transposed(vnni_.at(k, c), vnni_.ld, kLanes, stop - c, transposed_[c] + k,
                        transposed_.stride, false);
    }
    team.sync();
  }

  const int64_t sums_;
  const BlockedMatrix<F> rows_, vnni_;  // (rows, sums), (depth, sums)
  const StridedRows<F> transposed_;     // (sums, depth)
};

}  // namespace rnnkern::RNNKERN_ISA
