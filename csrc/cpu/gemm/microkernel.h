// The microkernel: one register tile of C.
#pragma once
#include "prefetch.h"

namespace rnnkern::RNNKERN_ISA {

// What is added to sums that nothing is added to.
template <class T>
constexpr T kZeroTile[kMaxNR * Vec<T>::kLanes] = {};

// How many k a turn of the tile's loop takes: with few registers there is much else in a turn, but
// for one row, which waits for its sums.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int k_unroll(int rows) { return rows > 1 ? 4 : 1; }
#else
constexpr int k_unroll(int) { return 1; }
#endif

// Whether left operands stand in rows or in columns, and whether sums begin with init or zeros.
struct RowMajorA {
  static constexpr bool kByRows = true, kInit = false;
};
struct RowMajorAWithInit {
  static constexpr bool kByRows = true, kInit = true;
};
struct ColumnMajorA {
  static constexpr bool kByRows = false, kInit = false;
};

// The sum of `count` terms, for `tiles` tiles of kRows rows from `first` on. Several tiles to a
// call, as a call costs as much as ten k.
template <class F, class Kind, int kRows, int kVectors, int kFetch>
__attribute__((noinline)) void microkernel(const GemmOperands<F>* terms, int count, int64_t first,
                                           int tiles, const COperand<Acc<F>>& tile,
                                           const Prefetch<F>& ahead) {
  using T = Acc<F>;
  using V = Vec<T>;
  constexpr bool kByRows = Kind::kByRows, kInit = Kind::kInit;
  constexpr int kUnroll = k_unroll(kRows);
  T* out = tile.c + first * tile.ldc;
  const T* init = kInit ? tile.init + first * tile.ld_init : nullptr;
  const T* base = tile.accumulate ? out : kZeroTile<T>;  // no branch, which would cost more
  const int64_t base_row = tile.accumulate ? tile.ldc : 0;
  const F* from = ahead.from;
  for (; tiles > 0; --tiles, first += kRows) {
    typename V::Raw sum[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, init += kInit ? tile.ld_init : 0)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = kInit ? V::load(init + v * V::kLanes).v : typename V::Raw{};

    const F* fetch = from;
    from += ahead.tile_stride;
    for (const GemmOperands<F>* term = terms; term < terms + count; ++term) {
      const F* b = term->b;
      const int64_t ldb = term->ldb;
      const auto multiply = [&](auto a) __attribute__((always_inline)) {
        // The fewer operands wait in registers for the others, which come one by one.
        typename Vec<F>::Raw av[kRows], bv[kVectors];
        if constexpr (kRows <= kVectors) {
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) av[r] = Vec<F>(a(r)).v;
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            bv[v] = Vec<F>::load(b + v * V::kLanes).v;
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r)
              if constexpr (kRows == 1)
                fma_from_memory<F>(sum[r][v], av[r], bv[v]);
              else
                fma<F>(sum[r][v], av[r], bv[v]);
          }
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) bv[v] = Vec<F>::load(b + v * V::kLanes).v;
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) {
            av[r] = Vec<F>(a(r)).v;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) fma<F>(sum[r][v], av[r], bv[v]);
          }
        }
        b += ldb;
        asm("" : "+r"(b));  // one pointer, where the compiler would keep one for each k of a turn
#pragma GCC unroll 2
        for (int i = 0; i < kFetch; ++i) __builtin_prefetch(fetch + i * kLineElems<F>, 0, 2);
        if (kFetch) fetch += ahead.k_stride;
      };
      // Left operands that stand in rows have a pointer for four of them: there are not registers
      // enough for one each. In columns they follow each other.
      constexpr int kPointers = kByRows ? (kRows + 3) / 4 : 1;
      const int64_t row = term->lda, row3 = 3 * row, col = term->a_k_stride;
      // The first turn may be shorter: it is entered on the way.
      const uint64_t depth = term->k;
      uint64_t turns = (depth + kUnroll - 1) / kUnroll;
      const int64_t skipped = turns * kUnroll - depth;
      if (!turns) continue;
      const F* a[kPointers];
#pragma GCC unroll 3
      for (int i = 0; i < kPointers; ++i)
        a[i] = term->a + (first + 4 * i) * row - (kByRows ? skipped : 0);
      const auto advance = [&](int64_t step) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int i = 0; i < kPointers; ++i) {
          const F* next = a[i] + step;
          asm("" : "+r"(next));
          a[i] = next;
        }
      };
      const auto multiply_at = [&](int k) __attribute__((always_inline)) {
        multiply([&](int r) __attribute__((always_inline)) {
          if (!kByRows) return a[0][r];
          const F* four = a[r / 4] + k;
          return r % 4 == 3 ? four[row3] : four[r % 4 * row];
        });
        if (!kByRows) advance(col);
      };
      if constexpr (kUnroll == 4) {
        switch (skipped) {
          do {
            case 0: multiply_at(0); [[fallthrough]];
            case 1: multiply_at(1); [[fallthrough]];
            case 2: multiply_at(2); [[fallthrough]];
            case 3:
              multiply_at(3);
              if (kByRows) advance(kUnroll);
          } while (--turns > 0);
        }
      } else {
        do {
          multiply_at(0);
          if (kByRows) advance(1);
        } while (--turns > 0);
      }
    }

#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, base += base_row, out += tile.ldc)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        V(kInit ? sum[r][v] : V::load(base + v * V::kLanes).v + sum[r][v])
            .store(out + v * V::kLanes);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
