// The product of product.h on matrix registers, term by term: 16 factors of the depth at a time,
// and what is left of it on the register tile.
#pragma once
#include "parts.h"
#include "product.h"

namespace rnnkern::RNNKERN_ISA {

#if defined(RNNKERN_AMX)

template <int kCount, class F>
RNNKERN_INLINE void for_each_of(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// Sums of kTiles times `height` rows and kVectors vectors, over the whole blocks of the terms'
// depth. The second tile begins `second` rows after the first: rows that both have are added up
// twice, to the same. Left operands stay in registers of their own, if there are enough.
template <int kTiles, int kVectors>
void matrix_tiles(int64_t second, const Term<BfloatPair>* terms, int count,
                  const Tile<float>& tile) {
  using M = MatrixRegisters;
  constexpr int kSums = kTiles * kVectors, kLanes = Vec<float>::kLanes;
  constexpr bool kOneLeft = kSums + kTiles > kPanelRegister;
  const auto each_sum = [](auto f) __attribute__((always_inline)) {
    for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
      for_each_of<kVectors>([&](auto v) __attribute__((always_inline)) {
        f(std::integral_constant<int, t * kVectors + v>(), t, v);
      });
    });
  };
  const RowsOf<const float> init = tile.begin();
  each_sum([&](auto sum, int t, int v) __attribute__((always_inline)) {
    if (init.data)
      M::load<sum>(init[t * second] + v * kLanes, init.stride * sizeof(float));
    else
      M::zero<sum>();
  });
  for (const Term<BfloatPair>* term = terms; term < terms + count; ++term) {
    const int64_t row = term->row * sizeof(BfloatPair), step = term->panel_step * sizeof(float);
    const BfloatPair* b = term->b;
    for (int64_t left = term->depth / kMatrixDepth, block = 0; left > 0; ++block) {
      const BfloatPair* a = term->a + block * term->block;
      const BfloatPair* const a_second = a + second * term->row;
      const int64_t blocks = least(left, kSumBlock / kMatrixDepth);
      left -= blocks;
      for (int64_t k = 0; k < blocks * kMatrixDepth; k += kMatrixDepth) {
        const auto load_left = [&](auto t) __attribute__((always_inline)) {
          constexpr int kLeft = kSums + (kOneLeft ? 0 : decltype(t)::value);
          M::load<kLeft>((t ? a_second : a) + k, row);
        };
        if (!kOneLeft) for_each_of<kTiles>(load_left);
        for_each_of<kVectors>([&](auto v) __attribute__((always_inline)) {
          M::load<kPanelRegister>(b + v * kLanes, step);
          for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
            if (kOneLeft) load_left(t);
            M::multiply<t * kVectors + v, kSums + (kOneLeft ? 0 : t)>();
          });
        });
        b += kMatrixDepth * term->panel_step;
      }
    }
  }
  each_sum([&](auto sum, int t, int v) __attribute__((always_inline)) {
    M::store<sum>(tile.out + t * second * tile.out_row + v * kLanes, tile.out_row * sizeof(float));
  });
}

// All rows and vectors, over the whole blocks of the terms' depth.
inline void matrix_blocks(int rows, int vectors, const Term<BfloatPair>* terms, int count,
                          const Tile<float>& tile) {
  using Tiles = void (*)(int64_t, const Term<BfloatPair>*, int, const Tile<float>&);
  static constexpr Tiles one[] = {matrix_tiles<1, 1>, matrix_tiles<1, 2>, matrix_tiles<1, 3>,
                                  matrix_tiles<1, 4>};
  static constexpr Tiles two[] = {matrix_tiles<2, 1>, matrix_tiles<2, 2>, matrix_tiles<2, 3>};
  constexpr int kLanes = Vec<float>::kLanes;
  const int height = rows > kMatrixRows ? (rows + 1) / 2 : rows;
  MatrixRegisters::set_rows(height);
  if (rows <= kMatrixRows) return one[vectors - 1](0, terms, count, tile);
  if (vectors < 4) return two[vectors - 1](rows - height, terms, count, tile);
  for (int v = 0; v < 4; v += 2) {
    Term<BfloatPair> half[kMaxTerms];
    for (int i = 0; i < count; ++i) (half[i] = terms[i]).b += v * kLanes;
    const float* const init = tile.init ? tile.init + v * kLanes : nullptr;
    matrix_tiles<2, 2>(rows - height, half, count,
                       {init, tile.init_row, tile.out + v * kLanes, tile.out_row, tile.add});
  }
}

// As product(), whose left operands stand in rows.
inline void matrix_product(int rows, int vectors, const Term<BfloatPair>* terms, int count,
                           Tile<float> tile) {
  for (int i = 0; i < count;) {
    // As many terms as have nothing left, and one that may.
    int end = i;
    while (end + 1 < count && terms[end].depth % kMatrixDepth == 0) ++end;
    const Term<BfloatPair>& last = terms[end++];
    const int64_t whole = whole_blocks(last.depth);
    if (whole || end - i > 1 || !last.depth) {
      matrix_blocks(rows, vectors, terms + i, end - i, tile);
      tile = tile.further();
    }
    if (whole < last.depth) {
      const Term<BfloatPair> rest{last.a + whole / kSumBlock * last.block + whole % kSumBlock,
                                  last.row,
                                  1,
                                  last.depth - whole,
                                  last.b + whole * last.panel_step,
                                  last.panel_step};
      if (whole) tile.init = nullptr, tile.add = true;
      vector_product(rows, vectors, &rest, 1, tile);
      tile = tile.further();
    }
    i = end;
  }
}

// Sums of numbers in parts: as matrix_tiles(), over a depth of whole blocks. What is multiplied
// changes by one operand at a time, and four sums take turns, as each takes three turns to be made.
template <int kTiles, int kVectors, bool kFetch>
void parts_tiles(int64_t second, const Term<BfloatPair>& term, float* out, int64_t out_row) {
  using M = MatrixRegisters;
  constexpr int kLanes = Vec<float>::kLanes, kLeft = 4, kPanel = kPanelRegister - 1;
  static_assert(kTiles == 1 ? kVectors <= 4 : kVectors <= 2);
  constexpr int kOrder[][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};
  // How far ahead lines are fetched into the second-level cache, in blocks.
  constexpr int64_t kAhead = 2;
  const auto each_sum = [](auto f) __attribute__((always_inline)) {
    for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
      for_each_of<kVectors>([&](auto v) __attribute__((always_inline)) {
        f(std::integral_constant<int, t * kVectors + v>(), t, v);
      });
    });
  };
  each_sum([](auto sum, int, int) __attribute__((always_inline)) { M::zero<sum>(); });
  const int64_t a_step = second * term.row, b_step = term.panel_step, depth = term.depth;
  const int64_t row = term.row * sizeof(BfloatPair), step = b_step * sizeof(BfloatPair);
  const BfloatPair *a = term.a, *b = term.b;
  for (int64_t k = 0; k < depth; k += kPartsBlock, a += kPartsBlock) {
    for_each_of<6>([&](auto i) __attribute__((always_inline)) {
      constexpr int kA = kOrder[i][0], kB = kOrder[i][1];
      constexpr bool kNewA = i == 0 || kA != kOrder[i ? i - 1 : 0][0];
      constexpr bool kNewB = i == 0 || kB != kOrder[i ? i - 1 : 0][1];
      if constexpr (kNewA)
        for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
          M::load<kLeft + t>(a + t * a_step + kA * kMatrixDepth, row);
        });
      for_each_of<kVectors>([&](auto v) __attribute__((always_inline)) {
        // Of more than two vectors, each takes the place of the one before the last.
        if constexpr (kNewB || kVectors > 2)
          M::load<kPanel + v % 2>(b + kB * kMatrixDepth * b_step + v * kLanes, step);
        for_each_of<kTiles>([&](auto t) __attribute__((always_inline)) {
          M::multiply<t * kVectors + v, kLeft + t, kPanel + v % 2>();
        });
      });
      if constexpr (kFetch)
        for (int line = 0; line < kPartsBlock / 6; ++line)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            __builtin_prefetch(
                b + ((kAhead * 6 + i) * (kPartsBlock / 6) + line) * b_step + v * kLanes, 0, 2);
    });
    b += kPartsBlock * b_step;
  }
  each_sum([&](auto sum, int t, int v) __attribute__((always_inline)) {
    M::store<sum>(out + t * second * out_row + v * kLanes, out_row * sizeof(float));
  });
}

// One term in parts, for up to kGroupRows rows and kTileVectors vectors; out is written, or added
// to.
inline void parts_product(int rows, int vectors, const Term<BfloatPair>& term,
                          const Tile<float>& tile) {
  using Tiles = void (*)(int64_t, const Term<BfloatPair>&, float*, int64_t);
  static constexpr Tiles one[2][4] = {{parts_tiles<1, 1, false>, parts_tiles<1, 2, false>,
                                       parts_tiles<1, 3, false>, parts_tiles<1, 4, false>},
                                      {parts_tiles<1, 1, true>, parts_tiles<1, 2, true>,
                                       parts_tiles<1, 3, true>, parts_tiles<1, 4, true>}};
  static constexpr Tiles two[2][2] = {{parts_tiles<2, 1, false>, parts_tiles<2, 2, false>},
                                      {parts_tiles<2, 1, true>, parts_tiles<2, 2, true>}};
  constexpr int kLanes = Vec<float>::kLanes;
  // Sums are added to what is there in the end: in the matrix unit, each of its roundings would be
  // one of the whole.
  alignas(64) float sums[kGroupRows * kTileVectors * kLanes];
  float* const out = tile.add ? sums : tile.out;
  const int64_t out_row = tile.add ? vectors * kLanes : tile.out_row;
  const int height = rows > kMatrixRows ? (rows + 1) / 2 : rows;
  MatrixRegisters::set_rows(height, 2);
  if (rows <= kMatrixRows) {
    one[term.fetch][vectors - 1](0, term, out, out_row);
  } else {
    Term<BfloatPair> part = term;
    for (int v = 0; v < vectors; v += 2, part.b += 2 * kLanes)
      two[term.fetch][vectors - v > 1](rows - height, part, out + v * kLanes, out_row);
  }
  if (tile.add)
    add_tile(sums, vectors * kLanes, rows, vectors * kLanes, tile.out, tile.out_row, true);
}

#endif

// The sum of up to kMaxTerms terms for up to kGroupRows rows, and 1 to kTileVectors vectors. Left
// operands in columns come as one term, without init.
template <class F>
RNNKERN_INLINE void product(int rows, int vectors, const Term<F>* terms, int count,
                            const Tile<Sum<F>>& tile) {
#if defined(RNNKERN_AMX)
  if constexpr (std::is_same_v<F, BfloatPair>)
    if (terms[0].col == 1) return matrix_product(rows, vectors, terms, count, tile);
#endif
  vector_product(rows, vectors, terms, count, tile);
}

}  // namespace rnnkern::RNNKERN_ISA
