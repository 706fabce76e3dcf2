// The engine as bindings see it: one table of functions per instruction set, and the choice of one.
#pragma once
#include "../core/cell_facts.h"
#include "../core/layer_params.h"
#include "runtime/plan.h"
#include "runtime/team.h"
#include "runtime/workspace.h"

namespace rnnkern {

enum class MathFunction : int { exp, sigmoid, tanh, log, softplus, log_sigmoid };

template <class T>
struct KernelTable {
  void (*forward)(const ForwardParams<T>&, const Plan&, const ParallelFor&, Workspace&);
  void (*backward)(const BackwardParams<T>&, const Plan&, const ParallelFor&, Workspace&);
  // Packs a layer's weights behind the header; null: counts their bytes, with the header.
  size_t (*prepack)(const ForwardParams<T>&, PrepackedHeader*);
  void (*math)(MathFunction, const T* in, T* out, int64_t count);
};

struct Engine {
  const char* name;
  int vector_bytes;
  KernelTable<float> f32;
  KernelTable<double> f64;
  KernelTable<bfloat16> bf16;  // null at levels without bf16 FMAs
  // FMAs on registers alone; returns the number of floating-point operations.
  double (*peak_fma_loop)(int64_t iterations);

  template <class T>
  const KernelTable<T>& of() const {
    if constexpr (sizeof(T) == 2)
      return bf16;
    else if constexpr (sizeof(T) == 4)
      return f32;
    else
      return f64;
  }
};

// The levels that this CPU can run, slowest first; count receives their number.
RNNKERN_API const Engine* const* available_engines(int* count);

// The fastest available level, or the one that RNNKERN_CPU names.
RNNKERN_API const Engine& engine();

// A cell that is not built in, with kernels for it alone: a library of its own has them, at one
// level (cpu/added_cell.h), and lives as long as the process.
struct AddedCell {
  CellFacts facts;
  Engine engine;  // `name` is of the level; math and peak_fma_loop are null
};
// Returns its number, a CellId; -1 where there is no room for more.
RNNKERN_API int add_cell(const AddedCell& cell);

// The engine that computes layers of this cell.
RNNKERN_API const Engine& engine_of(CellId cell);

// Whether the engine computes layers of T without conversion. bf16 pairs need even sizes.
template <class T>
bool supports(CellId cell, int64_t input_size, int64_t hidden_size, int64_t proj_size) {
  return engine_of(cell).of<T>().forward &&
         (kVnniFactor<T> == 1 || (input_size % 2 == 0 && hidden_size % 2 == 0 && !proj_size));
}

// Forces a level by name (for tests); false where there is none of that name.
RNNKERN_API bool select_engine(const char* name);

// The bytes that prepack() fills. The layer says its cell, sizes, directions and weights; nothing
// else is read.
template <class T>
RNNKERN_API size_t prepacked_bytes(const LayerParams<T>& layer, WeightFormat format);
// Packs the weights for the chosen level, into memory aligned to PrepackedHeader::kAlignment. `tag`
// is the caller's.
template <class T>
RNNKERN_API void prepack(const LayerParams<T>& layer, WeightFormat format, int tag, void* memory);
// What keeps the chosen level from using such memory; null: nothing.
RNNKERN_API const char* prepacked_refusal(const void* memory, size_t bytes);

// The plan of a forward pass.
template <class T>
Plan plan_forward(const ForwardParams<T>& p, int threads);

template <class T>
RNNKERN_API void forward(const ForwardParams<T>& p, const ParallelFor& parallel, int threads);
template <class T>
RNNKERN_API void backward(const BackwardParams<T>& p, const ParallelFor& parallel, int threads);

}  // namespace rnnkern
