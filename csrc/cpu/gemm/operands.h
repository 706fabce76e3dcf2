// The operands of a batch-reduce GEMM, and its blocking:
//
//   C[r][v] = beta C[r][v] + sum_i sum_k A_i[r, k] * B_i[k][v]
//
// A_i has rows or columns of scalars, B_i is a packed panel (packed_layout.h) of up to kMaxNR
// vectors, C is MR or more rows of vectors. The order of a sum depends on k alone: a row of C has
// the same bits whatever rows, tiles or threads surround it.
//
//   blocking   unit           where it is kept
//   MR x NR    register tile  accumulators                  microkernel.h
//   KC         k              B's KC x NR block in the L1   gemm_simd.h
//   MC         rows           reuse of that block           callers: for_mc_blocks
#pragma once
#include <utility>

#include "../simd/amx_tiles.h"

namespace rnnkern::RNNKERN_ISA {

// Registers for C: of 32 with AVX-512 and NEON, else of 16.
#if defined(__AVX512F__) || defined(RNNKERN_NEON)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif
// NR, in vectors, at most.
constexpr int kMaxNR = 4;

// MR at most, for NR vectors. One k loads MR scalars and NR vectors for MR * NR FMAs, so the fewer
// vectors, the more rows.
#if defined(RNNKERN_NEON)
// A row of A needs a register of its own, which holds several k, and B two: 6 x 4, 7 x 3, 10 x 2.
constexpr int max_mr(int nr) { return nr > 1 ? 30 / (nr + 1) : 12; }
#else
constexpr int max_mr(int nr) { return kAccumulators / (nr > 1 ? nr : 2); }
#endif

// MC: rows that one block of a panel is multiplied by.
constexpr int kMC = kHasAmx ? 32 : 36;

// KC: k that are summed in registers before they join C. Rounding errors then do not grow with k,
// and a panel's block stays in the L1 for all MC rows.
constexpr int64_t kKC = 64;
// The last block may be longer instead of being followed by a short one, which would cost one more
// load and store of C.
constexpr int64_t kMaxLastKC = 80;

// The size of the next block of `left` remaining k.
RNNKERN_INLINE int64_t next_kc(int64_t left) { return left <= kMaxLastKC ? left : kKC; }

// Operand pairs of one call at most.
constexpr int kMaxBatch = 4;

// A matrix whose columns may be in blocks of kKC:
//   element (r, c) is data[r * ld + c / kKC * block_stride + c % kKC].
// Without blocks block_stride is kKC; with blocks, all are whole.
template <class T>
struct BlockedMatrix {
  T* data;
  int64_t ld, block_stride;
  RNNKERN_INLINE T* at(int64_t r, uint64_t c) const {  // unsigned: quotients are shifts
    return data + r * ld + c / kKC * block_stride + c % kKC;
  }
  // The part from row r and column c on, which begins a block.
  BlockedMatrix at_row(int64_t r, int64_t c) const { return {at(r, c), ld, block_stride}; }
  operator BlockedMatrix<const T>() const { return {data, ld, block_stride}; }
  bool is_blocked() const { return block_stride != kKC; }
};

// One operand pair, in packed elements F. A[r, k] is a[r * lda + k * a_k_stride], where one of the
// two strides is 1; B's row k is consecutive vectors at b + k * ldb.
template <class F>
struct GemmOperands {
  const F* a;
  int64_t lda, a_k_stride;
  int64_t k;
  const F* b;
  int64_t ldb;
  int64_t a_block_stride = kKC;  // from A[r, k] to A[r, k + kKC] where a_k_stride is 1
  bool prefetch_b = false;       // prefetch this pair's blocks to the L2
  const F* next_b = nullptr;     // prefetch this at the end: the first block of the next pair
};

// The pair's block that begins with k.
template <class F>
RNNKERN_INLINE GemmOperands<F> block_of(const GemmOperands<F>& ab, int64_t k) {
  const int64_t at = ab.a_k_stride == 1 ? k / kKC * ab.a_block_stride : k * ab.a_k_stride;
  return {ab.a + at, ab.lda, ab.a_k_stride, next_kc(ab.k - k), ab.b + k * ab.ldb, ab.ldb};
}

// C: rows of vectors. Sums begin with `init`, which may be C itself, or with zeros if it is null;
// with `accumulate` (beta = 1) they are added to C.
template <class T>
struct COperand {
  const T* init;
  int64_t ld_init;
  T* c;
  int64_t ldc;
  bool accumulate = false;

  // What sums in memory begin with; null: zeros.
  StridedRows<const T> start() const {
    return accumulate ? StridedRows<const T>{c, ldc} : StridedRows<const T>{init, ld_init};
  }
  // C for the operand pairs that follow in another call.
  COperand continued() const { return {c, ldc, c, ldc}; }
};

// Calls f(first row, number of rows) for parts of nearly equal size, at most kMost.
template <int kMost, class F>
RNNKERN_INLINE void for_even_parts(int64_t rows, F&& f) {
  int64_t parts = (rows + kMost - 1) / kMost;
  for (int64_t first = 0; parts > 0; --parts) {
    const int64_t n = (rows - first + parts - 1) / parts;
    f(first, int(n));
    first += n;
  }
}
template <class F>
RNNKERN_INLINE void for_mc_blocks(int64_t rows, F&& f) {
  for_even_parts<kMC>(rows, f);
}

// f(0), f(1), ... with numbers that the compiler knows.
template <int kCount, class F>
RNNKERN_INLINE void for_each_of(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// out (+)= tile, for `rows` rows of `columns` columns, at most `width`.
template <class T>
void write_tile(const T* tile, int width, int64_t rows, int64_t columns, T* out, int64_t stride,
                bool accumulate) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < width && c < columns; c += Vec<T>::kLanes) {
      const int lanes = int(min<int64_t>(columns - c, Vec<T>::kLanes));
      T* const to = out + r * stride + c;
      Vec<T> value = Vec<T>::load(tile + r * width + c);
      if (accumulate) value = Vec<T>::load(to, lanes) + value;
      value.store(to, lanes);
    }
}

}  // namespace rnnkern::RNNKERN_ISA
