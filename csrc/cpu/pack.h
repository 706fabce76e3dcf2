// Packing: the right operand of a product as panels of up to kTileVectors vectors, [panel][k]
// [vector][lane], zeros beyond the edge, so that the tile reads it front to back and needs no mask.
#pragma once
#include <utility>

#include "product.h"

namespace rnnkern::RNNKERN_ISA {

// Bytes of panels that are written past the caches, which would read first what is overwritten.
constexpr int64_t kPastCaches = 2 << 20;

// How columns fall into panels. For the gate products a column is a unit of one gate, and the
// kGates vectors of a unit block stand together in a panel; otherwise kGates is 1.
template <class T>
struct Panels {
  int64_t units;  // columns per gate
  int gates;
  int blocks_per_panel;  // unit blocks side by side in one panel

  RNNKERN_INLINE Panels(int64_t units, int gates)
      : Panels(units, gates, gates == 1 ? kTileVectors : 1) {}
  RNNKERN_INLINE Panels(int64_t units, int gates, int blocks_per_panel)
      : units(units),
        gates(gates),
        blocks_per_panel(blocks_per_panel) {}

  RNNKERN_INLINE int64_t blocks() const { return (units + Vec<T>::kLanes - 1) / Vec<T>::kLanes; }
  RNNKERN_INLINE int64_t count() const {
    return (blocks() + blocks_per_panel - 1) / blocks_per_panel;
  }
  RNNKERN_INLINE int64_t first_unit(int64_t panel) const {
    return panel * blocks_per_panel * Vec<T>::kLanes;
  }
  // Vectors of one gate in this panel; the last panel may be narrower.
  RNNKERN_INLINE int width(int64_t panel) const {
    const int64_t left = blocks() - panel * blocks_per_panel;
    return int(left < blocks_per_panel ? left : blocks_per_panel);
  }
  RNNKERN_INLINE int vectors(int64_t panel) const { return gates * width(panel); }
  // Elements of one k in this panel, and of everything before it at one k.
  RNNKERN_INLINE int64_t step(int64_t panel) const { return vectors(panel) * Vec<T>::kLanes; }
  RNNKERN_INLINE int64_t before(int64_t panel) const {
    return panel * gates * blocks_per_panel * Vec<T>::kLanes;
  }
  RNNKERN_INLINE int64_t row() const { return gates * blocks() * Vec<T>::kLanes; }
  RNNKERN_INLINE int64_t size(int64_t depth) const { return row() * depth; }
  RNNKERN_INLINE int64_t bytes(int64_t depth) const { return size(depth) * int64_t(sizeof(T)); }
  // Whether units fill the panel's vectors, so that weights can be read as they lie.
  RNNKERN_INLINE bool full(int64_t panel) const {
    return first_unit(panel) + width(panel) * Vec<T>::kLanes <= units;
  }
};

// Rows of a matrix, read as columns: out[i][l] = source[l * ld + i] for kColumns consecutive i.
// Half a register of each row comes in one piece.
template <class T>
struct Transposed {
  using V = Vec<T>;
  using Raw = typename V::Raw;
  static constexpr int kLanes = V::kLanes, kPieces = kBytes > 16 ? 2 : 1,
                       kColumns = kLanes / kPieces;

  RNNKERN_INLINE static Raw gather(const T* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
    // Inserted from memory, which spares the one port that shuffles.
    const auto piece = [](const T* p) __attribute__((always_inline)) {
      return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm512_insertf32x8(_mm512_castps256_ps512(piece(p)), piece(p + step), 1));
#elif defined(__AVX2__)
    const auto piece = [](const T* p) __attribute__((always_inline)) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(p));
    };
    return Raw(_mm256_insertf128_ps(_mm256_castps128_ps256(piece(p)), piece(p + step), 1));
#else
    return V::load(p).v;
#endif
  }
  // Per piece: the lower (or upper) halves of a and b, interleaved.
  template <int kHigh, int... I>
  RNNKERN_INLINE static Raw zip(Raw a, Raw b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(
        a, b,
        (I / kColumns * kColumns + kHigh * kColumns / 2 + I % kColumns / 2 + I % 2 * kLanes)...);
  }

  RNNKERN_INLINE static void load(const T* source, int64_t ld, Raw* out) {
    constexpr auto all = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) out[i] = gather(source + i * ld, kColumns * ld);
#pragma GCC unroll 3
    for (int rounds = kColumns; rounds > 1; rounds /= 2) {
      Raw row[kColumns];
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) row[i] = out[i];
#pragma GCC unroll 4
      for (int i = 0; i < kColumns / 2; ++i) {
        out[2 * i] = zip<0>(row[i], row[i + kColumns / 2], all);
        out[2 * i + 1] = zip<1>(row[i], row[i + kColumns / 2], all);
      }
    }
  }
};

// out[k * step + l] = source[l * ld + k] for l < lanes, the rest zero
template <class T>
RNNKERN_INLINE void pack_transposed(const T* source, int64_t ld, int lanes, int64_t depth, T* out,
                                    int64_t step, bool past_caches) {
  using Columns = Transposed<T>;
  int64_t k = 0;
  if (lanes == Vec<T>::kLanes)
    for (; k + Columns::kColumns <= depth; k += Columns::kColumns) {
      typename Vec<T>::Raw column[Columns::kColumns];
      Columns::load(source + k, ld, column);
#pragma GCC unroll 8
      for (int i = 0; i < Columns::kColumns; ++i) {
        T* const to = out + (k + i) * step;
        past_caches ? Vec<T>(column[i]).stream(to) : Vec<T>(column[i]).store(to);
      }
    }
  for (; k < depth; ++k) {
    int l = 0;
    for (; l < lanes; ++l) out[k * step + l] = source[l * ld + k];
    for (; l < Vec<T>::kLanes; ++l) out[k * step + l] = 0;
  }
}

// Columns are the rows of `weight` (gates * units, depth): what multiplies x or h in the forward
// pass. gate_of(s) is the weight's gate that stands in place s.
template <class T, class GateOf>
void pack_gates(const Panels<T>& panels, int64_t panel, const T* weight, int64_t depth,
                GateOf gate_of, T* packed) {
  T* out = packed + panels.before(panel) * depth;
  const int width = panels.width(panel);
  for (int s = 0; s < panels.gates; ++s)
    for (int w = 0; w < width; ++w) {
      const int64_t unit = panels.first_unit(panel) + w * Vec<T>::kLanes;
      const int64_t left = panels.units - unit;
      const int lanes = int(left < Vec<T>::kLanes ? left : Vec<T>::kLanes);
      pack_transposed(weight + (gate_of(s) * panels.units + unit) * depth, depth, lanes, depth,
                      out + (s * width + w) * Vec<T>::kLanes, panels.step(panel),
                      panels.bytes(depth) >= kPastCaches);
    }
}

// The first `count` elements of a row; a last vector that is `whole` ends in zeros.
template <class T>
RNNKERN_INLINE void copy_row(const T* from, int64_t count, T* to, bool whole) {
  using V = Vec<T>;
  for (int64_t c = 0; c < count; c += V::kLanes) {
    const int lanes = int(least<int64_t>(count - c, V::kLanes));
    V::load(from + c, lanes).store(to + c, whole ? V::kLanes : lanes);
  }
}

// Row k of the panel is a row of contiguous columns in memory: row_of(k).
template <class T, class RowOf>
RNNKERN_INLINE void pack_rows(const Panels<T>& panels, int64_t panel, int64_t depth, RowOf row_of,
                              T* out) {
  const int64_t first = panels.first_unit(panel), step = panels.step(panel);
  const int64_t columns = least(step, panels.units - first);
  for (int64_t k = 0; k < depth; ++k, out += step) copy_row(row_of(k) + first, columns, out, true);
}

}  // namespace rnnkern::RNNKERN_ISA
