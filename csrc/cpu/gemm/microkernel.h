// The microkernel: one register tile of C, MR rows by NR vectors.
//
//                      row k of the panel B: NR vectors
//                     b[0]       b[1]          b[NR-1]
//                  +----------+----------+---+----------+
//   A[0, k]    ->  | acc 0,0  | acc 0,1  |...|          |    For each k, fma_step broadcasts MR
//   A[1, k]    ->  | acc 1,0  |          |   |          |    scalars of A, loads NR vectors of B
//     ...          |                                    |    and runs MR * NR FMAs.
//   A[MR-1, k] ->  | acc MR-1,0          |   |          |
//                  +----------+----------+---+----------+
//
//   tile          MR x NR   accumulators + A + B, of registers
//   AVX-512       6 x 4     24 + 1 + 4, of 32
//   NEON          6 x 4     24 + 6 + 2, of 32     (A: a register has 16 bytes of a row)
//   AVX2, SSE2    3 x 4     12 + 3 + 1, of 16
//
// load_c fills the accumulators, k_loop runs over one operand pair, store_c writes C.
#pragma once
#include "prefetch.h"

namespace rnnkern::RNNKERN_ISA {

// Added to a C without beta: cheaper than a branch.
template <class T>
constexpr T kZeroTile[kMaxNR * Vec<T>::kLanes] = {};

// k-unroll: 4 on AVX2 to amortise loop overhead; 1 for MR = 1, which is latency-bound.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int k_unroll(int mr) { return mr > 1 ? 4 : 1; }
#else
constexpr int k_unroll(int) { return 1; }
#endif

// Variants of the microkernel: A's layout, whether the accumulators begin with C's init, and
// whether a row of B has two k in bfloat16, the first in the lower halves.
struct RowMajorA {
  static constexpr bool kRowMajor = true, kInit = false, kBf16B = false;
};
struct RowMajorAWithInit {
  static constexpr bool kRowMajor = true, kInit = true, kBf16B = false;
};
struct ColumnMajorA {
  static constexpr bool kRowMajor = false, kInit = false, kBf16B = false;
};
template <class Variant>
struct WithBf16B : Variant {
  static constexpr bool kBf16B = true;
};

// Keeps a pointer in one register: the compiler would keep a copy for each unrolled k.
template <class F>
RNNKERN_INLINE void pin(const F*& pointer) {
  asm("" : "+r"(pointer));
}

// Reads A[r, k] of MR rows at the current k.
template <class F, class Variant, int MR>
class ACursor {
  // Row-major: one pointer for four rows, as there are too few general registers for one each.
  static constexpr int kPointers = Variant::kRowMajor ? (MR + 3) / 4 : 1;
  const F* a_[kPointers];
  const int64_t lda_, lda3_, k_stride_;

 public:
  RNNKERN_INLINE ACursor(const GemmOperands<F>& ab, int64_t row)
      : lda_(ab.lda),
        lda3_(3 * ab.lda),
        k_stride_(ab.a_k_stride) {
#pragma GCC unroll 3
    for (int i = 0; i < kPointers; ++i) a_[i] = ab.a + (row + 4 * i) * lda_;
  }

  // Row r, k steps ahead. Column-major A allows k = 0 only.
  RNNKERN_INLINE const F* address(int r, int k) const {
    if (!Variant::kRowMajor) return a_[0] + r;
    const F* four = a_[r / 4] + k;
    return r % 4 == 3 ? four + lda3_ : four + r % 4 * lda_;
  }
  RNNKERN_INLINE F at(int r, int k) const { return *address(r, k); }

  RNNKERN_INLINE void advance(int steps) {
#pragma GCC unroll 3
    for (int i = 0; i < kPointers; ++i) {
      const F* next = a_[i] + (Variant::kRowMajor ? steps : k_stride_);
      pin(next);
      a_[i] = next;
    }
  }
};

template <class F, class Variant, int MR, int NR, int kPrefetchLines>
class RegisterTile {
  using T = Acc<F>;
  using V = Vec<T>;
  static constexpr int kUnroll = k_unroll(MR);
  typename V::Raw acc_[MR][NR];

 public:
  // acc = init, or zero. Leaves init at the next tile.
  RNNKERN_INLINE void load_c(const T*& init, int64_t ld) {
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r, init += Variant::kInit ? ld : 0)
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v)
        acc_[r][v] = Variant::kInit ? V::load(init + v * V::kLanes).v : typename V::Raw{};
  }

  // acc += A B of one k. The operand with fewer registers waits for the other, which streams.
  template <class AtRow>
  RNNKERN_INLINE void fma_step(AtRow a, const F* b) {
    typename Vec<F>::Raw av[MR], bv[NR];
    if constexpr (MR <= NR) {
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) av[r] = Vec<F>(a(r)).v;
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) {
        bv[v] = Vec<F>::load(b + v * V::kLanes).v;
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
          if constexpr (MR == 1)
            fma_from_memory<F>(acc_[r][v], av[r], bv[v]);
          else
            fma<F>(acc_[r][v], av[r], bv[v]);
      }
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v) bv[v] = Vec<F>::load(b + v * V::kLanes).v;
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        av[r] = Vec<F>(a(r)).v;
#pragma GCC unroll 4
        for (int v = 0; v < NR; ++v) fma<F>(acc_[r][v], av[r], bv[v]);
      }
    }
  }

  // acc += A B of the first or the second k in a row of bfloat16, widened on the way: the sums are
  // those of float32 weights with the same values.
  template <bool kSecond, class AtRow>
  RNNKERN_INLINE void fma_step_bf16(AtRow a, const F* b) {
    typename Vec<F>::Raw av[MR];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) av[r] = Vec<F>(a(r)).v;
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) {
      const auto bits = Vec<F>::load(b + v * V::kLanes).bits();
      const auto wide = V::from_bits(kSecond ? bits & ~0xFFFF : bits << 16).v;
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) fma<F>(acc_[r][v], av[r], wide);
    }
  }

#if defined(RNNKERN_NEON)
  // fma_step_bf16 of both k, with A's scalars in lanes.
  RNNKERN_INLINE void fma_pair_bf16(const ACursor<F, Variant, MR>& a, const F* b) {
    typename Vec<F>::Raw av[MR];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) av[r] = Vec<F>::template load_first<2>(a.address(r, 0)).v;
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) {
      const auto bits = Vec<F>::load(b + v * V::kLanes).bits();
      const auto first = V::from_bits(bits << 16).v;
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) fma_lane<F, 0>(acc_[r][v], av[r], first);
      const auto second = V::from_bits(bits & ~0xFFFF).v;
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) fma_lane<F, 1>(acc_[r][v], av[r], second);
    }
  }
#endif

  RNNKERN_INLINE void k_loop_bf16(const GemmOperands<F>& ab, int64_t row) {
    ACursor<F, Variant, MR> a(ab, row);
    const F* b = ab.b;
    const auto at = [&](int k) __attribute__((always_inline)) {
      return [&, k](int r) __attribute__((always_inline)) { return a.at(r, k); };
    };
    // Prefetches the panel's next block to the L1: with twice the instructions per byte, too few
    // loads are under way otherwise.
    const int64_t next_block = kKC * ab.ldb;
    int64_t left = ab.k;
    for (; left > 1; left -= 2) {
#pragma GCC unroll 4
      for (int i = 0; i < NR * V::kLanes; i += kLineElems<F>)
        __builtin_prefetch(b + next_block + i, 0, 3);
#if defined(RNNKERN_NEON)
      fma_pair_bf16(a, b);
#else
      fma_step_bf16<false>(at(0), b);
      fma_step_bf16<true>(at(1), b);
#endif
      b += 2 * ab.ldb;
      pin(b);
      a.advance(2);
    }
    if (left) fma_step_bf16<false>(at(0), b);
  }

  // To the next k of B; prefetches kPrefetchLines.
  RNNKERN_INLINE static void next_k(const F*& b, int64_t ldb, const F*& line,
                                    int64_t prefetch_stride) {
    b += ldb;
    pin(b);
#pragma GCC unroll 2
    for (int i = 0; i < kPrefetchLines; ++i) __builtin_prefetch(line + i * kLineElems<F>, 0, 2);
    if (kPrefetchLines) line += prefetch_stride;
  }

#if defined(RNNKERN_NEON)
  // acc += A B of one k, with A's scalars in lanes. Row-major: a[r] has kLanes k of row r, and this
  // one is kLane. Column-major: the registers have kLanes rows each.
  template <int kLane>
  RNNKERN_INLINE void fma_lanes(const typename Vec<F>::Raw* a, const F* b) {
    constexpr int kLanes = Vec<F>::kLanes;
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) {
      const auto bv = Vec<F>::load(b + v * kLanes).v;
      for_each_of<MR>([&](auto r) __attribute__((always_inline)) {
        if constexpr (Variant::kRowMajor)
          fma_lane<F, kLane>(acc_[r][v], a[r], bv);
        else
          fma_lane<F, r % kLanes>(acc_[r][v], a[r / kLanes], bv);
      });
    }
  }

  // k_loop() by lanes: `next` follows each k. Returns the number of k that are left over.
  template <class Next>
  RNNKERN_INLINE int64_t k_loop_lanes(int64_t k, ACursor<F, Variant, MR>& a, const F*& b,
                                      Next next) {
    constexpr int kLanes = Vec<F>::kLanes;
    if constexpr (Variant::kRowMajor) {
      for (; k >= kLanes; k -= kLanes) {
        typename Vec<F>::Raw av[MR];
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) av[r] = Vec<F>::load(a.address(r, 0)).v;
        a.advance(kLanes);
        for_each_of<kLanes>([&](auto lane) __attribute__((always_inline)) {
          fma_lanes<lane>(av, b);
          next();
        });
      }
    } else {
      for (; k > 0; --k) {
        typename Vec<F>::Raw av[(MR + kLanes - 1) / kLanes];
        for_each_of<(MR + kLanes - 1) / kLanes>([&](auto i) __attribute__((always_inline)) {
          constexpr int kFirst = i * kLanes, kRows = MR - kFirst < kLanes ? MR - kFirst : kLanes;
          av[i] = Vec<F>::template load_first<kRows>(a.address(kFirst, 0)).v;
        });
        a.advance(1);
        fma_lanes<0>(av, b);
        next();
      }
    }
    return k;
  }
#endif

  // acc += A B of one operand pair, for MR rows from `row` on. Prefetches kPrefetchLines per k.
  RNNKERN_INLINE void k_loop(const GemmOperands<F>& ab, int64_t row, const F*& line,
                             int64_t prefetch_stride) {
    if constexpr (Variant::kBf16B) return k_loop_bf16(ab, row);
    ACursor<F, Variant, MR> a(ab, row);
    const F* b = ab.b;
    const auto step = [&](int k) __attribute__((always_inline)) {
      fma_step([&](int r) __attribute__((always_inline)) { return a.at(r, k); }, b);
      next_k(b, ab.ldb, line, prefetch_stride);
    };
    int64_t left = ab.k;
#if defined(RNNKERN_NEON)
    left = k_loop_lanes(left, a, b, [&]() __attribute__((always_inline)) {
      next_k(b, ab.ldb, line, prefetch_stride);
    });
#endif
    for (int64_t tail = left % kUnroll; tail > 0; --tail, --left) step(0), a.advance(1);
    for (; left > 0; left -= kUnroll) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) {
        step(Variant::kRowMajor ? k : 0);
        if (!Variant::kRowMajor) a.advance(1);
      }
      if (Variant::kRowMajor) a.advance(kUnroll);
    }
  }

  // C = acc + base; without kInit, base is C or zeros. Leaves both at the next tile.
  RNNKERN_INLINE void store_c(T*& c, int64_t ldc, const T*& base, int64_t ld_base) const {
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r, base += ld_base, c += ldc)
#pragma GCC unroll 4
      for (int v = 0; v < NR; ++v)
        V(Variant::kInit ? acc_[r][v] : V::load(base + v * V::kLanes).v + acc_[r][v])
            .store(c + v * V::kLanes);
  }
};

// `tiles` register tiles from `row` on, over `count` operand pairs. Several tiles per call: a call
// costs as much as ten k.
template <class F, class Variant, int MR, int NR, int kPrefetchLines>
__attribute__((noinline)) void microkernel(const GemmOperands<F>* pairs, int count, int64_t row,
                                           int tiles, const COperand<Acc<F>>& operand,
                                           const Prefetch<F>& prefetch) {
  using T = Acc<F>;
  constexpr bool kInit = Variant::kInit;
  T* c = operand.c + row * operand.ldc;
  const T* init = kInit ? operand.init + row * operand.ld_init : nullptr;
  const T* base = operand.accumulate ? c : kZeroTile<T>;
  const int64_t ld_base = operand.accumulate ? operand.ldc : 0;
  const F* from = prefetch.from;
  for (; tiles > 0; --tiles, row += MR) {
    RegisterTile<F, Variant, MR, NR, kPrefetchLines> tile;
    tile.load_c(init, operand.ld_init);
    const F* line = from;
    from += prefetch.tile_stride;
    for (const GemmOperands<F>* ab = pairs; ab < pairs + count; ++ab)
      tile.k_loop(*ab, row, line, prefetch.k_stride);
    tile.store_c(c, operand.ldc, base, ld_base);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
