// How the CUDA operators walk a sequence: where the rows of a step lie, and which steps are taken
// together.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "../cuda/params.h"
#include "torch_cuda_tensors.h"

namespace rnnkern {

// A run loads the recurrent weights once: not worth it for a step or two.
constexpr int64_t kMinPersistentSteps = 4;

// Steps are taken in chunks that hold so many sums at a time, 256 MB in float32: what a call needs
// beyond its results and what is saved stays bounded, and no product has more elements than an int
// counts.
inline int64_t chunk_sums = int64_t(1) << 26;

inline int64_t chunk_of_steps(const Call& call, int64_t sums) {
  return std::clamp<int64_t>(chunk_sums / std::max<int64_t>(call.batch * sums, 1), 1, call.steps);
}

// A layer whose steps may be taken together.
struct PersistentLayer {
  CellId cell;
  ScalarType dtype;
  int64_t units;
  bool projected, backward;

  // How the current device takes so many steps with so many rows: its clusters, or none where it
  // goes step by step.
  cuda::PersistentPlan plan(int64_t steps, int64_t batch, int runs = 1) const {
    if (projected || steps < kMinPersistentSteps) return {};
    return cuda::persistent_plan(int(cell), cuda_dtype(dtype), units, batch, backward, runs);
  }
  // The same for both directions at once; they are of the same rows unless they are packed.
  cuda::PersistentPlan plan_both(int64_t steps, int64_t batch, int64_t directions,
                                 bool packed) const {
    return directions == 2 && !packed ? plan(steps, batch, 2) : cuda::PersistentPlan{};
  }
};

// Starts the last of the runs, and with it those that wait for it.
template <class AnyRun>
void launch_pending(const PersistentLayer& layer, std::vector<AnyRun>& runs,
                    const OnDevice& device) {
  check_launch(cuda::launch_persistent(int(layer.cell), cuda_dtype(layer.dtype), runs.data(),
                                       int(runs.size()), device.stream()));
  runs.clear();
}

// Where the rows of each step lie: numbered rows (time-major), and those of a given tensor.
struct Walk {
  const Call& call;

  int64_t row(int64_t t) const { return call.packed ? call.offsets[t] : t * call.batch; }
  int64_t active(int64_t t) const {
    return call.packed ? call.offsets[t + 1] - call.offsets[t] : call.batch;
  }
  // The t of the k-th step of a direction.
  int64_t time(int direction, int64_t k) const { return direction ? call.steps - 1 - k : k; }
  // How many steps have the same rows: the k-th and those after it, up to `end`; or, where `end` is
  // before k, the k-th and those before it, down to `end`.
  int64_t alike(int direction, int64_t k, int64_t end) const {
    if (!call.packed) return std::abs(end - k);
    const int64_t onward = k < end ? 1 : -1, rows = active(time(direction, k));
    int64_t count = 1;
    for (k += onward; k != end && active(time(direction, k)) == rows; k += onward) ++count;
    return count;
  }

  int64_t row_stride(const Tensor& t) const {
    return t.stride(call.packed || call.batch_first ? 0 : 1);
  }
  int64_t offset(const Tensor& tensor, int64_t t) const {
    if (call.packed) return call.offsets[t] * tensor.stride(0);
    return t * tensor.stride(call.batch_first ? 1 : 0);
  }

  // The rows of steps [begin, end) as a matrix, in order of their numbers: a view where possible,
  // and where its features are neighbours, so that bits do not depend on how the input lies.
  Tensor rows(const Tensor& tensor, int64_t begin, int64_t end) const {
    const int64_t count = row(end) - row(begin), features = tensor.size(tensor.dim() - 1);
    if (call.packed) {
      Tensor packed = tensor;
      return with_dense_rows(stable::narrow(packed, 0, row(begin), count));
    }
    Tensor by_time = call.batch_first ? stable::transpose(tensor, 0, 1) : tensor;
    return with_dense_rows(
        stable::reshape(stable::narrow(by_time, 0, begin, end - begin), {count, features}));
  }

  // A tensor of rows as the caller sees it, from its memory in time-major order.
  Tensor outward(const Tensor& memory) const {
    return call.batch_first ? stable::transpose(memory, 0, 1) : memory;
  }
  Tensor allocate(const Tensor& like, int64_t features) const {
    if (call.packed) return empty(like, like.scalar_type(), {call.rows, features});
    return empty(like, like.scalar_type(), {call.steps, call.batch, features});
  }
};

}  // namespace rnnkern
