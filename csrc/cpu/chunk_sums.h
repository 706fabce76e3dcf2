// The gradients of the sums ("dsums") of a chunk of steps, in the layouts that its products read.
#pragma once
#include "arena.h"
#include "pack.h"
#include "team.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
class ChunkSums {
  using F = PackedElem<T>;
  static constexpr int kLanes = Vec<F>::kLanes;
  static constexpr bool kPairs = kVnniFactor<T> > 1, kByColumns = kMatrixRegisters && kPairs;

 public:
  // Factors in a column of so many rows, filled up to what matrix registers take.
  static int64_t depth(int64_t rows) {
    const int64_t factors = (rows + kVnniFactor<T> - 1) / kVnniFactor<T>;
    return kByColumns ? filled_blocks(factors) : factors;
  }

  // Of at most `rows` rows.
  ChunkSums(int64_t rows, int64_t sums, bool in_blocks, Arena& scratch)
      : sums_(sums),
        rows_(take(rows, sums / kVnniFactor<T>, in_blocks, scratch)),
        by_rows_(kPairs ? take(depth(rows), sums, in_blocks, scratch) : rows_),
        by_columns_{kByColumns ? scratch.take<F>(sums * odd_lines<F>(depth(rows))) : nullptr,
                    odd_lines<F>(depth(rows))} {}

  // From row r, and from sum c on, with which a block begins.
  Blocked<F> from(int64_t r, int64_t c) const { return rows_.from(r, c / kVnniFactor<T>); }
  static T* element(Blocked<F> rows, int64_t r, int64_t c) {
    return reinterpret_cast<T*>(rows.at(r, c / kVnniFactor<T>));
  }

  // What the weight gradients add up over: the rows, or once paired, pairs of two; and a row for
  // each column of these, filled up with zeros, or null.
  Blocked<const F> by_rows() const { return by_rows_; }
  StridedRows<const F> by_columns() const { return {by_columns_.data, by_columns_.stride}; }

  void pair(int64_t rows, Team team) const {
    if constexpr (kPairs) {
      const int64_t depth = this->depth(rows);
      for (int64_t k = team.begin(depth); k < team.end(depth); ++k)
        for (int64_t c = 0; c < sums_; c += kLanes) {
          const int lanes = int(min<int64_t>(sums_ - c, kLanes));
          const T* const row = 2 * k < rows ? element(rows_, 2 * k, c) : nullptr;
          const T* const next = 2 * k + 1 < rows ? element(rows_, 2 * k + 1, c) : nullptr;
          const Vec<F> pairs = row ? zip_rows(row, next, lanes) : Vec<F>(typename Vec<F>::Raw{});
          pairs.store(by_rows_.at(k, c), lanes);
        }
      team.sync();
      if constexpr (kByColumns) transpose(depth, team);
    }
  }

 private:
  // Many sums stand in blocks: in rows, each row of a column that the weight gradients read would
  // be on a page of its own, more of them than the first-level TLB has entries.
  static Blocked<F> take(int64_t rows, int64_t sums, bool in_blocks, Arena& scratch) {
    if (in_blocks) {
      const int64_t block = rows * kSumBlock + kLine<F>;
      return {scratch.take<F>(sums / kSumBlock * block), kSumBlock, block};
    }
    const int64_t row = odd_lines<F>(sums);
    return {scratch.take<F>(rows * row), row, kSumBlock};
  }

  void transpose(int64_t depth, Team team) const {
    const int64_t last = team.end(sums_);
    for (int64_t c = team.begin(sums_), stop; c < last; c = stop) {
      stop = by_rows_.in_blocks() ? min(last, (c / kSumBlock + 1) * kSumBlock) : last;
      for (int64_t k = 0; k < depth; k += kLanes)
        pack_transposed(by_rows_.at(k, c), by_rows_.row, kLanes, stop - c, by_columns_[c] + k,
                        by_columns_.stride, false);
    }
    team.sync();
  }

  const int64_t sums_;
  const Blocked<F> rows_, by_rows_;  // (rows, sums), (depth, sums)
  const StridedRows<F> by_columns_;  // (sums, depth)
};

}  // namespace rnnkern::RNNKERN_ISA
