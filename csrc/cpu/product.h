// The register tile: the one matrix product that everything here is made of.
//
//   out[r][v] = init[r][v] + sum_s sum_k a_s[r, k] * b_s[k][v]
//
// for up to kTileRows rows r and up to kTileVectors vectors v of a packed panel b (pack.h), walked
// over a group of rows. The order of the sum depends on nothing else, so that a row's result is the
// same bit for bit whatever rows, tiles or threads surround it.
#pragma once
#include "simd.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
RNNKERN_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
RNNKERN_INLINE T greatest(T a, T b) {
  return a > b ? a : b;
}

// Consecutive rows with a stride.
template <class T>
struct RowsOf {
  T* data;
  int64_t stride;
  RNNKERN_INLINE T* operator[](int64_t r) const { return data + r * stride; }
};

// One term of a product. Row r of the left operand is a[r * row + k * col]; the panel has
// consecutive vectors for a k, and `panel_step` elements from one k to the next.
template <class T>
struct Term {
  const T* a;
  int64_t row, col;
  int64_t depth;  // number of k
  const T* b;
  int64_t panel_step;
};

// A row of vectors in memory per tile row. init may have stride 0 (a bias) or equal out.
template <class T>
struct Tile {
  const T* init;
  int64_t init_row;
  T* out;
  int64_t out_row;
};

// What a sum begins with that nothing is added to: init with stride 0.
template <class T>
constexpr T kZeroSums[kTileVectors * Vec<T>::kLanes] = {};

// Terms of a sum that are added up in registers before they join the rest: rounding errors then do
// not grow with the depth, and a panel's part of this depth stays in the first-level cache while
// all rows of a group are multiplied by it.
constexpr int64_t kSumBlock = 64;
constexpr int kGroupRows = 36;

// What a tile fetches into the second-level cache, a line per k, while it works from the first.
template <class T>
struct Ahead {
  const T* from;
  int64_t step;
};

// out = init + a b for a block of a term. With `add`, out += a b.
template <class T, int kRows, int kVectors>
__attribute__((noinline)) void tile_product(const Term<T>& term, const Tile<T>& tile, bool add,
                                            Ahead<T> ahead) {
  using V = Vec<T>;
  typename V::Raw sum[kRows][kVectors];
  const T* const init = tile.init;
  T* const out = tile.out;
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = typename V::Raw{};
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = V::load(init + r * tile.init_row + v * V::kLanes).v;
  }

  const T* rows[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = term.a + r * term.row;
  const T* b = term.b;
  const T* fetch = ahead.from;
  const int64_t panel_step = term.panel_step, depth = term.depth, col = term.col;
  const auto multiply = [&](int64_t at) __attribute__((always_inline)) {
    typename V::Raw bv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bv[v] = V::load(b + v * V::kLanes).v;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename V::Raw av = V(rows[r][at]).v;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += av * bv[v];
    }
    b += panel_step;
    __builtin_prefetch(fetch, 0, 2);
    fetch += ahead.step;
  };
  if (col == 1) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) multiply(k);
  } else {
    for (int64_t k = 0, at = 0; k < depth; ++k, at += col) multiply(at);
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* const to = out + r * tile.out_row + v * V::kLanes;
      if (add) sum[r][v] += V::load(to).v;
      V(sum[r][v]).store(to);
    }
}

template <class T>
using TileProduct = void (*)(const Term<T>&, const Tile<T>&, bool, Ahead<T>);

template <class T, int kRows>
constexpr TileProduct<T> kTileProductsOf[kTileVectors] = {
    tile_product<T, kRows, 1>, tile_product<T, kRows, 2>, tile_product<T, kRows, 3>,
    tile_product<T, kRows, 4>};

// Walks `rows` in parts of nearly equal size, at most kMost: f(first row, number of rows).
template <int kMost, class F>
RNNKERN_INLINE void for_parts(int64_t rows, F&& f) {
  int64_t parts = (rows + kMost - 1) / kMost;
  for (int64_t first = 0; parts > 0; --parts) {
    const int64_t n = (rows - first + parts - 1) / parts;
    f(first, int(n));
    first += n;
  }
}
template <class F>
RNNKERN_INLINE void for_row_groups(int64_t rows, F&& f) {
  for_parts<kGroupRows>(rows, f);
}

// What follows the block that begins with k: the panel's next lines, or, where the left operand is
// read by columns, its next rows, or the first ones of the next group.
template <class T>
RNNKERN_INLINE Ahead<T> next_block(const Term<T>& term, int rows, int64_t k) {
  const int64_t next = k + kSumBlock;
  if (term.col == 1) return {term.b + next * term.panel_step, kLine<T>};
  return {next < term.depth ? term.a + next * term.col : term.a + rows * term.row, term.col};
}

// The sum of `count` terms for a group of rows, and 1 to kTileVectors vectors: block by block of
// their depth, tile by tile.
template <class T>
void product(int rows, int vectors, const Term<T>* terms, int count, Tile<T> tile) {
  static_assert(kTileRows == 3 || kTileRows == 6);
  constexpr const TileProduct<T>* table[] = {
      kTileProductsOf<T, 1>, kTileProductsOf<T, 2>, kTileProductsOf<T, 3>,
#if defined(__AVX512F__)
      kTileProductsOf<T, 4>, kTileProductsOf<T, 5>, kTileProductsOf<T, 6>,
#endif
  };
  for (int i = 0; i < count; ++i) {
    const Term<T>& term = terms[i];
    for (int64_t k = 0; k == 0 || k < term.depth; k += kSumBlock) {
      Term<T> block = term;
      block.depth = least(kSumBlock, term.depth - k);
      block.b += k * term.panel_step;
      Ahead<T> ahead = next_block(term, rows, k);
      for_parts<kTileRows>(rows, [&](int64_t r, int n) {
        block.a = term.a + k * term.col + r * term.row;
        table[n - 1][vectors - 1](block,
                                  Tile<T>{tile.init + r * tile.init_row, tile.init_row,
                                          tile.out + r * tile.out_row, tile.out_row},
                                  k > 0, ahead);
        ahead.from += term.col == 1 ? kSumBlock * kLine<T> : kLine<T>;
      });
      tile.init = tile.out, tile.init_row = tile.out_row;
    }
  }
}

// Copies, or adds, a tile to memory; `columns` may be fewer than the tile's.
template <class T>
void add_tile(const T* tile, int width, int64_t rows, int64_t columns, T* out, int64_t stride,
              bool add) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < width && c < columns; c += Vec<T>::kLanes) {
      const int lanes = int(least<int64_t>(columns - c, Vec<T>::kLanes));
      T* const to = out + r * stride + c;
      Vec<T> value = Vec<T>::load(tile + r * width + c);
      if (add) value = Vec<T>::load(to, lanes) + value;
      value.store(to, lanes);
    }
}

}  // namespace rnnkern::RNNKERN_ISA
