// The register tile on weights as they lie in memory, for calls too short to repay packing: the
// weights are read once, transposed in registers. Same sums in the same order as product.h.
#pragma once
#include "pack.h"
#include "plan.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int kDirectRows = 4;
// Bytes of rows that no processor follows by itself, as many as a register has lanes.
constexpr int64_t kLongRow = 2560;

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

// total += the product of a and one vector's rows, block by block from k on; depths[b] of each, at
// most kLastBlock. Blocks have sums of their own, but the first may begin with the total. Two are
// added up side by side, as each addition to a sum waits for the one before it.
template <class F, int kRows, int kBlocks>
RNNKERN_INLINE void add_blocks(const F* a, int64_t row, const F* weight, int64_t depth, int64_t k,
                               const int64_t (&depths)[kBlocks], bool own,
                               typename Vec<Acc<F>>::Raw (&total)[kRows]) {
  using V = Vec<Acc<F>>;
  using Columns = Transposed<F>;
  constexpr int kColumns = Columns::kColumns, kTurns = kLine<F> / kColumns;  // that read a line
  const bool fetch = use_software_prefetch(kRows) || depth * int64_t(sizeof(F)) >= kLongRow;
  const int64_t lanes_to_fetch = fetch ? V::kLanes : 0;
  typename V::Raw sum[kBlocks][kRows];
  const F* ahead[kBlocks];
  int64_t begin[kBlocks], end = k;
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) begin[b] = end, end += depths[b];
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) {
    ahead[b] = fetched_before(weight, depth, end + b * kSumBlock);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[b][r] = own || b ? typename V::Raw{} : total[r];
  }
  const auto add_columns = [&](int b, int64_t q) __attribute__((always_inline)) {
    for (int64_t l = q / kColumns % kTurns; l < lanes_to_fetch; l += kTurns)
      __builtin_prefetch(ahead[b] + l * depth + q, 0, 3);
    typename Vec<F>::Raw column[kColumns];
    Columns::load(weight + begin[b] + q, depth, column);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        add_product<F>(sum[b][r], Vec<F>(a[r * row + begin[b] + q + j]).v, column[j]);
  };
  for (int64_t q = 0; q + kColumns <= depths[0]; q += kColumns) {
    add_columns(0, q);
    if (kBlocks > 1 && q < depths[kBlocks - 1]) add_columns(kBlocks - 1, q);
  }
  if constexpr (kBlocks == 1)  // two have whole columns
    for (k = end - depths[0] % kColumns; k < end; ++k) {
      F column[V::kLanes];
      for (int l = 0; l < V::kLanes; ++l) column[l] = weight[l * depth + k];
      for (int r = 0; r < kRows; ++r)
        add_product<F>(sum[0][r], Vec<F>(a[r * row + k]).v, Vec<F>::load(column).v);
    }
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[r] = own || b ? total[r] + sum[b][r] : sum[b][r];
}

// Vector v of the sums.
template <class F, int kRows>
__attribute__((noinline)) void direct_tile(const DirectTerm<F>* terms, int count, int v,
                                           Tile<Acc<F>> tile) {
  using V = Vec<Acc<F>>;
  constexpr int kColumns = Transposed<F>::kColumns;
  // Where fetching ahead takes the place of loads, two blocks at a time gain nothing.
  const bool in_twos = kRows <= 2 && !use_software_prefetch(kRows);
  const StridedRows<const Acc<F>> init = tile.begin();
  typename V::Raw total[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    total[r] = init.data ? V::load(init[r] + v * V::kLanes).v : typename V::Raw{};
  for (const DirectTerm<F>* t = terms; t < terms + count; ++t)
    for (int64_t k = t->first; k < t->depth;) {
      const bool own = k || (tile.add && t == terms);
      const int64_t n = block_depth(t->depth - k), after = block_depth(t->depth - k - n);
      if (in_twos && after && after <= n && n % kColumns == 0 && after % kColumns == 0) {
        add_blocks<F, kRows, 2>(t->a, t->row, t->weight[v], t->depth, k, {n, after}, own, total);
        k += n + after;
      } else {
        add_blocks<F, kRows, 1>(t->a, t->row, t->weight[v], t->depth, k, {n}, own, total);
        k += n;
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) V(total[r]).store(tile.out + r * tile.out_row + v * V::kLanes);
}

#if defined(RNNKERN_AMX)

// The whole blocks of a term's depth, for at most kDirectRows rows. The weights are the left
// operand, as they lie, and the rows become the columns of a panel.
inline void direct_matrix_blocks(int rows, int vectors, const DirectTerm<bf16x2>& term,
                                 const Tile<float>& tile) {
  using M = MatrixRegisters;
  constexpr int kLanes = Vec<float>::kLanes, kLeft = kTileVectors;
  alignas(64) float sums[kTileVectors][kLanes][kLanes] = {};
  const StridedRows<const float> init = tile.begin();
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
  const int64_t row = term.depth * sizeof(bf16x2);
  alignas(64) bf16x2 panel[kMatrixDepth * kDirectRows + kLanes] = {};
  for (int64_t k = 0; k < whole_blocks(term.depth); k += kMatrixDepth) {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kMatrixDepth; ++i) panel[i * rows + r] = term.a[r * term.row + k + i];
    M::load<kPanelRegister>(panel, rows * sizeof(bf16x2));
    each_vector([&](auto v) __attribute__((always_inline)) {
      const bf16x2* const ahead = fetched_before(term.weight[v], term.depth, k + kSumBlock);
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
                   Tile<Acc<F>> tile) {
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
                                   Tile<Acc<F>> tile) {
  using Function = void (*)(const DirectTerm<F>*, int, int, Tile<Acc<F>>);
  static constexpr Function of_rows[kDirectRows] = {direct_tile<F, 1>, direct_tile<F, 2>,
                                                    direct_tile<F, 3>, direct_tile<F, 4>};
  if constexpr (std::is_same_v<F, Acc<F>>)
    if (rows > 2 * kDirectRows) return direct_blocks(rows, vectors, terms, count, tile);
  for (int r = 0; r < rows; r += kDirectRows) {
    const int n = rows - r < kDirectRows ? rows - r : kDirectRows;
    DirectTerm<F> shifted[2];
    for (int i = 0; i < count; ++i) {
      shifted[i] = terms[i];
      shifted[i].a += r * terms[i].row;
    }
    Tile<Acc<F>> part = tile;
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
