// The GEMM of int8 weights: four consecutive k of a column are the bytes of one 32-bit lane.
//
//   A   rows of int8, quantised in each step, with a scale per row
//   B   panels of int8 (packed_layout.h; a k of the layout is four), with a scale per column
//   C   scale of the row x scale of the column x sum. The sum is exact: the same integer at every
//       instruction-set level.
#pragma once
#include "../runtime/tuning.h"
#include "../simd/math.h"
#include "engine_gemm.h"
#include "pack.h"

namespace rnnkern::RNNKERN_ISA {

constexpr int64_t kInt8K = 4;  // k in a lane
// -128 is not used: its negative is no int8.
constexpr float kInt8Max = 127.f;

// Lanes that hold `depth` k.
constexpr int64_t int8_lanes(int64_t depth) { return (depth + kInt8K - 1) / kInt8K; }

// The panels of one matrix and, for each column in the order of the panels, its scale and the sum
// of its bytes.
struct Int8Matrix {
  int32_t* panels;
  float* scales;
  int32_t* sums;
};

// Quantised rows: row r has its bytes at data + r * stride and its scale at scale + r * stride.
struct Int8Rows {
  const int32_t* data;
  const float* scale;
  int64_t stride;

  Int8Rows from(int64_t r) const { return {data + r * stride, scale + r * stride, stride}; }
};

// Values as round(value / scale), with scale = the largest magnitude / 127. Where one of them is
// not finite, the scale is NaN, and so is every sum with them.
struct Quantizer {
  float scale, inverse;  // inverse 0: all bytes are 0

  Quantizer(const float* values, int64_t count) {
    using V = Vec<float>;
    constexpr float kLargest = 3.40282347e38f;
    constexpr float kNoise = 1e-30f;  // magnitudes whose reciprocal may overflow count as zeros
    V most(0);
    typename V::Bits bad{};
    for (int64_t k = 0; k < count; k += V::kLanes) {
      const V size = absolute(V::load(values + k, int(min<int64_t>(count - k, V::kLanes))));
      bad |= ~(size.v <= V(kLargest).v);
      most = V::select(size.v > most.v, size, most);
    }
    float largest = kNoise;
    bool finite = true;
    for (int l = 0; l < V::kLanes; ++l)
      largest = max<float>(largest, most.v[l]), finite = finite && !bad[l];
    const bool zeros = !finite || largest == kNoise;
    scale = !finite ? __builtin_nanf("") : zeros ? 0.f : largest / kInt8Max;
    inverse = zeros ? 0.f : kInt8Max / largest;
  }

  int8_t operator()(float value) const { return int8_t(__builtin_rintf(value * inverse)); }
};

// A row as bytes, zeros up to whole lanes; returns its scale.
inline float quantize(const float* values, int64_t count, int8_t* out) {
  const Quantizer quantized(values, count);
  const int64_t used = quantized.inverse != 0 ? count : 0;
  for (int64_t k = 0; k < used; ++k) out[k] = quantized(values[k]);
  for (int64_t k = used; k < kInt8K * int8_lanes(count); ++k) out[k] = 0;
  return quantized.scale;
}

// Quantises and packs one panel, as pack_gates packs it in floats.
template <class GateOf>
void pack_gates_int8(const PackedLayout<float>& panels, int64_t panel, const float* weight,
                     int64_t depth, GateOf gate_of, const Int8Matrix& packed) {
  const int64_t lanes = int8_lanes(depth), ldb = panels.ldb(panel), first = panels.offset(panel);
  int32_t* const out = packed.panels + first * lanes;
  for (int64_t c = 0; c < ldb; ++c) {
    const float* const from = column_source(panels, panel, c, weight, depth, gate_of);
    const Quantizer quantized(from, from ? depth : 0);
    const int64_t used = quantized.inverse != 0 ? depth : 0;
    int32_t sum = 0;
    for (int64_t k = 0; k < lanes; ++k) {
      int8_t bytes[kInt8K] = {};
      for (int64_t i = 0; i < kInt8K && k * kInt8K + i < used; ++i)
        sum += bytes[i] = quantized(from[k * kInt8K + i]);
      std::memcpy(out + k * ldb + c, bytes, sizeof bytes);
    }
    packed.scales[first + c] = quantized.scale;
    packed.sums[first + c] = sum;
  }
}

using IntVec = RawTypes<float>::Bits;  // of int32_t

// How a level multiplies bytes. `kOffset` is added to a row's bytes before, and its product with a
// column's sum taken off again.
#if defined(__AVX512F__)
struct Vnni {
  static constexpr int kOffset = 128;  // the row's factor is unsigned
  static RNNKERN_INLINE void dot(IntVec& sum, int32_t a, const IntVec& b) {
    // The instruction is not part of this level: tuning.h says whether this CPU has it.
    auto s = sum;
    asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"((a ^ int32_t(0x80808080)) - IntVec{}), "v"(b));
    sum = s;
  }
};
struct NoVnni {
  static constexpr int kOffset = 0;
  // The sign moves from the row to the column: |a| is unsigned, and no pair of products overflows.
  static RNNKERN_INLINE void dot(IntVec& sum, int32_t a, const IntVec& b) {
    const __m512i row = __m512i(a - IntVec{}), column = __m512i(b);
    const __m512i moved =
        _mm512_mask_sub_epi8(column, _mm512_movepi8_mask(row), _mm512_setzero_si512(), column);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(row), moved);
    sum += IntVec(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};
#elif defined(RNNKERN_NEON)
struct NoVnni {
  static constexpr int kOffset = 0;
  // Two products fit 16 bits.
  static RNNKERN_INLINE void dot(IntVec& sum, int32_t a, const IntVec& b) {
    const int8x16_t row = int8x16_t(a - IntVec{}), column = int8x16_t(b);
    const int16x8_t low = vmull_s8(vget_low_s8(row), vget_low_s8(column));
    sum = IntVec(vpadalq_s16(int32x4_t(sum), vpaddq_s16(low, vmull_high_s8(row, column))));
  }
};
#if defined(__clang__) && __clang_major__ < 19
using Vnni = NoVnni;  // whose assembler refuses the instruction
#else
struct Vnni {
  static constexpr int kOffset = 0;
  static RNNKERN_INLINE void dot(IntVec& sum, int32_t a, const IntVec& b) {
    // No part of this level, as above. The directive is for the assembler alone: it lists what
    // levels of this file may have.
    auto s = sum;
    asm(".arch armv8.2-a+dotprod+bf16\n\t"
        "sdot %0.4s, %2.16b, %1.4b[0]"
        : "+w"(s)
        : "w"(a - IntVec{}), "w"(b));
    sum = s;
  }
};
#endif
#else
struct NoVnni {
  static constexpr int kOffset = 0;
  static RNNKERN_INLINE void dot(IntVec& sum, int32_t a, const IntVec& b) {
#if defined(__AVX2__)
    // The sign moves from the row to the column: |a| is unsigned, and no pair of products
    // overflows.
    const __m256i row = __m256i(a - IntVec{});
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(__m256i(b), row));
    sum += IntVec(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int shift = 24; shift >= 0; shift -= 8) sum += (b << shift >> 24) * (a << shift >> 24);
#endif
  }
};
using Vnni = NoVnni;
#endif

// C = beta C + the product, for MR rows and NR vectors of a panel whose columns begin at `column`.
template <class Dot, int MR, int NR>
void microkernel_int8(const Int8Rows& a, const Int8Matrix& b, int64_t column, int64_t lanes,
                      const COperand<float>& c) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  IntVec sums[MR][NR] = {};
  const int32_t* line = b.panels + column * lanes;
  for (int64_t k = 0; k < lanes; ++k, line += NR * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < NR; ++v) {
      const IntVec bytes = IntVec(V::load(reinterpret_cast<const float*>(line) + v * kLanes).v);
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) Dot::dot(sums[r][v], a.data[r * a.stride + k], bytes);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NR; ++v) {
    const int64_t at = column + v * kLanes;
    IntVec taken;
    std::memcpy(&taken, b.sums + at, sizeof taken);
    const V scale = V::load(b.scales + at);
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      const IntVec exact = sums[r][v] - Dot::kOffset * taken;
      const V product =
          V(__builtin_convertvector(exact, typename V::Raw)) * (scale * V(a.scale[r * a.stride]));
      float* const out = c.c + r * c.ldc + v * kLanes;
      (c.accumulate ? V::load(out) + product : product).store(out);
    }
  }
}

// The product for up to kMC rows of a panel.
template <class Dot>
void gemm_int8_rows(int rows, int nr, Int8Rows a, const Int8Matrix& b, int64_t column,
                    int64_t lanes, COperand<float> c) {
  using Microkernel =
      void (*)(const Int8Rows&, const Int8Matrix&, int64_t, int64_t, const COperand<float>&);
  static constexpr Microkernel four[] = {microkernel_int8<Dot, 4, 1>, microkernel_int8<Dot, 4, 2>,
                                         microkernel_int8<Dot, 4, 3>, microkernel_int8<Dot, 4, 4>};
  static constexpr Microkernel one[] = {microkernel_int8<Dot, 1, 1>, microkernel_int8<Dot, 1, 2>,
                                        microkernel_int8<Dot, 1, 3>, microkernel_int8<Dot, 1, 4>};
  for (int height; rows > 0; rows -= height, a = a.from(height), c.c += height * c.ldc) {
    height = rows >= 4 ? 4 : 1;
    (height == 4 ? four : one)[nr - 1](a, b, column, lanes, c);
  }
}

inline void gemm_int8(int rows, int nr, const Int8Rows& a, const Int8Matrix& b, int64_t column,
                      int64_t lanes, const COperand<float>& c) {
#if defined(RNNKERN_GEMM_OF_ENGINE)
  engine_gemm_int8(rows, nr, a, b, column, lanes, c);
#else
  const auto run = this_machine().has_vnni ? gemm_int8_rows<Vnni> : gemm_int8_rows<NoVnni>;
  run(rows, nr, a, b, column, lanes, c);
#endif
}

}  // namespace rnnkern::RNNKERN_ISA
