// The register tile on weights as they lie in memory, for calls too short to repay packing: the
// weights are read once, transposed in registers. Same sums in the same order as product.h.
#pragma once
#include "pack.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int kDirectRows = 4;
// Elements ahead of the sum that rows are fetched into the first-level cache.
constexpr int kAhead = 64;

// A sum over k in blocks of kSumBlock: all but the current block's part waits where the result will
// stand.
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

// One term: row r of the left operand is a + r * row; lane l of vector v is multiplied by the
// matrix row weight[v] + l * depth.
template <class T>
struct DirectTerm {
  const T* a;
  int64_t row, depth;
  const T* weight[kTileVectors];
};

template <class T, int kRows, int kVectors>
__attribute__((noinline)) void direct_tile(const DirectTerm<T>* terms, int count, int first,
                                           Tile<T> tile) {
  using V = Vec<T>;
  using Columns = Transposed<T>;
  typename V::Raw sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = V::load(tile.init + r * tile.init_row + (first + v) * V::kLanes).v;

  for (int i = 0; i < count; ++i) {
    const DirectTerm<T>& term = terms[i];
    const int64_t depth = term.depth;
    const BlockedSum<T, kRows, kVectors> total{tile.out + first * V::kLanes, tile.out_row};
    // A cache line of each row at a time: the lines of more rows, a power of two apart, could not
    // stay in the first-level cache together.
    int64_t k = 0;
    for (; k + Columns::kQuad <= depth;) {
      if (k % kSumBlock == 0) total.next_block(k, sum);
      const int64_t whole = depth - Columns::kQuad + 1;
      const int64_t end = least(k + kLine<T>, whole);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const T* weight = term.weight[first + v];
        for (int l = 0; l < V::kLanes; ++l)
          __builtin_prefetch(weight + l * depth + k + kAhead, 0, 3);
        for (int64_t q = k; q < end; q += Columns::kQuad) {
          typename V::Raw column[Columns::kQuad];
          Columns::load(weight + q, depth, column);
#pragma GCC unroll 4
          for (int j = 0; j < Columns::kQuad; ++j)
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r)
              sum[r][v] += V(term.a[r * term.row + q + j]).v * column[j];
        }
      }
      k += (end - k + Columns::kQuad - 1) / Columns::kQuad * Columns::kQuad;
    }
    for (; k < depth; ++k) {
      if (k % kSumBlock == 0) total.next_block(k, sum);
      for (int v = 0; v < kVectors; ++v) {
        T column[V::kLanes];
        for (int l = 0; l < V::kLanes; ++l) column[l] = term.weight[first + v][l * depth + k];
        for (int r = 0; r < kRows; ++r)
          sum[r][v] += V(term.a[r * term.row + k]).v * V::load(column).v;
      }
    }
    total.finish(depth, sum);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      V(sum[r][v]).store(tile.out + r * tile.out_row + (first + v) * V::kLanes);
}

// rows in 1..kGroupRows, vectors in 1..kTileVectors
template <class T>
RNNKERN_INLINE void direct_product(int rows, int vectors, const DirectTerm<T>* terms, int count,
                                   Tile<T> tile) {
  using Function = void (*)(const DirectTerm<T>*, int, int, Tile<T>);
  static constexpr Function one[] = {direct_tile<T, 1, 1>, direct_tile<T, 2, 1>,
                                     direct_tile<T, 3, 1>, direct_tile<T, 4, 1>};
  static constexpr Function two[] = {direct_tile<T, 1, 2>, direct_tile<T, 2, 2>,
                                     direct_tile<T, 3, 2>, direct_tile<T, 4, 2>};
  for (int r = 0; r < rows; r += kDirectRows) {
    const int n = rows - r < kDirectRows ? rows - r : kDirectRows;
    DirectTerm<T> shifted[2];
    for (int i = 0; i < count; ++i) {
      shifted[i] = terms[i];
      shifted[i].a += r * terms[i].row;
    }
    const Tile<T> part{tile.init + r * tile.init_row, tile.init_row, tile.out + r * tile.out_row,
                       tile.out_row};
    for (int v = 0; v < vectors; v += 2)
      (vectors - v >= 2 ? two : one)[n - 1](shifted, count, v, part);
  }
}

}  // namespace rnnkern::RNNKERN_ISA
