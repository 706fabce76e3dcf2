// The launches of csrc/cuda/params.h without a GPU. A stepwise launch runs the threads of its grid
// one after the other, a persistent one on the simulated chip. Together with
// csrc/bindings/torch_cuda_*.cpp this makes operators that torch calls on CPU tensors.
//
// torch has mm of half types with a float32 result on CUDA only: cuda/test_on_host.py brings one.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../../csrc/bindings/schemas.h"
#include "../../csrc/cuda/cluster/backward.h"
#include "../../csrc/cuda/cluster/forward.h"
#include "../../csrc/cuda/stepwise/elements.h"

namespace rnnkern::cuda {
namespace {

int64_t launches = 0;

template <class F>
void for_each_thread(const Grid& g, F&& body) {
  ++launches;
  for (int64_t by = 0; by < g.blocks_y; ++by)
    for (int64_t bx = 0; bx < g.blocks_x; ++bx)
      for (int64_t ty = 0; ty < g.threads_y; ++ty)
        for (int64_t tx = 0; tx < g.threads_x; ++tx)
          body(GridStride{by * g.threads_y + ty, int64_t(g.blocks_y) * g.threads_y,
                          bx * g.threads_x + tx, int64_t(g.blocks_x) * g.threads_x});
}

template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float64: return f(double{});
    case DType::bfloat16: return f(c10::BFloat16{});
    case DType::float16: return f(c10::Half{});
    default: return f(float{});
  }
}

// f(storage type, type of an operand): the accumulation type or the storage type.
template <class F>
void dispatch_operand(DType dtype, bool accumulated, F&& f) {
  dispatch_dtype(dtype, [&](auto type) {
    if (accumulated)
      f(type, Acc<decltype(type)>{});
    else
      f(type, type);
  });
}

}  // namespace

const char* launch_forward(int cell, DType dtype, const StepForwardParams& step, Stream) {
  visit_cell(CellId(cell), [&](auto c) {
    dispatch_dtype(dtype, [&](auto type) {
      for_each_thread(make_grid(step.batch, step.units), [&](const GridStride& at) {
        forward_grid_stride<decltype(c), decltype(type)>(step, at);
      });
    });
  });
  return nullptr;
}

const char* launch_backward(int cell, DType dtype, const StepBackwardParams& step, Stream) {
  visit_cell(CellId(cell), [&](auto c) {
    dispatch_dtype(dtype, [&](auto type) {
      for_each_thread(make_grid(step.batch, step.units), [&](const GridStride& at) {
        backward_grid_stride<decltype(c), decltype(type)>(step, at);
      });
    });
  });
  return nullptr;
}

const char* launch_dh_total(DType dtype, const StepBackwardParams& step, Stream) {
  dispatch_dtype(dtype, [&](auto type) {
    for_each_thread(make_grid(step.batch, step.width),
                    [&](const GridStride& at) { dh_total_grid_stride<decltype(type)>(step, at); });
  });
  return nullptr;
}

const char* launch_end_gradients(DType dtype, const StepBackwardParams& step, Stream) {
  dispatch_dtype(dtype, [&](auto type) {
    for_each_thread(make_grid(step.batch, step.units), [&](const GridStride& at) {
      end_gradients_grid_stride<decltype(type)>(step, at);
    });
  });
  return nullptr;
}

const char* launch_reset(DType dtype, bool accumulated, const ResetParams& resets,
                         const RowsByStep<const void>& from, int64_t t, int64_t batch,
                         int64_t width, void* state, Stream) {
  dispatch_operand(dtype, accumulated, [&](auto type, auto operand) {
    for_each_thread(make_grid(batch, width), [&](const GridStride& at) {
      reset_grid_stride<decltype(type)>(resets, from, t, batch, width,
                                        static_cast<decltype(operand)*>(state), at);
    });
  });
  return nullptr;
}

const char* launch_add(DType dtype, bool accumulated, int64_t count, const void* a, const void* b,
                       void* out, Stream) {
  Grid g = make_grid(1, count);
  g.threads_y = 1;
  dispatch_operand(dtype, accumulated, [&](auto type, auto operand) {
    using S = decltype(operand);
    for_each_thread(g, [&](const GridStride& at) {
      add_grid_stride(count, static_cast<const S*>(a), static_cast<const S*>(b),
                      static_cast<decltype(type)*>(out), at.unit, at.unit_step);
    });
  });
  return nullptr;
}

namespace {

bool persistent = false;  // whether the persistent engine is taken where it has a tiling
int64_t persistent_launches = 0;

// float16 has two batch tiles to a cluster, the others one: each is compiled for one type alone.
template <class F>
bool dispatch_persistent(int cell, DType dtype, int64_t units, F&& f) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    if (dtype == DType::bfloat16)
      found = dispatch_config<Cell, c10::BFloat16, 1>(
          units, [&](auto config) { f(c, c10::BFloat16{}, config); });
    else if (dtype == DType::float16)
      found = dispatch_config<Cell, c10::Half, 2>(units,
                                                  [&](auto config) { f(c, c10::Half{}, config); });
    else if (dtype == DType::float32)
      found = dispatch_config<Cell, float, 1>(units, [&](auto config) { f(c, float{}, config); });
  });
  return found;
}

constexpr size_t kMaxSmemBytes = 227 << 10;  // of a block on Hopper

template <class Params>
PersistentPlan plan(int cell, DType dtype, int64_t units, int64_t batch) {
  PersistentPlan chosen;
  dispatch_persistent(cell, dtype, units, [&](auto c, auto type, auto config) {
    using Config = decltype(config);
    const int blocks = cluster_size_for<Config>(units);
    if (smem_bytes<decltype(c), decltype(type), Config>(static_cast<const Params*>(nullptr),
                                                        blocks) <= kMaxSmemBytes)
      chosen = {blocks, int((batch + Config::kBatchRows - 1) / Config::kBatchRows),
                Config::kBatchRows};
  });
  return chosen;
}

template <class Params>
const char* launch_each(int cell, DType dtype, const Params* params, int directions) {
  const auto& step = params->step;
  const PersistentPlan chosen = plan<Params>(cell, dtype, step.units, step.batch);
  dispatch_persistent(cell, dtype, step.units, [&](auto c, auto type, auto config) {
    using Cell = decltype(c);
    using T = decltype(type);
    using Config = decltype(config);
    for (const Params* each = params; each < params + directions; ++each, ++persistent_launches)
      launch_clusters(chosen.blocks, chosen.clusters, Config::kThreads,
                      smem_bytes<Cell, T, Config>(each, chosen.blocks), [&] {
                        if (step.resets.mask.data)
                          persistent_thread<Cell, T, Config, true>(*each);
                        else
                          persistent_thread<Cell, T, Config, false>(*each);
                      });
  });
  return nullptr;
}

}  // namespace

PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int, bool) {
  if (!persistent || !batch) return {};
  return backward ? plan<PersistentBackwardParams>(cell, dtype, units, batch)
                  : plan<PersistentForwardParams>(cell, dtype, units, batch);
}

const char* launch_persistent(int cell, DType dtype, const PersistentForwardParams* params,
                              int directions, Stream) {
  return launch_each(cell, dtype, params, directions);
}

const char* launch_persistent(int cell, DType dtype, const PersistentBackwardParams* params,
                              int directions, Stream) {
  return launch_each(cell, dtype, params, directions);
}

namespace {

int64_t count_launches() { return launches; }
int64_t count_persistent() { return persistent_launches; }
bool set_persistent(bool enabled, int64_t seed) {
  schedule_seed = int(seed);
  return std::exchange(persistent, enabled);
}

std::vector<int64_t> grid(int64_t rows, int64_t units) {
  const Grid g = make_grid(rows, units);
  return {g.blocks_x, g.blocks_y, g.threads_x, g.threads_y};
}

}  // namespace
}  // namespace rnnkern::cuda

STABLE_TORCH_LIBRARY(rnnkern_cuda_on_host, m) {
  m.def(RNNKERN_FORWARD_SCHEMA);
  m.def(RNNKERN_BACKWARD_SCHEMA);
  m.def(
      "cuda_plan(Tensor input, int cell, int steps, int batch, int hidden_size, int proj_size, "
      "int directions, bool packed, bool backward) -> str");
  m.def("set_chunk(int sums) -> int");
  m.def("launches() -> int");
  m.def("persistent_launches() -> int");
  m.def("set_persistent(bool enabled, int seed) -> bool");
  m.def("grid(int rows, int units) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&rnnkern::cuda::count_launches));
  m.impl("persistent_launches", TORCH_BOX(&rnnkern::cuda::count_persistent));
  m.impl("set_persistent", TORCH_BOX(&rnnkern::cuda::set_persistent));
  m.impl("grid", TORCH_BOX(&rnnkern::cuda::grid));
}
