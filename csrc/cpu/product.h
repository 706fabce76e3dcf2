// The register tile: the one matrix product that everything here is made of.
//
//   out[r][v] = init[r][v] + sum_s sum_k a_s[r, k] * b_s[k][v]
//
// for up to kTileRows rows r and up to kTileVectors vectors v of a packed panel b (pack.h). Each
// term is summed in blocks of kSumBlock, which keeps rounding errors from growing with its depth.
// The order of the sum depends on nothing else, so that a row's result is the same bit for bit
// whatever rows, tiles or threads surround it.
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

// A sum over k in blocks: all but the current block's part waits where the result will stand.
constexpr int64_t kSumBlock = 64;

template <class T, int kRows, int kVectors>
struct BlockedSum {
  using V = Vec<T>;
  T* out;
  int64_t out_row;

  // Before the block that begins with k.
  RNNKERN_INLINE void next_block(int64_t k, typename V::Raw (&sum)[kRows][kVectors]) const {
    if (k == 0) return;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* const waiting = out + r * out_row + v * V::kLanes;
        if (k > kSumBlock) sum[r][v] += V::load(waiting).v;
        V(sum[r][v]).store(waiting);
        sum[r][v] = typename V::Raw{};
      }
  }
  RNNKERN_INLINE void finish(int64_t depth, typename V::Raw (&sum)[kRows][kVectors]) const {
    if (depth <= kSumBlock) return;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += V::load(out + r * out_row + v * V::kLanes).v;
  }
};

template <class T, int kRows, int kVectors>
__attribute__((noinline)) void tile_product(const Term<T>* terms, int count, Tile<T> tile) {
  using V = Vec<T>;
  typename V::Raw sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = V::load(tile.init + r * tile.init_row + v * V::kLanes).v;

  for (int i = 0; i < count; ++i) {
    const Term<T> term = terms[i];
    const T* rows[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) rows[r] = term.a + r * term.row;
    const T* b = term.b;
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
      b += term.panel_step;
    };
    BlockedSum<T, kRows, kVectors> total{tile.out, tile.out_row};
    for (int64_t k = 0, at = 0; k < term.depth;) {
      total.next_block(k, sum);
      const int64_t end = k + kSumBlock < term.depth ? k + kSumBlock : term.depth;
      if (term.col == 1) {
#pragma GCC unroll 2
        for (; k < end; ++k) multiply(k);
      } else {
        for (; k < end; ++k, at += term.col) multiply(at);
      }
    }
    total.finish(term.depth, sum);
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      V(sum[r][v]).store(tile.out + r * tile.out_row + v * V::kLanes);
}

template <class T>
using TileProduct = void (*)(const Term<T>*, int, Tile<T>);

template <class T, int kRows>
constexpr TileProduct<T> kTileProductsOf[kTileVectors] = {
    tile_product<T, kRows, 1>, tile_product<T, kRows, 2>, tile_product<T, kRows, 3>,
    tile_product<T, kRows, 4>};

// rows in 1..kTileRows, vectors in 1..kTileVectors
template <class T>
RNNKERN_INLINE void product(int rows, int vectors, const Term<T>* terms, int count, Tile<T> tile) {
  static_assert(kTileRows == 3 || kTileRows == 6);
  constexpr const TileProduct<T>* table[] = {
      kTileProductsOf<T, 1>, kTileProductsOf<T, 2>, kTileProductsOf<T, 3>,
#if defined(__AVX512F__)
      kTileProductsOf<T, 4>, kTileProductsOf<T, 5>, kTileProductsOf<T, 6>,
#endif
  };
  table[rows - 1][vectors - 1](terms, count, tile);
}

// Walks `rows` in tiles of nearly equal size: f(first row, number of rows).
template <class F>
RNNKERN_INLINE void for_row_tiles(int64_t rows, F&& f) {
  int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t first = 0; tiles > 0; --tiles) {
    const int64_t n = (rows - first + tiles - 1) / tiles;
    f(first, int(n));
    first += n;
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
