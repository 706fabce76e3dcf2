// Packing of B into panels (packed_layout.h): from the rows of a weight matrix, transposed, or from
// rows that are k already.
#pragma once
#include "packed_layout.h"
#include "transpose_load.h"

namespace rnnkern::RNNKERN_ISA {

// Packed sizes from which stores bypass the caches, which would read first what is overwritten.
constexpr int64_t kNonTemporalBytes = 2 << 20;

// out[k * ldb + l] = source[l * ld + k] for l < lanes; the rest is zero.
template <class F>
RNNKERN_INLINE void pack_transposed(const F* source, int64_t ld, int lanes, int64_t depth, F* out,
                                    int64_t ldb, bool non_temporal) {
  using Columns = TransposeLoad<F>;
  int64_t k = 0;
  if (lanes == Vec<F>::kLanes)
    for (; k + Columns::kColumns <= depth; k += Columns::kColumns) {
      typename Vec<F>::Raw column[Columns::kColumns];
      Columns::load(source + k, ld, column);
#pragma GCC unroll 8
      for (int i = 0; i < Columns::kColumns; ++i) {
        F* const to = out + (k + i) * ldb;
        non_temporal ? Vec<F>(column[i]).stream(to) : Vec<F>(column[i]).store(to);
      }
    }
  for (; k < depth; ++k) {
    int l = 0;
    for (; l < lanes; ++l) out[k * ldb + l] = source[l * ld + k];
    for (; l < Vec<F>::kLanes; ++l) out[k * ldb + l] = F{};
  }
}

// Packs a panel whose columns are rows of `weight` (gates * units, depth): B of the gate GEMMs.
// gate_of(s) is the weight's gate in place s of the panel.
template <class F, class GateOf>
void pack_gates(const PackedLayout<F>& panels, int64_t panel, const F* weight, int64_t depth,
                GateOf gate_of, F* packed) {
  F* out = packed + panels.offset(panel) * depth;
  const int width = panels.unit_vectors(panel), gate_stride = panels.gate_stride(panel);
  if (gate_stride < width * Vec<F>::kLanes) {
    const int64_t first = panels.first_unit(panel), ldb = panels.ldb(panel);
    for (int64_t c = 0; c < ldb; ++c) {
      const int64_t s = c / gate_stride, unit = first + c % gate_stride;
      for (int64_t k = 0; k < depth; ++k)
        out[k * ldb + c] =
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

// The row of `weight` that is column c of a panel; null for a column of padding.
template <class F, class GateOf>
const F* column_source(const PackedLayout<F>& panels, int64_t panel, int64_t c, const F* weight,
                       int64_t depth, GateOf gate_of) {
  const int gate_stride = panels.gate_stride(panel);
  const int64_t s = c / gate_stride, unit = panels.first_unit(panel) + c % gate_stride;
  if (s >= panels.gates || unit >= panels.units) return nullptr;
  return weight + (gate_of(int(s)) * panels.units + unit) * depth;
}

// As pack_gates, with two consecutive k, rounded to bfloat16, in the place of one float.
template <class GateOf>
void pack_gates_bf16(const PackedLayout<float>& panels, int64_t panel, const float* weight,
                     int64_t depth, GateOf gate_of, float* packed) {
  const int64_t rows = (depth + 1) / 2, ldb = panels.ldb(panel);
  float* const out = packed + panels.offset(panel) * rows;
  for (int64_t c = 0; c < ldb; ++c) {
    const float* const from = column_source(panels, panel, c, weight, depth, gate_of);
    for (int64_t k = 0; k < depth; k += 2) {
      bf16x2 pair{};
      if (from) pair.first = round_to_bf16(from[k]);
      if (from && k + 1 < depth) pair.second = round_to_bf16(from[k + 1]);
      std::memcpy(out + k / 2 * ldb + c, &pair, sizeof pair);
    }
  }
}

// Packs row k, with the next row interleaved where the VNNI factor is 2: `count` columns from
// `first` on. A last vector that is `whole` is padded with zeros.
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

// Packs a panel of the matrix whose rows are row_of(k), asked for in order; zeros fill it up to
// `depth` packed elements.
template <class T, class RowOf>
RNNKERN_INLINE void pack_rows(const PackedLayout<PackedElem<T>>& panels, int64_t panel,
                              int64_t rows, RowOf row_of, int64_t depth, PackedElem<T>* out) {
  const int64_t first = panels.first_unit(panel), ldb = panels.ldb(panel);
  const int64_t columns = min(ldb, panels.units - first);
  const PackedElem<T>* const end = out + depth * ldb;
  for (int64_t k = 0; k < rows; k += kVnniFactor<T>, out += ldb)
    pack_k_row<T>(row_of, k, rows, first, columns, out, true);
  if (out < end) std::memset(out, 0, (end - out) * sizeof *out);
}

}  // namespace rnnkern::RNNKERN_ISA
