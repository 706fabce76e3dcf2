// The GEMM on AMX tiles: 16 packed elements of k at a time; gemm_simd takes the rest of k.
//
//   C of 2 x NR tiles            B: one panel block at a time in kTileB
//     A0 (`height` rows)  ->  tmm0 tmm1 ...
//     A1 (`height` rows)  ->  tmm3 tmm4 ...      A tiles stay loaded where tiles suffice
#pragma once
#include "gemm_simd.h"

namespace rnnkern::RNNKERN_ISA {

#if defined(RNNKERN_AMX)

template <int kCount, class F>
RNNKERN_INLINE void for_each_of(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// C of kTiles row tiles by NR vectors, over the whole blocks of k. The second row tile begins
// `second` rows after the first. Rows in both are computed twice, to the same bits.
template <int kTiles, int kVectors>
void microkernel_amx(int64_t second, const GemmOperands<bf16x2>* terms, int count,
                     const COperand<float>& tile) {
  using M = AmxTiles;
  constexpr int kSums = kTiles * kVectors, kLanes = Vec<float>::kLanes;
  constexpr bool kOneLeft = kSums + kTiles > kTileB;
  const auto each_sum = [](auto f) __attribute__((always_inline)) {
    for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
      for_each_of<kVectors>([&](auto v) __attribute__((always_inline)) {
        f(std::integral_constant<int, t * kVectors + v>(), t, v);
      });
    });
  };
  const StridedRows<const float> init = tile.start();
  each_sum([&](auto sum, int t, int v) __attribute__((always_inline)) {
    if (init.data)
      M::load<sum>(init[t * second] + v * kLanes, init.stride * sizeof(float));
    else
      M::zero<sum>();
  });
  for (const GemmOperands<bf16x2>* term = terms; term < terms + count; ++term) {
    const int64_t row = term->lda * sizeof(bf16x2), step = term->ldb * sizeof(float);
    const bf16x2* b = term->b;
    for (int64_t left = term->k / kAmxK, block = 0; left > 0; ++block) {
      const bf16x2* a = term->a + block * term->a_block_stride;
      const bf16x2* const a_second = a + second * term->lda;
      const int64_t blocks = min(left, kKC / kAmxK);
      left -= blocks;
      for (int64_t k = 0; k < blocks * kAmxK; k += kAmxK) {
        const auto load_left = [&](auto t) __attribute__((always_inline)) {
          constexpr int kLeft = kSums + (kOneLeft ? 0 : decltype(t)::value);
          M::load<kLeft>((t ? a_second : a) + k, row);
        };
        if (!kOneLeft) for_each_of<kTiles>(load_left);
        for_each_of<kVectors>([&](auto v) __attribute__((always_inline)) {
          M::load<kTileB>(b + v * kLanes, step);
          for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
            if (kOneLeft) load_left(t);
            M::multiply<t * kVectors + v, kSums + (kOneLeft ? 0 : t)>();
          });
        });
        b += kAmxK * term->ldb;
      }
    }
  }
  each_sum([&](auto sum, int t, int v) __attribute__((always_inline)) {
    M::store<sum>(tile.c + t * second * tile.ldc + v * kLanes, tile.ldc * sizeof(float));
  });
}

// All rows and vectors, over the whole blocks of k.
inline void macrokernel_amx(int rows, int vectors, const GemmOperands<bf16x2>* terms, int count,
                            const COperand<float>& tile) {
  using Tiles = void (*)(int64_t, const GemmOperands<bf16x2>*, int, const COperand<float>&);
  static constexpr Tiles one[] = {microkernel_amx<1, 1>, microkernel_amx<1, 2>,
                                  microkernel_amx<1, 3>, microkernel_amx<1, 4>};
  static constexpr Tiles two[] = {microkernel_amx<2, 1>, microkernel_amx<2, 2>,
                                  microkernel_amx<2, 3>};
  constexpr int kLanes = Vec<float>::kLanes;
  const int height = rows > kAmxRows ? (rows + 1) / 2 : rows;
  AmxTiles::configure(height);
  if (rows <= kAmxRows) return one[vectors - 1](0, terms, count, tile);
  if (vectors < 4) return two[vectors - 1](rows - height, terms, count, tile);
  for (int v = 0; v < 4; v += 2) {
    GemmOperands<bf16x2> half[kMaxBatch];
    for (int i = 0; i < count; ++i) (half[i] = terms[i]).b += v * kLanes;
    const float* const init = tile.init ? tile.init + v * kLanes : nullptr;
    microkernel_amx<2, 2>(rows - height, half, count,
                          {init, tile.ld_init, tile.c + v * kLanes, tile.ldc, tile.accumulate});
  }
}

// gemm() for row-major A.
inline void gemm_amx(int rows, int vectors, const GemmOperands<bf16x2>* terms, int count,
                     COperand<float> tile) {
  for (int i = 0; i < count;) {
    // Batch the pairs whose k is whole tiles, and one more pair.
    int end = i;
    while (end + 1 < count && terms[end].k % kAmxK == 0) ++end;
    const GemmOperands<bf16x2>& last = terms[end++];
    const int64_t whole = amx_whole_k(last.k);
    if (whole || end - i > 1 || !last.k) {
      macrokernel_amx(rows, vectors, terms + i, end - i, tile);
      tile = tile.continued();
    }
    if (whole < last.k) {
      const GemmOperands<bf16x2> rest{last.a + whole / kKC * last.a_block_stride + whole % kKC,
                                      last.lda,
                                      1,
                                      last.k - whole,
                                      last.b + whole * last.ldb,
                                      last.ldb};
      if (whole) tile.init = nullptr, tile.accumulate = true;
      gemm_simd(rows, vectors, &rest, 1, tile);
      tile = tile.continued();
    }
    i = end;
  }
}

#endif

}  // namespace rnnkern::RNNKERN_ISA
