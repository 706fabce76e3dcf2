// The GEMM with unpacked (no-pack) weights, for calls too short to repay packing: B's columns are
// rows of the weight matrix, transposed in registers as they are read. Same sums in the same order
// as gemm().
#pragma once
#include "../runtime/tuning.h"
#include "gemm.h"
#include "pack.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int kUnpackedMR = 4;
// Row size from which the hardware prefetcher does not follow as many rows as a register has lanes.
constexpr int64_t kLongRowBytes = 2560;

// One operand pair: row r of A is a + r * lda; lane l of vector v of B's row k is
// b[v][l * k_total + k], where k_total is the member k.
template <class F>
struct UnpackedOperands {
  const F* a;
  int64_t lda, k;
  const F* b[kMaxNR];
  int64_t k_begin = 0;  // first k of the sum; C already has those before it
};

// What to prefetch in each of a vector's rows during the block before k = next: the block that
// begins there or, at the end, the first block of the next vector's rows.
template <class F>
RNNKERN_INLINE const F* prefetch_source(const F* weight, int64_t depth, int64_t next) {
  return weight + (next < depth ? next : next - depth + Vec<F>::kLanes * depth);
}

// total += A B for one vector, KC block by KC block from k on; kc[b] of each, at most
// kMaxLastKC. Each block has its own accumulators, but the first may begin with the total. Two
// blocks run side by side to hide the FMA latency.
template <class F, int MR, int kBlocks>
RNNKERN_INLINE void fma_blocks(const F* a, int64_t row, const F* weight, int64_t depth, int64_t k,
                               const int64_t (&kc)[kBlocks], bool own_acc,
                               typename Vec<Acc<F>>::Raw (&total)[MR]) {
  using V = Vec<Acc<F>>;
  using Columns = TransposeLoad<F>;
  constexpr int kColumns = Columns::kColumns, kLoadsPerLine = kLineElems<F> / kColumns;
  const bool prefetch = use_software_prefetch(MR) || depth * int64_t(sizeof(F)) >= kLongRowBytes;
  const int64_t prefetch_lanes = prefetch ? V::kLanes : 0;
  typename V::Raw acc[kBlocks][MR];
  const F* ahead[kBlocks];
  int64_t begin[kBlocks], end = k;
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) begin[b] = end, end += kc[b];
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) {
    ahead[b] = prefetch_source(weight, depth, end + b * kKC);
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) acc[b][r] = own_acc || b ? typename V::Raw{} : total[r];
  }
  const auto fma_columns = [&](int b, int64_t q) __attribute__((always_inline)) {
    for (int64_t l = q / kColumns % kLoadsPerLine; l < prefetch_lanes; l += kLoadsPerLine)
      __builtin_prefetch(ahead[b] + l * depth + q, 0, 3);
    typename Vec<F>::Raw column[kColumns];
    Columns::load(weight + begin[b] + q, depth, column);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r)
        fma<F>(acc[b][r], Vec<F>(a[r * row + begin[b] + q + j]).v, column[j]);
  };
  for (int64_t q = 0; q + kColumns <= kc[0]; q += kColumns) {
    fma_columns(0, q);
    if (kBlocks > 1 && q < kc[kBlocks - 1]) fma_columns(kBlocks - 1, q);
  }
  if constexpr (kBlocks == 1)  // two have whole columns
    for (k = end - kc[0] % kColumns; k < end; ++k) {
      F column[V::kLanes];
      for (int l = 0; l < V::kLanes; ++l) column[l] = weight[l * depth + k];
      for (int r = 0; r < MR; ++r)
        fma<F>(acc[0][r], Vec<F>(a[r * row + k]).v, Vec<F>::load(column).v);
    }
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) total[r] = own_acc || b ? total[r] + acc[b][r] : acc[b][r];
}

// Vector v of C.
template <class F, int MR>
__attribute__((noinline)) void microkernel_unpacked(const UnpackedOperands<F>* pairs, int count,
                                                    int v, COperand<Acc<F>> tile) {
  using V = Vec<Acc<F>>;
  constexpr int kColumns = TransposeLoad<F>::kColumns;
  // With software prefetch, two blocks at a time gain nothing: load slots are the limit.
  const bool in_twos = MR <= 2 && !use_software_prefetch(MR);
  const StridedRows<const Acc<F>> init = tile.start();
  typename V::Raw total[MR];
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r)
    total[r] = init.data ? V::load(init[r] + v * V::kLanes).v : typename V::Raw{};
  for (const UnpackedOperands<F>* t = pairs; t < pairs + count; ++t)
    for (int64_t k = t->k_begin; k < t->k;) {
      const bool own_acc = k || (tile.accumulate && t == pairs);
      const int64_t n = next_kc(t->k - k), after = next_kc(t->k - k - n);
      if (in_twos && after && after <= n && n % kColumns == 0 && after % kColumns == 0) {
        fma_blocks<F, MR, 2>(t->a, t->lda, t->b[v], t->k, k, {n, after}, own_acc, total);
        k += n + after;
      } else {
        fma_blocks<F, MR, 1>(t->a, t->lda, t->b[v], t->k, k, {n}, own_acc, total);
        k += n;
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) V(total[r]).store(tile.c + r * tile.ldc + v * V::kLanes);
}

#if defined(RNNKERN_AMX)

// The whole AMX blocks of k, for at most kUnpackedMR rows. Computes C transposed: the weight rows
// are AMX's A, unpacked, and the rows of A become the columns of a small panel.
inline void gemm_unpacked_amx(int rows, int nr, const UnpackedOperands<bf16x2>& ab,
                              const COperand<float>& tile) {
  using M = AmxTiles;
  constexpr int kLanes = Vec<float>::kLanes, kATile = kMaxNR;
  alignas(64) float sums[kMaxNR][kLanes][kLanes] = {};
  const StridedRows<const float> init = tile.start();
  for (int r = 0; init.data && r < rows; ++r)
    for (int v = 0; v < nr; ++v)
      for (int l = 0; l < kLanes; ++l) sums[v][l][r] = init[r][v * kLanes + l];
  M::configure(kLanes);
  const auto each_vector = [&](auto f) __attribute__((always_inline)) {
    for_each_of<kMaxNR>([&](auto v) __attribute__((always_inline)) {
      if (v < nr) f(v);
    });
  };
  each_vector([&](auto v)
                  __attribute__((always_inline)) { M::load<v>(sums[v][0], sizeof sums[v][0]); });
  const int64_t row = ab.k * sizeof(bf16x2);
  alignas(64) bf16x2 panel[kAmxK * kUnpackedMR + kLanes] = {};
  for (int64_t k = 0; k < amx_whole_k(ab.k); k += kAmxK) {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kAmxK; ++i) panel[i * rows + r] = ab.a[r * ab.lda + k + i];
    M::load<kTileB>(panel, rows * sizeof(bf16x2));
    each_vector([&](auto v) __attribute__((always_inline)) {
      const bf16x2* const ahead = prefetch_source(ab.b[v], ab.k, k + kKC);
      for (int l = 0; l < kLanes; ++l) __builtin_prefetch(ahead + l * ab.k, 0, 3);
      M::load<kATile>(ab.b[v] + k, row);
      M::multiply<v, kATile>();
    });
  }
  each_vector([&](auto v)
                  __attribute__((always_inline)) { M::store<v>(sums[v][0], sizeof sums[v][0]); });
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < nr; ++v)
      for (int l = 0; l < kLanes; ++l) tile.c[r * tile.ldc + v * kLanes + l] = sums[v][l][r];
}

#endif

// For more rows: transposes each KC block of the weights once for all rows, into the L1.
template <class F>
void gemm_transposing(int rows, int nr, const UnpackedOperands<F>* pairs, int count,
                      COperand<Acc<F>> tile) {
  constexpr int kLanes = Vec<F>::kLanes;
  alignas(64) F block[kMaxLastKC * kMaxNR * kLanes];
  const int64_t step = nr * kLanes;
  for (const UnpackedOperands<F>* ab = pairs; ab < pairs + count; ++ab) {
    int64_t k = 0, n;
    do {
      n = next_kc(ab->k - k);
      for (int v = 0; v < nr; ++v) {
        const F* const weight = ab->b[v];
        const F* const ahead = prefetch_source(weight, ab->k, k + n);
        for (int l = 0; l < kLanes; ++l)
          for (int64_t i = 0; i < n; i += kLineElems<F>)
            __builtin_prefetch(ahead + l * ab->k + i, 0, 3);
        pack_transposed(weight + k, ab->k, kLanes, n, block + v * kLanes, step, false);
      }
      const GemmOperands<F> part{ab->a + k, ab->lda, 1, n, block, step};
      gemm_simd(rows, nr, &part, 1, tile);
      tile.init = nullptr, tile.accumulate = true;
    } while ((k += n) < ab->k);
    tile = tile.continued();
  }
}

#if defined(RNNKERN_GEMM_OF_ENGINE)
template <class F>
RNNKERN_INLINE void gemm_unpacked(int rows, int nr, const UnpackedOperands<F>* pairs, int count,
                                  const COperand<Acc<F>>& c) {
  engine_gemm_unpacked(rows, nr, pairs, count, c);
}
#else
// rows in 1..kMC, vectors in 1..kMaxNR
template <class F>
RNNKERN_INLINE void gemm_unpacked(int rows, int nr, const UnpackedOperands<F>* pairs, int count,
                                  COperand<Acc<F>> tile) {
  using Microkernel = void (*)(const UnpackedOperands<F>*, int, int, COperand<Acc<F>>);
  static constexpr Microkernel of_mr[kUnpackedMR] = {
      microkernel_unpacked<F, 1>, microkernel_unpacked<F, 2>, microkernel_unpacked<F, 3>,
      microkernel_unpacked<F, 4>};
  if constexpr (std::is_same_v<F, Acc<F>>)
    if (rows > 2 * kUnpackedMR) return gemm_transposing(rows, nr, pairs, count, tile);
  for (int r = 0; r < rows; r += kUnpackedMR) {
    const int n = rows - r < kUnpackedMR ? rows - r : kUnpackedMR;
    UnpackedOperands<F> shifted[2];
    for (int i = 0; i < count; ++i) {
      shifted[i] = pairs[i];
      shifted[i].a += r * pairs[i].lda;
    }
    COperand<Acc<F>> part = tile;
    if (tile.init) part.init += r * tile.ld_init;
    part.c += r * tile.ldc;
#if defined(RNNKERN_AMX)
    // Pair by pair, in the order of gemm_amx().
    for (UnpackedOperands<F>* ab = shifted; ab < shifted + count; ++ab) {
      ab->k_begin = amx_whole_k(ab->k);
      if (ab->k_begin || !ab->k) {
        gemm_unpacked_amx(n, nr, *ab, part);
        part = part.continued();
      }
      if (ab->k_begin == ab->k) continue;
      for (int v = 0; v < nr; ++v) of_mr[n - 1](ab, 1, v, part);
      part = part.continued();
    }
#else
    for (int v = 0; v < nr; ++v) of_mr[n - 1](shifted, count, v, part);
#endif
  }
}
#endif

}  // namespace rnnkern::RNNKERN_ISA
