// The product of product.h on matrix registers, term by term: 16 factors of the depth at a time,
// and what is left of it on the register tile.
#pragma once
#include "matrix_registers.h"
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
void matrix_tiles(int64_t second, const Term<bf16x2>* terms, int count, const Tile<float>& tile) {
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
  const StridedRows<const float> init = tile.begin();
  each_sum([&](auto sum, int t, int v) __attribute__((always_inline)) {
    if (init.data)
      M::load<sum>(init[t * second] + v * kLanes, init.stride * sizeof(float));
    else
      M::zero<sum>();
  });
  for (const Term<bf16x2>* term = terms; term < terms + count; ++term) {
    const int64_t row = term->row * sizeof(bf16x2), step = term->panel_step * sizeof(float);
    const bf16x2* b = term->b;
    for (int64_t left = term->depth / kMatrixDepth, block = 0; left > 0; ++block) {
      const bf16x2* a = term->a + block * term->block;
      const bf16x2* const a_second = a + second * term->row;
      const int64_t blocks = min(left, kSumBlock / kMatrixDepth);
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
inline void matrix_blocks(int rows, int vectors, const Term<bf16x2>* terms, int count,
                          const Tile<float>& tile) {
  using Tiles = void (*)(int64_t, const Term<bf16x2>*, int, const Tile<float>&);
  static constexpr Tiles one[] = {matrix_tiles<1, 1>, matrix_tiles<1, 2>, matrix_tiles<1, 3>,
                                  matrix_tiles<1, 4>};
  static constexpr Tiles two[] = {matrix_tiles<2, 1>, matrix_tiles<2, 2>, matrix_tiles<2, 3>};
  constexpr int kLanes = Vec<float>::kLanes;
  const int height = rows > kMatrixRows ? (rows + 1) / 2 : rows;
  MatrixRegisters::set_rows(height);
  if (rows <= kMatrixRows) return one[vectors - 1](0, terms, count, tile);
  if (vectors < 4) return two[vectors - 1](rows - height, terms, count, tile);
  for (int v = 0; v < 4; v += 2) {
    Term<bf16x2> half[kMaxTerms];
    for (int i = 0; i < count; ++i) (half[i] = terms[i]).b += v * kLanes;
    const float* const init = tile.init ? tile.init + v * kLanes : nullptr;
    matrix_tiles<2, 2>(rows - height, half, count,
                       {init, tile.init_row, tile.out + v * kLanes, tile.out_row, tile.add});
  }
}

// As product(), whose left operands stand in rows.
inline void matrix_product(int rows, int vectors, const Term<bf16x2>* terms, int count,
                           Tile<float> tile) {
  for (int i = 0; i < count;) {
    // As many terms as have nothing left, and one that may.
    int end = i;
    while (end + 1 < count && terms[end].depth % kMatrixDepth == 0) ++end;
    const Term<bf16x2>& last = terms[end++];
    const int64_t whole = whole_blocks(last.depth);
    if (whole || end - i > 1 || !last.depth) {
      matrix_blocks(rows, vectors, terms + i, end - i, tile);
      tile = tile.further();
    }
    if (whole < last.depth) {
      const Term<bf16x2> rest{last.a + whole / kSumBlock * last.block + whole % kSumBlock,
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

#endif

// The sum of up to kMaxTerms terms for up to kGroupRows rows, and 1 to kTileVectors vectors. Left
// operands in columns come as one term, without init.
template <class F>
RNNKERN_INLINE void product(int rows, int vectors, const Term<F>* terms, int count,
                            const Tile<Acc<F>>& tile) {
#if defined(RNNKERN_AMX)
  if (terms[0].col == 1) return matrix_product(rows, vectors, terms, count, tile);
#endif
  vector_product(rows, vectors, terms, count, tile);
}

}  // namespace rnnkern::RNNKERN_ISA
