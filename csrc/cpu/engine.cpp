// The engine of one instruction set, RNNKERN_ISA; compiled once for each. With RNNKERN_BF16 for
// bfloat16 alone: such a level adds nothing to other types.
#include "engine.h"

#include "rnn/backward.h"
#include "rnn/forward.h"
#include "rnn/prepack.h"

namespace rnnkern::RNNKERN_ISA {
namespace {

template <class T>
void forward(const ForwardParams<T>& p, const Plan& plan, const ParallelFor& parallel,
             Workspace& ws) {
  visit_cell(p.cell, [&](auto cell) { run_forward<decltype(cell)>(p, plan, parallel, ws); });
}

template <class T>
void backward(const BackwardParams<T>& p, const Plan& plan, const ParallelFor& parallel,
              Workspace& ws) {
  visit_cell(p.cell, [&](auto cell) { run_backward<decltype(cell)>(p, plan, parallel, ws); });
}

template <class T>
size_t pack_once(const ForwardParams<T>& p, PrepackedHeader* to) {
  size_t bytes = 0;
  visit_cell(p.cell, [&](auto cell) { bytes = prepack<decltype(cell)>(p, to); });
  return bytes;
}

#if !defined(RNNKERN_BF16)
template <class T>
void math(MathFunction function, const T* in, T* out, int64_t count) {
  using V = Vec<T>;
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const int lanes = int(min<int64_t>(count - i, V::kLanes));
    const V x = V::load(in + i, lanes);
    const auto y = [&] {
      switch (function) {
        case MathFunction::sigmoid: return sigmoid(x);
        case MathFunction::tanh: return tanh(x);
        case MathFunction::log: return log(x);
        case MathFunction::softplus: return softplus(x);
        case MathFunction::log_sigmoid: return log_sigmoid(x);
        default: return exp(x);
      }
    }();
    y.store(out + i, lanes);
  }
}

// As many accumulators as a register tile, with nothing to load.
double peak_fma_loop(int64_t iterations) {
  using V = Vec<float>;
  constexpr int kCount = kAccumulators;
  typename V::Raw sums[kCount];
  for (auto& s : sums) s = V(1.f).v;
  typename V::Raw a = V(0.999f).v, b = V(1e-3f).v;
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 24
    for (int k = 0; k < kCount; ++k) sums[k] = sums[k] * a + b;
  }
  for (auto& s : sums) asm volatile("" ::"m"(s));
  return 2. * kCount * V::kLanes * double(iterations);
}
#endif

}  // namespace

#if !defined(RNNKERN_BF16)
void engine_gemm(int rows, int nr, const GemmOperands<float>* pairs, int count,
                 const COperand<float>& c, bool bf16_b) {
  bf16_b ? gemm_simd<float, true>(rows, nr, pairs, count, c) : gemm_simd(rows, nr, pairs, count, c);
}
void engine_gemm(int rows, int nr, const GemmOperands<double>* pairs, int count,
                 const COperand<double>& c, bool) {
  gemm_simd(rows, nr, pairs, count, c);
}
void engine_gemm_unpacked(int rows, int nr, const UnpackedOperands<float>* pairs, int count,
                          const COperand<float>& c) {
  gemm_unpacked(rows, nr, pairs, count, c);
}
void engine_gemm_unpacked(int rows, int nr, const UnpackedOperands<double>* pairs, int count,
                          const COperand<double>& c) {
  gemm_unpacked(rows, nr, pairs, count, c);
}
void engine_gemm_int8(int rows, int nr, const Int8Rows& a, const Int8Matrix& b, int64_t column,
                      int64_t lanes, const COperand<float>& c) {
  gemm_int8(rows, nr, a, b, column, lanes, c);
}
#endif

#if defined(RNNKERN_BF16)
extern const KernelTable<bfloat16> engine;
const KernelTable<bfloat16> engine = {forward<bfloat16>, backward<bfloat16>, pack_once<bfloat16>,
                                      nullptr};
#else
#define RNNKERN_STRING_OF(x) #x
#define RNNKERN_STRING(x) RNNKERN_STRING_OF(x)
extern const Engine engine;
const Engine engine = {RNNKERN_STRING(RNNKERN_ISA),
                       kBytes,
                       {forward<float>, backward<float>, pack_once<float>, math<float>},
                       {forward<double>, backward<double>, pack_once<double>, math<double>},
                       {},
                       peak_fma_loop};
#endif

}  // namespace rnnkern::RNNKERN_ISA
