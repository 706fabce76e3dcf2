// Packing: the right operand of a product as panels of up to kTileVectors vectors, [panel][k]
// [vector][lane], zeros beyond the edge, so that the tile reads it front to back and needs no mask.
#pragma once
#include <utility>

#include "matrix_product.h"
#include "team.h"

namespace rnnkern::RNNKERN_ISA {

// Bytes of panels that are written past the caches, which would read first what is overwritten.
constexpr int64_t kNonTemporalBytes = 2 << 20;

// How columns fall into panels of factors. For the gate products a column is a unit of one gate,
// and the kGates vectors of a unit block stand together in a panel; otherwise kGates is 1.
template <class F>
struct PackedLayout {
  int64_t units;  // columns per gate
  int gates;
  int blocks_per_panel;  // unit blocks side by side in one panel
  bool gates_share_tail_vector =
      false;  // those of a last, narrower block, so that they fill fewer vectors

  RNNKERN_INLINE PackedLayout(int64_t units, int gates)
      : PackedLayout(units, gates, gates == 1 ? kMaxNR : 1) {}
  RNNKERN_INLINE PackedLayout(int64_t units, int gates, int blocks_per_panel)
      : units(units),
        gates(gates),
        blocks_per_panel(blocks_per_panel) {}

  RNNKERN_INLINE int64_t unit_blocks() const {
    return (units + Vec<F>::kLanes - 1) / Vec<F>::kLanes;
  }
  RNNKERN_INLINE int64_t count() const {
    return (unit_blocks() + blocks_per_panel - 1) / blocks_per_panel;
  }
  RNNKERN_INLINE int64_t first_unit(int64_t panel) const {
    return panel * blocks_per_panel * Vec<F>::kLanes;
  }
  // Vectors of one gate in this panel; the last panel may be narrower.
  RNNKERN_INLINE int unit_vectors(int64_t panel) const {
    const int64_t left = unit_blocks() - panel * blocks_per_panel;
    return int(left < blocks_per_panel ? left : blocks_per_panel);
  }
  // From one gate's columns in this panel to the next one's.
  RNNKERN_INLINE int gate_stride(int64_t panel) const {
    constexpr int kLanes = Vec<F>::kLanes;
    const int64_t left = units - first_unit(panel);
    return gates_share_tail_vector && left < kLanes ? int(left) : unit_vectors(panel) * kLanes;
  }
  RNNKERN_INLINE int nr(int64_t panel) const {
    return (gates * gate_stride(panel) + Vec<F>::kLanes - 1) / Vec<F>::kLanes;
  }
  // Elements of one k in this panel, and of everything before it at one k.
  RNNKERN_INLINE int64_t ldb(int64_t panel) const { return nr(panel) * Vec<F>::kLanes; }
  RNNKERN_INLINE int64_t offset(int64_t panel) const {
    return panel * gates * blocks_per_panel * Vec<F>::kLanes;
  }
  RNNKERN_INLINE int64_t padded_cols() const { return gates * unit_blocks() * Vec<F>::kLanes; }
  RNNKERN_INLINE int64_t size(int64_t depth) const { return padded_cols() * depth; }
  RNNKERN_INLINE int64_t bytes(int64_t depth) const { return size(depth) * int64_t(sizeof(F)); }
  // Whether units fill the panel's vectors, so that weights can be read as they lie.
  RNNKERN_INLINE bool is_full(int64_t panel) const {
    return first_unit(panel) + unit_vectors(panel) * Vec<F>::kLanes <= units;
  }
};

// Columns in panels of which a team's ranks get about as many vectors each. A narrower panel costs
// more for each of its vectors, as its tiles load more for a multiply-add.
template <class F>
PackedLayout<F> balanced_layout(int64_t columns, int team) {
  constexpr double kCost[kMaxNR + 1] = {0, 1.5, 1.15, 1.03, 1};
  PackedLayout<F> best(columns, 1);
  double least_cost = 0;
  for (int width = kMaxNR; width > 0; --width) {
    const PackedLayout<F> panels(columns, 1, width);
    const int64_t count = panels.count();
    int64_t most = 0;
    for (int rank = 0; rank < team; ++rank) {
      const Team one{rank, team, nullptr};
      most =
          max(most, min(one.end(count) * width, panels.unit_blocks()) - one.begin(count) * width);
    }
    const double cost = kCost[width] * double(most);
    if (width == kMaxNR || cost < least_cost) best = panels, least_cost = cost;
  }
  return best;
}

// Rows of a matrix, read as columns: out[i][l] = source[l * ld + i] for kColumns consecutive i.
// Half a register of each row comes in one piece.
template <class F>
struct TransposeLoad {
  using V = Vec<F>;
  using Raw = typename V::Raw;
  static constexpr int kLanes = V::kLanes, kPieces = kBytes > 16 ? 2 : 1,
                       kColumns = kLanes / kPieces;
  static constexpr int kQuarter = 16 / sizeof(F);  // of a register: what most shuffles stay in

  RNNKERN_INLINE static Raw gather(const F* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
    // Inserted from memory, which spares the one port that shuffles.
    const auto piece = [](const F* p) __attribute__((always_inline)) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm512_insertf32x8(_mm512_castps256_ps512(piece(p)), piece(p + step), 1));
#elif defined(__AVX2__)
    const auto piece = [](const F* p) __attribute__((always_inline)) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm256_insertf128_ps(_mm256_castps128_ps256(piece(p)), piece(p + step), 1));
#else
    return V::load(p).v;
#endif
  }
  // Per quarter: the lower (or upper) halves of a and b, interleaved.
  template <int kHigh, int... I>
  RNNKERN_INLINE static Raw interleave(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(
        a, b,
        (I / kQuarter * kQuarter + kHigh * kQuarter / 2 + I % kQuarter / 2 + I % 2 * kLanes)...);
  }
  // The even (or odd) quarters of a, then those of b.
  template <int kOdd, int... I>
  RNNKERN_INLINE static Raw quarters(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(
        a, b, (2 * (I / kQuarter) * kQuarter + kOdd * kQuarter + I % kQuarter)...);
  }

  RNNKERN_INLINE static void load(const F* source, int64_t ld, Raw* out) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i)
      out[i] =
          gather(source + (i / kQuarter * kPieces * kQuarter + i % kQuarter) * ld, kQuarter * ld);
#pragma GCC unroll 2
    for (int g = 0; g < kColumns; g += kQuarter)
#pragma GCC unroll 2
      for (int rounds = kQuarter; rounds > 1; rounds /= 2) {
        Raw row[kQuarter];
#pragma GCC unroll 4
        for (int i = 0; i < kQuarter; ++i) row[i] = out[g + i];
#pragma GCC unroll 2
        for (int i = 0; i < kQuarter / 2; ++i) {
          out[g + 2 * i] = interleave<0>(row[i], row[i + kQuarter / 2], all);
          out[g + 2 * i + 1] = interleave<1>(row[i], row[i + kQuarter / 2], all);
        }
      }
    if constexpr (kColumns > kQuarter) {
#pragma GCC unroll 4
      for (int i = 0; i < kQuarter; ++i) {
        const Raw a = out[i], b = out[i + kQuarter];
        out[i] = quarters<0>(a, b, all);
        out[i + kQuarter] = quarters<1>(a, b, all);
      }
    }
  }
};

// out[k * step + l] = source[l * ld + k] for l < lanes, the rest zero
template <class F>
RNNKERN_INLINE void pack_transposed(const F* source, int64_t ld, int lanes, int64_t depth, F* out,
                                    int64_t step, bool non_temporal) {
  using Columns = TransposeLoad<F>;
  int64_t k = 0;
  if (lanes == Vec<F>::kLanes)
    for (; k + Columns::kColumns <= depth; k += Columns::kColumns) {
      typename Vec<F>::Raw column[Columns::kColumns];
      Columns::load(source + k, ld, column);
#pragma GCC unroll 8
      for (int i = 0; i < Columns::kColumns; ++i) {
        F* const to = out + (k + i) * step;
        non_temporal ? Vec<F>(column[i]).stream(to) : Vec<F>(column[i]).store(to);
      }
    }
  for (; k < depth; ++k) {
    int l = 0;
    for (; l < lanes; ++l) out[k * step + l] = source[l * ld + k];
    for (; l < Vec<F>::kLanes; ++l) out[k * step + l] = F{};
  }
}

// Columns are the rows of `weight` (gates * units, depth): what multiplies x or h in the forward
// pass. gate_of(s) is the weight's gate that stands in place s.
template <class F, class GateOf>
void pack_gates(const PackedLayout<F>& panels, int64_t panel, const F* weight, int64_t depth,
                GateOf gate_of, F* packed) {
  F* out = packed + panels.offset(panel) * depth;
  const int width = panels.unit_vectors(panel), gate_stride = panels.gate_stride(panel);
  if (gate_stride < width * Vec<F>::kLanes) {
    const int64_t first = panels.first_unit(panel), step = panels.ldb(panel);
    for (int64_t c = 0; c < step; ++c) {
      const int64_t s = c / gate_stride, unit = first + c % gate_stride;
      for (int64_t k = 0; k < depth; ++k)
        out[k * step + c] =
            s < panels.gates ? weight[(gate_of(int(s)) * panels.units + unit) * depth + k] : F{};
    }
    return;
  }
  for (int s = 0; s < panels.gates; ++s)
    for (int w = 0; w < width; ++w) {
      const int64_t unit = panels.first_unit(panel) + w * Vec<F>::kLanes;
      const int64_t left = panels.units - unit;
      const int lanes = int(left < Vec<F>::kLanes ? left : Vec<F>::kLanes);
      pack_transposed(weight + (gate_of(s) * panels.units + unit) * depth, depth, lanes, depth,
                      out + (s * width + w) * Vec<F>::kLanes, panels.ldb(panel),
                      panels.bytes(depth) >= kNonTemporalBytes);
    }
}

// Row k of `rows`, or as many of them from k on as a factor has terms: its `count` columns from
// `first` on. A last vector that is `whole` ends in zeros.
template <class T, class RowOf>
RNNKERN_INLINE void pack_k_row(RowOf& row_of, int64_t k, int64_t rows, int64_t first, int64_t count,
                               PackedElem<T>* to, bool whole) {
  using V = Vec<PackedElem<T>>;
  const T *const row = row_of(k) + first, *next = nullptr;
  if (kVnniFactor<T> > 1 && k + 1 < rows) next = row_of(k + 1) + first;
  for (int64_t c = 0; c < count; c += V::kLanes) {
    const int lanes = int(min<int64_t>(count - c, V::kLanes));
    vnni_interleave(row + c, next ? next + c : next, lanes)
        .store(to + c, whole ? V::kLanes : lanes);
  }
}

// The panel of a matrix whose rows are contiguous in memory, row_of(k), asked for in turn; and
// zeros, until it is `depth` factors deep.
template <class T, class RowOf>
RNNKERN_INLINE void pack_rows(const PackedLayout<PackedElem<T>>& panels, int64_t panel,
                              int64_t rows, RowOf row_of, int64_t depth, PackedElem<T>* out) {
  const int64_t first = panels.first_unit(panel), step = panels.ldb(panel);
  const int64_t columns = min(step, panels.units - first);
  const PackedElem<T>* const end = out + depth * step;
  for (int64_t k = 0; k < rows; k += kVnniFactor<T>, out += step)
    pack_k_row<T>(row_of, k, rows, first, columns, out, true);
  if (out < end) std::memset(out, 0, (end - out) * sizeof *out);
}

}  // namespace rnnkern::RNNKERN_ISA
