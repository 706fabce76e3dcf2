// The GEMM on AMX tiles: 16 packed elements of k at a time; gemm_simd takes the rest of k.
//
//   C of 2 x NR tiles            B: one panel block at a time in kTileB
//     A0 (`height` rows)  ->  tmm0 tmm1 ...
//     A1 (`height` rows)  ->  tmm3 tmm4 ...      A tiles stay loaded where tiles suffice
#pragma once
#include "gemm_simd.h"

namespace rnnkern::RNNKERN_ISA {

#if defined(RNNKERN_AMX)

// C of kTiles row tiles by NR vectors, over the whole blocks of k. The second row tile begins
// `second` rows after the first. Rows in both are computed twice, to the same bits.
template <int kTiles, int NR>
void microkernel_amx(int64_t second, const GemmOperands<bf16x2>* pairs, int count,
                     const COperand<float>& c) {
  using M = AmxTiles;
  constexpr int kCTiles = kTiles * NR, kLanes = Vec<float>::kLanes;
  constexpr bool kOneATile = kCTiles + kTiles > kTileB;
  const auto each_c_tile = [](auto f) __attribute__((always_inline)) {
    for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
      for_each_of<NR>([&](auto v) __attribute__((always_inline)) {
        f(std::integral_constant<int, t * NR + v>(), t, v);
      });
    });
  };
  const StridedRows<const float> init = c.start();
  each_c_tile([&](auto i, int t, int v) __attribute__((always_inline)) {
    if (init.data)
      M::load<i>(init[t * second] + v * kLanes, init.stride * sizeof(float));
    else
      M::zero<i>();
  });
  for (const GemmOperands<bf16x2>* ab = pairs; ab < pairs + count; ++ab) {
    const int64_t lda = ab->lda * sizeof(bf16x2), ldb = ab->ldb * sizeof(float);
    const bf16x2* b = ab->b;
    for (int64_t left = ab->k / kAmxK, block = 0; left > 0; ++block) {
      const bf16x2* a = ab->a + block * ab->a_block_stride;
      const bf16x2* const a_second = a + second * ab->lda;
      const int64_t blocks = min(left, kKC / kAmxK);
      left -= blocks;
      for (int64_t k = 0; k < blocks * kAmxK; k += kAmxK) {
        const auto load_a = [&](auto t) __attribute__((always_inline)) {
          constexpr int kATile = kCTiles + (kOneATile ? 0 : decltype(t)::value);
          M::load<kATile>((t ? a_second : a) + k, lda);
        };
        if (!kOneATile) for_each_of<kTiles>(load_a);
        for_each_of<NR>([&](auto v) __attribute__((always_inline)) {
          M::load<kTileB>(b + v * kLanes, ldb);
          for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
            if (kOneATile) load_a(t);
            M::multiply<t * NR + v, kCTiles + (kOneATile ? 0 : t)>();
          });
        });
        b += kAmxK * ab->ldb;
      }
    }
  }
  each_c_tile([&](auto i, int t, int v) __attribute__((always_inline)) {
    M::store<i>(c.c + t * second * c.ldc + v * kLanes, c.ldc * sizeof(float));
  });
}

// All rows and vectors, over the whole blocks of k.
inline void macrokernel_amx(int rows, int nr, const GemmOperands<bf16x2>* pairs, int count,
                            const COperand<float>& c) {
  using Microkernel = void (*)(int64_t, const GemmOperands<bf16x2>*, int, const COperand<float>&);
  static constexpr Microkernel one[] = {microkernel_amx<1, 1>, microkernel_amx<1, 2>,
                                        microkernel_amx<1, 3>, microkernel_amx<1, 4>};
  static constexpr Microkernel two[] = {microkernel_amx<2, 1>, microkernel_amx<2, 2>,
                                        microkernel_amx<2, 3>};
  constexpr int kLanes = Vec<float>::kLanes;
  const int height = rows > kAmxRows ? (rows + 1) / 2 : rows;
  AmxTiles::configure(height);
  if (rows <= kAmxRows) return one[nr - 1](0, pairs, count, c);
  if (nr < 4) return two[nr - 1](rows - height, pairs, count, c);
  for (int v = 0; v < 4; v += 2) {
    GemmOperands<bf16x2> half[kMaxBatch];
    for (int i = 0; i < count; ++i) (half[i] = pairs[i]).b += v * kLanes;
    const float* const init = c.init ? c.init + v * kLanes : nullptr;
    microkernel_amx<2, 2>(rows - height, half, count,
                          {init, c.ld_init, c.c + v * kLanes, c.ldc, c.accumulate});
  }
}

// gemm() for row-major A.
inline void gemm_amx(int rows, int nr, const GemmOperands<bf16x2>* pairs, int count,
                     COperand<float> c) {
  for (int i = 0; i < count;) {
    // Batch the pairs whose k is whole tiles, and one more pair.
    int end = i;
    while (end + 1 < count && pairs[end].k % kAmxK == 0) ++end;
    const GemmOperands<bf16x2>& last = pairs[end++];
    const int64_t whole = amx_whole_k(last.k);
    if (whole || end - i > 1 || !last.k) {
      macrokernel_amx(rows, nr, pairs + i, end - i, c);
      c = c.continued();
    }
    if (whole < last.k) {
      const GemmOperands<bf16x2> rest{last.a + whole / kKC * last.a_block_stride + whole % kKC,
                                      last.lda,
                                      1,
                                      last.k - whole,
                                      last.b + whole * last.ldb,
                                      last.ldb};
      if (whole) c.init = nullptr, c.accumulate = true;
      gemm_simd(rows, nr, &rest, 1, c);
      c = c.continued();
    }
    i = end;
  }
}

#endif

}  // namespace rnnkern::RNNKERN_ISA
