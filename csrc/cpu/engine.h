// The engine as the bindings see it: one table of functions per instruction set, and the choice.
#pragma once
#include "params.h"
#include "plan.h"
#include "team.h"

namespace rnnkern {

enum class MathFunction : int { exp, sigmoid, tanh };

template <class T>
struct EngineOf {
  void (*forward)(const Forward<T>&, const Plan&, const ParallelFor&, Workspace&);
  void (*backward)(const Backward<T>&, const Plan&, const ParallelFor&, Workspace&);
  void (*math)(MathFunction, const T* in, T* out, int64_t count);
};

struct Engine {
  const char* name;
  int vector_bytes;
  EngineOf<float> f32;
  EngineOf<double> f64;
  EngineOf<bfloat16> bf16;  // null at the levels that do not multiply them as they are
  // Runs fused multiply-adds on registers alone; returns the floating-point operations done.
  double (*burn)(int64_t iterations);

  template <class T>
  const EngineOf<T>& of() const {
    if constexpr (sizeof(T) == 2)
      return bf16;
    else if constexpr (sizeof(T) == 4)
      return f32;
    else
      return f64;
  }
};

// The levels that this CPU can run, slowest first; count receives their number.
const Engine* const* available_engines(int* count);

// The fastest available level, or the one that RNNKERN_CPU names.
const Engine& engine();

// Whether the engine takes layers of T as they are. Pairs of bfloat16 need even sizes.
template <class T>
bool takes(int64_t input_size, int64_t hidden_size, int64_t proj_size) {
  return engine().of<T>().forward &&
         (kTerms<T> == 1 || (input_size % 2 == 0 && hidden_size % 2 == 0 && !proj_size));
}

// Forces a level by name (for tests); false where there is none of that name.
bool select_engine(const char* name);

template <class T>
void forward(const Forward<T>& p, const ParallelFor& parallel, int threads);
template <class T>
void backward(const Backward<T>& p, const ParallelFor& parallel, int threads);

}  // namespace rnnkern
