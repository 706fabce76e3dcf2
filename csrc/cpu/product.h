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
constexpr int64_t kSumBlock = 64;
// The last block may be longer instead of being followed by a short one, as each costs the loads,
// additions and stores of a tile.
constexpr int64_t kLastBlock = 80;

// The depth of the block with which `left` of a term's depth begins.
RNNKERN_INLINE int64_t block_depth(int64_t left) { return left <= kLastBlock ? left : kSumBlock; }

// A matrix whose columns may stand in blocks: of row r, column c is data[r * row + c / kSumBlock *
// block + c % kSumBlock]. In rows of one piece block is kSumBlock; else blocks are whole.
template <class T>
struct Blocked {
  T* data;
  int64_t row, block;
  RNNKERN_INLINE T* at(int64_t r, uint64_t c) const {  // unsigned: quotients are shifts
    return data + r * row + c / kSumBlock * block + c % kSumBlock;
  }
  // From row r, and from column c on, with which a block begins.
  Blocked from(int64_t r, int64_t c) const { return {at(r, c), row, block}; }
  operator Blocked<const T>() const { return {data, row, block}; }
  bool in_blocks() const { return block != kSumBlock; }
};

// One term of a product, of factors F: depth, rows and columns count these. Row r of the left
// operand is a[r * row + k * col], where row or col is 1; the panel has consecutive vectors for a
// k, and `panel_step` elements from one k to the next.
template <class F>
struct Term {
  const F* a;
  int64_t row, col;
  int64_t depth;  // number of k
  const F* b;
  int64_t panel_step;
  int64_t block = kSumBlock;  // from a[r, k] to a[r, k + kSumBlock] where col is 1
  bool fetch = false;         // whether blocks must be fetched into the second-level cache
  const F* after = nullptr;   // what to fetch there at the end: the first block of what comes next
};

// A row of vectors in memory per tile row. Sums begin with init, which may equal out, or with
// zeros if it is null, and with `add` they are added to out.
template <class T>
struct Tile {
  const T* init;
  int64_t init_row;
  T* out;
  int64_t out_row;
  bool add = false;

  // What sums begin with that have no registers of their own; null if with zeros.
  StridedRows<const T> begin() const {
    return add ? StridedRows<const T>{out, out_row} : StridedRows<const T>{init, init_row};
  }
  // Where further terms go on.
  Tile further() const { return {out, out_row, out, out_row}; }
};

// What is added to sums that nothing is added to.
template <class T>
constexpr T kZeroSums[kTileVectors * Vec<T>::kLanes] = {};

constexpr int kGroupRows = kMatrixRegisters ? 32 : 36;  // that go through a panel's block in turn
constexpr int kMaxTerms = 4;

// What the first `tiles` tiles of a block fetch into the second-level cache while they work from
// the first: so many lines per k. No more than needed, as each takes a load's place.
template <class F>
struct Ahead {
  const F* from;
  int64_t step, tile_step;  // from one k, and from one tile, to the next
  int lines, tiles;
};
constexpr int kMostLines = 2;

// Rows of a tile: the fewer vectors, the more rows, since a tile loads a value per row and a vector
// per vector for rows times vectors multiply-adds.
constexpr int tile_rows(int vectors) { return kTileSums / (vectors > 1 ? vectors : 2); }

// How many k a turn of the tile's loop takes: with few registers there is much else in a turn, but
// for one row, which waits for its sums.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int turn(int rows) { return rows > 1 ? 4 : 1; }
#else
constexpr int turn(int) { return 1; }
#endif

// Whether left operands stand in rows or in columns, and whether sums begin with init or zeros.
struct RowsFromZero {
  static constexpr bool kByRows = true, kInit = false;
};
struct RowsFromInit {
  static constexpr bool kByRows = true, kInit = true;
};
struct ColumnsFromZero {
  static constexpr bool kByRows = false, kInit = false;
};

// The sum of `count` terms, for `tiles` tiles of kRows rows from `first` on. Several tiles to a
// call, as a call costs as much as ten k.
template <class F, class Kind, int kRows, int kVectors, int kFetch>
__attribute__((noinline)) void tile_products(const Term<F>* terms, int count, int64_t first,
                                             int tiles, const Tile<Acc<F>>& tile,
                                             const Ahead<F>& ahead) {
  using T = Acc<F>;
  using V = Vec<T>;
  constexpr bool kByRows = Kind::kByRows, kInit = Kind::kInit;
  constexpr int kTurn = turn(kRows);
  T* out = tile.out + first * tile.out_row;
  const T* init = kInit ? tile.init + first * tile.init_row : nullptr;
  const T* base = tile.add ? out : kZeroSums<T>;  // no branch, which would cost more
  const int64_t base_row = tile.add ? tile.out_row : 0;
  const F* from = ahead.from;
  for (; tiles > 0; --tiles, first += kRows) {
    typename V::Raw sum[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, init += kInit ? tile.init_row : 0)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = kInit ? V::load(init + v * V::kLanes).v : typename V::Raw{};

    const F* fetch = from;
    from += ahead.tile_step;
    for (const Term<F>* term = terms; term < terms + count; ++term) {
      const F* b = term->b;
      const int64_t panel_step = term->panel_step;
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
                add_loaded_product<F>(sum[r][v], av[r], bv[v]);
              else
                add_product<F>(sum[r][v], av[r], bv[v]);
          }
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) bv[v] = Vec<F>::load(b + v * V::kLanes).v;
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) {
            av[r] = Vec<F>(a(r)).v;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) add_product<F>(sum[r][v], av[r], bv[v]);
          }
        }
        b += panel_step;
        asm("" : "+r"(b));  // one pointer, where the compiler would keep one for each k of a turn
#pragma GCC unroll 2
        for (int i = 0; i < kFetch; ++i) __builtin_prefetch(fetch + i * kLine<F>, 0, 2);
        if (kFetch) fetch += ahead.step;
      };
      // Left operands that stand in rows have a pointer for four of them: there are not registers
      // enough for one each. In columns they follow each other.
      constexpr int kPointers = kByRows ? (kRows + 3) / 4 : 1;
      const int64_t row = term->row, row3 = 3 * row, col = term->col;
      // The first turn may be shorter: it is entered on the way.
      const uint64_t depth = term->depth;
      uint64_t turns = (depth + kTurn - 1) / kTurn;
      const int64_t skipped = turns * kTurn - depth;
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
      if constexpr (kTurn == 4) {
        switch (skipped) {
          do {
            case 0: multiply_at(0); [[fallthrough]];
            case 1: multiply_at(1); [[fallthrough]];
            case 2: multiply_at(2); [[fallthrough]];
            case 3:
              multiply_at(3);
              if (kByRows) advance(kTurn);
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
    for (int r = 0; r < kRows; ++r, base += base_row, out += tile.out_row)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        V(kInit ? sum[r][v] : V::load(base + v * V::kLanes).v + sum[r][v])
            .store(out + v * V::kLanes);
  }
}

template <class F, int kMost>
struct TileTable {
  void (*of_rows[1 + kMostLines][kMost])(const Term<F>*, int, int64_t, int, const Tile<Acc<F>>&,
                                         const Ahead<F>&);
};

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

// A block of a term's depth.
template <class F>
RNNKERN_INLINE Term<F> block_of(const Term<F>& term, int64_t k) {
  const int64_t at = term.col == 1 ? k / kSumBlock * term.block : k * term.col;
  return {
      term.a + at,    term.row, term.col, block_depth(term.depth - k), term.b + k * term.panel_step,
      term.panel_step};
}

// What to fetch during a block before the one that begins with `next`: the panel's next lines or,
// where the left operand is read by columns, its next rows.
template <class F>
RNNKERN_INLINE Ahead<F> before_block(const Term<F>& term, int rows, int vectors, int64_t next) {
  const F* from = term.after;
  if (next < term.depth)
    from = !term.fetch     ? nullptr
           : term.col == 1 ? term.b + next * term.panel_step
                           : term.a + next * term.col;
  if (!from) return {};
  if (term.col == 1) {
    // Lines for each k, and how many of them a tile fetches where there are few tiles.
    const int wanted = int((vectors * Vec<F>::kLanes + kLine<F> - 1) / kLine<F>);
    const int lines = rows > (wanted - 1) * tile_rows(vectors) ? 1 : kMostLines;
    return {from, lines * kLine<F>, kSumBlock * lines * kLine<F>, lines,
            (wanted + lines - 1) / lines};
  }
  const int begin = int(reinterpret_cast<uintptr_t>(from) / sizeof(F) % kLine<F>);
  return {from, term.col, kLine<F>, 1, int((begin + rows + kLine<F> - 1) / kLine<F>)};
}

// The tiles of one block of the depth for a group of rows.
template <class F, class Kind, int kVectors>
void block_product(int rows, const Term<F>* terms, int count, const Tile<Acc<F>>& tile,
                   Ahead<F> ahead) {
  constexpr int kMost = tile_rows(kVectors);
  static constexpr auto table = []<int... n>(std::integer_sequence<int, n...>) {
    return TileTable<F, kMost>{{{tile_products<F, Kind, n + 1, kVectors, 0>...},
                                {tile_products<F, Kind, n + 1, kVectors, 1>...},
                                {tile_products<F, Kind, n + 1, kVectors, 2>...}}};
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
      ahead.tiles -= n, ahead.from += n * ahead.tile_step;
    }
  };
  run(height, high);
  run(height - 1, tiles - high);
}

// A product (matrix_product.h) in vectors: block by block of the depth, tile by tile. Terms of one
// block each go through the tiles together.
template <class F>
void vector_product(int rows, int vectors, const Term<F>* terms, int count, Tile<Acc<F>> tile) {
  const auto multiply = [&](const Term<F>* blocks, int n, const Ahead<F>& ahead) {
    const auto of_kind = [&]<class Kind>(Kind) {
      using BlockProduct = void (*)(int, const Term<F>*, int, const Tile<Acc<F>>&, Ahead<F>);
      static constexpr BlockProduct of_vectors[kTileVectors] = {
          block_product<F, Kind, 1>, block_product<F, Kind, 2>, block_product<F, Kind, 3>,
          block_product<F, Kind, 4>};
      of_vectors[vectors - 1](rows, blocks, n, tile, ahead);
    };
    if (blocks[0].col != 1)
      of_kind(ColumnsFromZero());
    else if (tile.init)
      of_kind(RowsFromInit());
    else
      of_kind(RowsFromZero());
  };
  for (int i = 0; i < count;) {
    Term<F> blocks[kMaxTerms];
    int n = 0;
    do blocks[n] = block_of(terms[i], 0);
    while (blocks[n++].depth == terms[i++].depth && i < count);
    const Term<F>& last = terms[i - 1];
    int64_t next = blocks[n - 1].depth;
    multiply(blocks, n, before_block(last, rows, vectors, next));
    tile.init = nullptr, tile.add = true;
    while (next < last.depth) {
      const Term<F> block = block_of(last, next);
      next += block.depth;
      multiply(&block, 1, before_block(last, rows, vectors, next));
    }
    tile = tile.further();
  }
}

// Copies, or adds, a tile to memory; `columns` may be fewer than the tile's.
template <class T>
void add_tile(const T* tile, int width, int64_t rows, int64_t columns, T* out, int64_t stride,
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
