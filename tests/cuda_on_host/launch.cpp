// The CUDA engine without a GPU: each launch runs every thread of its grid on the CPU, one after
// the other, with the index arithmetic of the kernels (pointwise.h). Together with
// csrc/bindings/cuda_ops.cpp this makes operators that torch calls on CPU tensors.
//
// torch::stable's mm in the half types with a float32 result exists on CUDA only; test_cuda_host.py
// supplies it.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "../../csrc/cuda/cluster_backward.h"
#include "../../csrc/cuda/cluster_forward.h"

namespace rnnkern::cuda {
namespace {

int64_t launches = 0;

template <class F>
void each_thread(const Grid& g, F&& body) {
  ++launches;
  for (int64_t by = 0; by < g.blocks_y; ++by)
    for (int64_t bx = 0; bx < g.blocks_x; ++bx)
      for (int64_t ty = 0; ty < g.threads_y; ++ty)
        for (int64_t tx = 0; tx < g.threads_x; ++tx)
          body(Lane{by * g.threads_y + ty, int64_t(g.blocks_y) * g.threads_y, bx * g.threads_x + tx,
                    int64_t(g.blocks_x) * g.threads_x});
}

template <class F>
void visit_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float64: return f(double{});
    case Storage::bfloat16: return f(c10::BFloat16{});
    case Storage::float16: return f(c10::Half{});
    default: return f(float{});
  }
}

}  // namespace

const char* launch_forward(int cell, Storage storage, const ForwardStep& step, Stream) {
  visit_cell(CellId(cell), [&](auto c) {
    visit_storage(storage, [&](auto type) {
      each_thread(make_grid(step.batch, step.units),
                  [&](const Lane& lane) { forward_lane<decltype(c), decltype(type)>(step, lane); });
    });
  });
  return nullptr;
}

const char* launch_backward(int cell, Storage storage, const BackwardStep& step, Stream) {
  visit_cell(CellId(cell), [&](auto c) {
    visit_storage(storage, [&](auto type) {
      each_thread(make_grid(step.batch, step.units), [&](const Lane& lane) {
        backward_lane<decltype(c), decltype(type)>(step, lane);
      });
    });
  });
  return nullptr;
}

const char* launch_total(Storage storage, const BackwardStep& step, Stream) {
  visit_storage(storage, [&](auto type) {
    each_thread(make_grid(step.batch, step.width),
                [&](const Lane& lane) { total_lane<decltype(type)>(step, lane); });
  });
  return nullptr;
}

const char* launch_add(Storage storage, bool accumulated, int64_t count, const void* a,
                       const void* b, void* out, Stream) {
  visit_storage(storage, [&](auto type) {
    using T = decltype(type);
    const auto add = [&](auto operand) {
      using S = decltype(operand);
      Grid g = make_grid(1, count);
      g.threads_y = 1;
      each_thread(g, [&](const Lane& lane) {
        add_lane(count, static_cast<const S*>(a), static_cast<const S*>(b), static_cast<T*>(out),
                 lane.unit, lane.unit_step);
      });
    };
    if (accumulated)
      add(Accumulated<T>{});
    else
      add(type);
  });
  return nullptr;
}

namespace {

bool runs = false;  // whether steps are taken together where a shape serves
int64_t run_launches = 0;

// float16 has sixteen batch rows to a cluster, the others eight: both widths run, and no more than
// these are compiled.
template <class F>
bool visit_run(int cell, Storage storage, int64_t units, F&& f) {
  bool found = false;
  visit_cell(CellId(cell), [&](auto c) {
    using Cell = decltype(c);
    if (storage == Storage::bfloat16)
      found = visit_shape<Cell, c10::BFloat16, 1>(
          units, [&](auto shape) { f(c, c10::BFloat16{}, shape); });
    else if (storage == Storage::float16)
      found = visit_shape<Cell, c10::Half, 2>(units, [&](auto shape) { f(c, c10::Half{}, shape); });
    else if (storage == Storage::float32)
      found = visit_shape<Cell, float, 1>(units, [&](auto shape) { f(c, float{}, shape); });
  });
  return found;
}

constexpr size_t kSharedBytes = 227 << 10;  // of a block on Hopper

template <class Run>
OnChip plan(int cell, Storage storage, int64_t units, int64_t batch) {
  OnChip chosen;
  visit_run(cell, storage, units, [&](auto c, auto type, auto shape) {
    using S = decltype(shape);
    const int blocks = blocks_for<S>(units);
    if (shared_bytes<decltype(c), decltype(type), S>(static_cast<const Run*>(nullptr), blocks) <=
        kSharedBytes)
      chosen = {blocks, int((batch + S::kRows - 1) / S::kRows), S::kRows};
  });
  return chosen;
}

template <class Run>
const char* launch_each(int cell, Storage storage, const Run* runs, int count) {
  const auto& step = runs->step;
  const OnChip chosen = plan<Run>(cell, storage, step.units, step.batch);
  visit_run(cell, storage, step.units, [&](auto c, auto type, auto shape) {
    using Cell = decltype(c);
    using T = decltype(type);
    using S = decltype(shape);
    for (const Run* run = runs; run < runs + count; ++run, ++run_launches)
      run_clusters(chosen.blocks, chosen.clusters, S::kThreads,
                   shared_bytes<Cell, T, S>(run, chosen.blocks),
                   [&] { run_cluster<Cell, T, S>(*run); });
  });
  return nullptr;
}

}  // namespace

OnChip on_chip(int cell, Storage storage, int64_t units, int64_t batch, bool backward, int) {
  if (!runs || !batch) return {};
  return backward ? plan<BackwardRun>(cell, storage, units, batch)
                  : plan<ForwardRun>(cell, storage, units, batch);
}

const char* launch_runs(int cell, Storage storage, const ForwardRun* runs, int count, Stream) {
  return launch_each(cell, storage, runs, count);
}

const char* launch_runs(int cell, Storage storage, const BackwardRun* runs, int count, Stream) {
  return launch_each(cell, storage, runs, count);
}

namespace {

int64_t count() { return launches; }
int64_t count_runs() { return run_launches; }
bool set_runs(bool wanted, int64_t seed) {
  delivery_seed = int(seed);
  return std::exchange(runs, wanted);
}

std::vector<int64_t> grid(int64_t rows, int64_t units) {
  const Grid g = make_grid(rows, units);
  return {g.blocks_x, g.blocks_y, g.threads_x, g.threads_y};
}

}  // namespace
}  // namespace rnnkern::cuda

STABLE_TORCH_LIBRARY(rnnkern_cuda_on_host, m) {
  m.def(
      "forward(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] weights, "
      "int cell, bool batch_first, bool train) -> (Tensor output, Tensor h_n, Tensor c_n, "
      "Tensor saved, Tensor cells)");
  m.def(
      "backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor input, "
      "Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor output, "
      "Tensor saved, Tensor cells, int cell, bool batch_first, int needs, bool flow) -> "
      "(Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights, Tensor flow_h, "
      "Tensor flow_c)");
  m.def(
      "cuda_plan(Tensor input, int cell, int steps, int batch, int hidden_size, int proj_size, "
      "int directions, bool packed, bool backward) -> str");
  m.def("set_chunk(int sums) -> int");
  m.def("launches() -> int");
  m.def("run_launches() -> int");
  m.def("set_runs(bool wanted, int seed) -> bool");
  m.def("grid(int rows, int units) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&rnnkern::cuda::count));
  m.impl("run_launches", TORCH_BOX(&rnnkern::cuda::count_runs));
  m.impl("set_runs", TORCH_BOX(&rnnkern::cuda::set_runs));
  m.impl("grid", TORCH_BOX(&rnnkern::cuda::grid));
}
