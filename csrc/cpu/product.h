// The register tile: the one matrix product that everything here is made of.
//
//   out[r][v] = init[r][v] + sum_s sum_k a_s[r, k] * b_s[k][v]
//
// for a few rows r and up to kTileVectors vectors v of a packed panel b (pack.h), walked over a
// group of rows. The order of the sum depends on nothing else, so that a row's result is the same
// bit for bit whatever rows, tiles or threads surround it.
#pragma once
#include <utility>

#include "matrix_registers.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
RNNKERN_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
RNNKERN_INLINE T max(T a, T b) {
  return a > b ? a : b;
}

// Consecutive rows with a stride.
template <class T>
struct StridedRows {
  T* data;
  int64_t stride;
  RNNKERN_INLINE T* operator[](int64_t r) const { return data + r * stride; }
};

// Terms of a sum that are added up in registers before they join the rest: rounding errors then do
// not grow with the depth, and a panel's part of this depth stays in the first-level cache while
// all rows of a group are multiplied by it.
constexpr int64_t kKC = 64;
// The last block may be longer instead of being followed by a short one, as each costs the loads,
// additions and stores of a tile.
constexpr int64_t kMaxLastKC = 80;

// The depth of the block with which `left` of a term's depth begins.
RNNKERN_INLINE int64_t next_kc(int64_t left) { return left <= kMaxLastKC ? left : kKC; }

// A matrix whose columns may stand in blocks: of row r, column c is data[r * row + c / kSumBlock *
// block + c % kSumBlock]. In rows of one piece block is kSumBlock; else blocks are whole.
template <class T>
struct BlockedMatrix {
  T* data;
  int64_t ld, block_stride;
  RNNKERN_INLINE T* at(int64_t r, uint64_t c) const {  // unsigned: quotients are shifts
    return data + r * ld + c / kKC * block_stride + c % kKC;
  }
  // From row r, and from column c on, with which a block begins.
  BlockedMatrix at_row(int64_t r, int64_t c) const { return {at(r, c), ld, block_stride}; }
  operator BlockedMatrix<const T>() const { return {data, ld, block_stride}; }
  bool is_blocked() const { return block_stride != kKC; }
};

// One term of a product, of factors F: depth, rows and columns count these. Row r of the left
// operand is a[r * row + k * col], where row or col is 1; the panel has consecutive vectors for a
// k, and `panel_step` elements from one k to the next.
template <class F>
struct GemmOperands {
  const F* a;
  int64_t lda, a_k_stride;
  int64_t k;  // number of k
  const F* b;
  int64_t ldb;
  int64_t a_block_stride = kKC;  // from a[r, k] to a[r, k + kSumBlock] where col is 1
  bool prefetch_b = false;       // whether blocks must be fetched into the second-level cache
  const F* next_b = nullptr;  // what to fetch there at the end: the first block of what comes next
};

// A row of vectors in memory per tile row. Sums begin with init, which may equal out, or with
// zeros if it is null, and with `add` they are added to out.
template <class T>
struct COperand {
  const T* init;
  int64_t ld_init;
  T* c;
  int64_t ldc;
  bool accumulate = false;

  // What sums begin with that have no registers of their own; null if with zeros.
  StridedRows<const T> start() const {
    return accumulate ? StridedRows<const T>{c, ldc} : StridedRows<const T>{init, ld_init};
  }
  // Where further terms go on.
  COperand continued() const { return {c, ldc, c, ldc}; }
};

// What is added to sums that nothing is added to.
template <class T>
constexpr T kZeroTile[kMaxNR * Vec<T>::kLanes] = {};

constexpr int kMC = kHasAmx ? 32 : 36;  // that go through a panel's block in turn
constexpr int kMaxBatch = 4;

// What the first `tiles` tiles of a block fetch into the second-level cache while they work from
// the first: so many lines per k. No more than needed, as each takes a load's place.
template <class F>
struct Prefetch {
  const F* from;
  int64_t k_stride, tile_stride;  // from one k, and from one tile, to the next
  int lines, tiles;
};
constexpr int kMaxPrefetchLines = 2;

// Rows of a tile: the fewer vectors, the more rows, since a tile loads a value per row and a vector
// per vector for rows times vectors multiply-adds.
constexpr int max_mr(int vectors) { return kAccumulators / (vectors > 1 ? vectors : 2); }

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

template <class F, int kMost>
struct MicrokernelTable {
  void (*of_rows[1 + kMaxPrefetchLines][kMost])(const GemmOperands<F>*, int, int64_t, int,
                                                const COperand<Acc<F>>&, const Prefetch<F>&);
};

// Walks `rows` in parts of nearly equal size, at most kMost: f(first row, number of rows).
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

// A block of a term's depth.
template <class F>
RNNKERN_INLINE GemmOperands<F> block_of(const GemmOperands<F>& term, int64_t k) {
  const int64_t at = term.a_k_stride == 1 ? k / kKC * term.a_block_stride : k * term.a_k_stride;
  return {term.a + at,           term.lda, term.a_k_stride, next_kc(term.k - k),
          term.b + k * term.ldb, term.ldb};
}

// What to fetch during a block before the one that begins with `next`: the panel's next lines or,
// where the left operand is read by columns, its next rows.
template <class F>
RNNKERN_INLINE Prefetch<F> prefetch_before(const GemmOperands<F>& term, int rows, int vectors,
                                           int64_t next) {
  const F* from = term.next_b;
  if (next < term.k)
    from = !term.prefetch_b       ? nullptr
           : term.a_k_stride == 1 ? term.b + next * term.ldb
                                  : term.a + next * term.a_k_stride;
  if (!from) return {};
  if (term.a_k_stride == 1) {
    // Lines for each k, and how many of them a tile fetches where there are few tiles.
    const int wanted = int((vectors * Vec<F>::kLanes + kLineElems<F> - 1) / kLineElems<F>);
    const int lines = rows > (wanted - 1) * max_mr(vectors) ? 1 : kMaxPrefetchLines;
    return {from, lines * kLineElems<F>, kKC * lines * kLineElems<F>, lines,
            (wanted + lines - 1) / lines};
  }
  const int begin = int(reinterpret_cast<uintptr_t>(from) / sizeof(F) % kLineElems<F>);
  return {from, term.a_k_stride, kLineElems<F>, 1,
          int((begin + rows + kLineElems<F> - 1) / kLineElems<F>)};
}

// The tiles of one block of the depth for a group of rows.
template <class F, class Kind, int kVectors>
void macrokernel(int rows, const GemmOperands<F>* terms, int count, const COperand<Acc<F>>& tile,
                 Prefetch<F> ahead) {
  constexpr int kMost = max_mr(kVectors);
  static constexpr auto table = []<int... n>(std::integer_sequence<int, n...>) {
    return MicrokernelTable<F, kMost>{{{microkernel<F, Kind, n + 1, kVectors, 0>...},
                                       {microkernel<F, Kind, n + 1, kVectors, 1>...},
                                       {microkernel<F, Kind, n + 1, kVectors, 2>...}}};
  }(std::make_integer_sequence<int, kMost>());
  // Tiles of nearly equal height: some, and some that are a row less high.
  const int tiles = (rows + kMost - 1) / kMost;
  const int height = tiles == 1 ? rows : (rows + tiles - 1) / tiles;
  const int high = rows - tiles * (height - 1);
  int64_t first = 0;
  const auto run = [&](int height, int tiles) {
    while (tiles > 0) {
      const int n = ahead.tiles > 0 ? min(tiles, ahead.tiles) : tiles;
      table.of_rows[ahead.tiles > 0 ? ahead.lines : 0][height - 1](terms, count, first, n, tile,
                                                                   ahead);
      first += n * height, tiles -= n;
      ahead.tiles -= n, ahead.from += n * ahead.tile_stride;
    }
  };
  run(height, high);
  run(height - 1, tiles - high);
}

// A product (matrix_product.h) in vectors: block by block of the depth, tile by tile. Terms of one
// block each go through the tiles together.
template <class F>
void gemm_simd(int rows, int vectors, const GemmOperands<F>* terms, int count,
               COperand<Acc<F>> tile) {
  const auto multiply = [&](const GemmOperands<F>* blocks, int n, const Prefetch<F>& ahead) {
    const auto of_kind = [&]<class Kind>(Kind) {
      using Macrokernel =
          void (*)(int, const GemmOperands<F>*, int, const COperand<Acc<F>>&, Prefetch<F>);
      static constexpr Macrokernel of_vectors[kMaxNR] = {
          macrokernel<F, Kind, 1>, macrokernel<F, Kind, 2>, macrokernel<F, Kind, 3>,
          macrokernel<F, Kind, 4>};
      of_vectors[vectors - 1](rows, blocks, n, tile, ahead);
    };
    if (blocks[0].a_k_stride != 1)
      of_kind(ColumnMajorA());
    else if (tile.init)
      of_kind(RowMajorAWithInit());
    else
      of_kind(RowMajorA());
  };
  for (int i = 0; i < count;) {
    GemmOperands<F> blocks[kMaxBatch];
    int n = 0;
    do blocks[n] = block_of(terms[i], 0);
    while (blocks[n++].k == terms[i++].k && i < count);
    const GemmOperands<F>& last = terms[i - 1];
    int64_t next = blocks[n - 1].k;
    multiply(blocks, n, prefetch_before(last, rows, vectors, next));
    tile.init = nullptr, tile.accumulate = true;
    while (next < last.k) {
      const GemmOperands<F> block = block_of(last, next);
      next += block.k;
      multiply(&block, 1, prefetch_before(last, rows, vectors, next));
    }
    tile = tile.continued();
  }
}

// Copies, or adds, a tile to memory; `columns` may be fewer than the tile's.
template <class T>
void write_tile(const T* tile, int width, int64_t rows, int64_t columns, T* out, int64_t stride,
                bool add) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < width && c < columns; c += Vec<T>::kLanes) {
      const int lanes = int(min<int64_t>(columns - c, Vec<T>::kLanes));
      T* const to = out + r * stride + c;
      Vec<T> value = Vec<T>::load(tile + r * width + c);
      if (add) value = Vec<T>::load(to, lanes) + value;
      value.store(to, lanes);
    }
}

}  // namespace rnnkern::RNNKERN_ISA
