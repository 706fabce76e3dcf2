// The gate gradients (dgates: of the pre-activations) of a chunk of steps, in the layouts that its
// GEMMs read:
//
//   rows         (rows, preacts)    A of propagate_dh and input_dgrad
//   vnni         (rows/2, preacts)  pairs of rows interleaved: A^T and B of wgrad; bf16 only
//   transposed   (preacts, rows/2)  row-major A of wgrad for AMX; bf16 only
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
  // Packed elements in a column of so many rows, padded to whole AMX tiles.
  static int64_t k_of(int64_t rows) {
    const int64_t factors = (rows + kVnniFactor<T> - 1) / kVnniFactor<T>;
    return kTransposes ? amx_padded_k(factors) : factors;
  }

  // For at most `rows` rows.
  GateGrads(int64_t rows, int64_t preacts, bool is_blocked, Arena& scratch)
      : preacts_(preacts),
        rows_(allocate(rows, preacts / kVnniFactor<T>, is_blocked, scratch)),
        vnni_(kInterleaves ? allocate(k_of(rows), preacts, is_blocked, scratch) : rows_),
        transposed_{
            kTransposes ? scratch.alloc<F>(preacts * pad_to_odd_lines<F>(k_of(rows))) : nullptr,
            pad_to_odd_lines<F>(k_of(rows))} {}

  // From row r and pre-activation c on, which begins a block.
  BlockedMatrix<F> at_row(int64_t r, int64_t c) const {
    return rows_.at_row(r, c / kVnniFactor<T>);
  }
  static T* element(BlockedMatrix<F> rows, int64_t r, int64_t c) {
    return reinterpret_cast<T*>(rows.at(r, c / kVnniFactor<T>));
  }

  // For wgrad, once rows are interleaved. `transposed` is padded with zeros, or null.
  BlockedMatrix<const F> vnni() const { return vnni_; }
  StridedRows<const F> transposed() const { return {transposed_.data, transposed_.stride}; }

  void interleave_rows(int64_t rows, Team team) const {
    if constexpr (kInterleaves) {
      const int64_t depth = k_of(rows);
      for (int64_t k = team.begin(depth); k < team.end(depth); ++k)
        for (int64_t c = 0; c < preacts_; c += kLanes) {
          const int lanes = int(min<int64_t>(preacts_ - c, kLanes));
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
  // Many pre-activations are in blocks of columns: wgrad reads columns, and in plain rows each row
  // would be on a page of its own, more than the first-level TLB has entries.
  static BlockedMatrix<F> allocate(int64_t rows, int64_t preacts, bool is_blocked, Arena& scratch) {
    if (is_blocked) {
      const int64_t block = rows * kKC + kLineElems<F>;
      return {scratch.alloc<F>(preacts / kKC * block), kKC, block};
    }
    const int64_t row = pad_to_odd_lines<F>(preacts);
    return {scratch.alloc<F>(rows * row), row, kKC};
  }

  void transpose(int64_t depth, Team team) const {
    const int64_t last = team.end(preacts_);
    for (int64_t c = team.begin(preacts_), stop; c < last; c = stop) {
      stop = vnni_.is_blocked() ? min(last, (c / kKC + 1) * kKC) : last;
      for (int64_t k = 0; k < depth; k += kLanes)
        pack_transposed(vnni_.at(k, c), vnni_.ld, kLanes, stop - c, transposed_[c] + k,
                        transposed_.stride, false);
    }
    team.sync();
  }

  const int64_t preacts_;
  const BlockedMatrix<F> rows_, vnni_;  // (rows, preacts), (depth, preacts)
  const StridedRows<F> transposed_;     // (preacts, depth)
};

}  // namespace rnnkern::RNNKERN_ISA
