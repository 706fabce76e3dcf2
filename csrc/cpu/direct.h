// The register tile on weights as they lie in memory, for calls too short to repay packing: the
// weights are read once, transposed in registers. Same sums in the same order as product.h.
#pragma once
#include "pack.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int kDirectRows = 4;

// One term: row r of the left operand is a + r * row; lane l of vector v is multiplied by the
// matrix row weight[v] + l * depth.
template <class F>
struct DirectTerm {
  const F* a;
  int64_t row, depth;
  const F* weight[kTileVectors];
  int64_t first = 0;  // k with which the sum begins; what comes before it has been added up
};

// What to fetch in each of a vector's rows during the block before `next`: the one that begins
// there, or the first of the next vector's rows.
template <class F>
RNNKERN_INLINE const F* fetched_before(const F* weight, int64_t depth, int64_t next) {
  return weight + (next < depth ? next : next - depth + Vec<F>::kLanes * depth);
}

// total += the product of a and one vector's rows, over the n <= kLastBlock elements from k on: a
// sum of its own, or one that begins with the total.
template <class F, int kRows>
RNNKERN_INLINE void add_block(const F* a, int64_t row, const F* weight, int64_t depth, int64_t k,
                              int64_t n, bool own, typename Vec<Sum<F>>::Raw (&total)[kRows]) {
  using V = Vec<Sum<F>>;
  using Columns = Transposed<F>;
  typename V::Raw sum[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r] = own ? typename V::Raw{} : total[r];
  const F* const ahead = fetched_before(weight, depth, k + n);
  a += k, weight += k;
  constexpr int kTurns = kLine<F> / Columns::kColumns;  // in which a line is read
  int64_t q = 0;
  for (; q + Columns::kColumns <= n; q += Columns::kColumns) {
    for (int l = q / Columns::kColumns % kTurns; l < V::kLanes; l += kTurns)
      __builtin_prefetch(ahead + l * depth + q, 0, 3);
    typename Vec<F>::Raw column[Columns::kColumns];
    Columns::load(weight + q, depth, column);
#pragma GCC unroll 8
    for (int j = 0; j < Columns::kColumns; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        add_product<F>(sum[r], Vec<F>(a[r * row + q + j]).v, column[j]);
  }
  for (; q < n; ++q) {
    F column[V::kLanes];
    for (int l = 0; l < V::kLanes; ++l) column[l] = weight[l * depth + q];
    for (int r = 0; r < kRows; ++r)
      add_product<F>(sum[r], Vec<F>(a[r * row + q]).v, Vec<F>::load(column).v);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) total[r] = own ? total[r] + sum[r] : sum[r];
}

// Vector v of the sums.
template <class F, int kRows>
__attribute__((noinline)) void direct_tile(const DirectTerm<F>* terms, int count, int v,
                                           Tile<Sum<F>> tile) {
  using V = Vec<Sum<F>>;
  const RowsOf<const Sum<F>> init = tile.begin();
  typename V::Raw total[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    total[r] = init.data ? V::load(init[r] + v * V::kLanes).v : typename V::Raw{};
  for (const DirectTerm<F>* t = terms; t < terms + count; ++t)
    for (int64_t k = t->first, n; k < t->depth; k += n) {
      n = block_depth(t->depth - k);
      add_block<F, kRows>(t->a, t->row, t->weight[v], t->depth, k, n, k || (tile.add && t == terms),
                          total);
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) V(total[r]).store(tile.out + r * tile.out_row + v * V::kLanes);
}

#if defined(RNNKERN_AMX)

// The whole blocks of a term's depth, for at most kDirectRows rows. The weights are the left
// operand, as they lie, and the rows become the columns of a panel.
inline void direct_matrix_blocks(int rows, int vectors, const DirectTerm<BfloatPair>& term,
                                 const Tile<float>& tile) {
  using M = MatrixRegisters;
  constexpr int kLanes = Vec<float>::kLanes, kLeft = kTileVectors;
  alignas(64) float sums[kTileVectors][kLanes][kLanes] = {};
  const RowsOf<const float> init = tile.begin();
  for (int r = 0; init.data && r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      for (int l = 0; l < kLanes; ++l) sums[v][l][r] = init[r][v * kLanes + l];
  M::set_rows(kLanes);
  const auto each_vector = [&](auto f) __attribute__((always_inline)) {
    for_each_of<kTileVectors>([&](auto v) __attribute__((always_inline)) {
      if (v < vectors) f(v);
    });
  };
  each_vector([&](auto v)
                  __attribute__((always_inline)) { M::load<v>(sums[v][0], sizeof sums[v][0]); });
  const int64_t row = term.depth * sizeof(BfloatPair);
  alignas(64) BfloatPair panel[kMatrixDepth * kDirectRows + kLanes] = {};
  for (int64_t k = 0; k < whole_blocks(term.depth); k += kMatrixDepth) {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kMatrixDepth; ++i) panel[i * rows + r] = term.a[r * term.row + k + i];
    M::load<kPanelRegister>(panel, rows * sizeof(BfloatPair));
    each_vector([&](auto v) __attribute__((always_inline)) {
      const BfloatPair* const ahead = fetched_before(term.weight[v], term.depth, k + kSumBlock);
      for (int l = 0; l < kLanes; ++l) __builtin_prefetch(ahead + l * term.depth, 0, 3);
      M::load<kLeft>(term.weight[v] + k, row);
      M::multiply<v, kLeft>();
    });
  }
  each_vector([&](auto v)
                  __attribute__((always_inline)) { M::store<v>(sums[v][0], sizeof sums[v][0]); });
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      for (int l = 0; l < kLanes; ++l) tile.out[r * tile.out_row + v * kLanes + l] = sums[v][l][r];
}

#endif

// The same for more rows: block by block of the depth the weights are transposed once for all of
// them, into the first-level cache.
template <class F>
void direct_blocks(int rows, int vectors, const DirectTerm<F>* terms, int count,
                   Tile<Sum<F>> tile) {
  constexpr int kLanes = Vec<F>::kLanes;
  alignas(64) F block[kLastBlock * kTileVectors * kLanes];
  const int64_t step = vectors * kLanes;
  for (const DirectTerm<F>* term = terms; term < terms + count; ++term) {
    int64_t k = 0, n;
    do {
      n = block_depth(term->depth - k);
      for (int v = 0; v < vectors; ++v) {
        const F* const weight = term->weight[v];
        const F* const ahead = fetched_before(weight, term->depth, k + n);
        for (int l = 0; l < kLanes; ++l)
          for (int64_t i = 0; i < n; i += kLine<F>)
            __builtin_prefetch(ahead + l * term->depth + i, 0, 3);
        pack_transposed(weight + k, term->depth, kLanes, n, block + v * kLanes, step, false);
      }
      const Term<F> part{term->a + k, term->row, 1, n, block, step};
      vector_product(rows, vectors, &part, 1, tile);
      tile.init = nullptr, tile.add = true;
    } while ((k += n) < term->depth);
    tile = tile.further();
  }
}

// rows in 1..kGroupRows, vectors in 1..kTileVectors
template <class F>
RNNKERN_INLINE void direct_product(int rows, int vectors, const DirectTerm<F>* terms, int count,
                                   Tile<Sum<F>> tile) {
  using Function = void (*)(const DirectTerm<F>*, int, int, Tile<Sum<F>>);
  static constexpr Function of_rows[kDirectRows] = {direct_tile<F, 1>, direct_tile<F, 2>,
                                                    direct_tile<F, 3>, direct_tile<F, 4>};
  if constexpr (std::is_same_v<F, Sum<F>>)
    if (rows > 2 * kDirectRows) return direct_blocks(rows, vectors, terms, count, tile);
  for (int r = 0; r < rows; r += kDirectRows) {
    const int n = rows - r < kDirectRows ? rows - r : kDirectRows;
    DirectTerm<F> shifted[2];
    for (int i = 0; i < count; ++i) {
      shifted[i] = terms[i];
      shifted[i].a += r * terms[i].row;
    }
    Tile<Sum<F>> part = tile;
    if (tile.init) part.init += r * tile.init_row;
    part.out += r * tile.out_row;
#if defined(RNNKERN_AMX)
    // Term by term, in the order of matrix_product().
    for (DirectTerm<F>* term = shifted; term < shifted + count; ++term) {
      term->first = whole_blocks(term->depth);
      if (term->first || !term->depth) {
        direct_matrix_blocks(n, vectors, *term, part);
        part = part.further();
      }
      if (term->first == term->depth) continue;
      for (int v = 0; v < vectors; ++v) of_rows[n - 1](term, 1, v, part);
      part = part.further();
    }
#else
    for (int v = 0; v < vectors; ++v) of_rows[n - 1](shifted, count, v, part);
#endif
  }
}

}  // namespace rnnkern::RNNKERN_ISA
