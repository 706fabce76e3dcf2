// The rows of a sequence in a tensor, and how its steps are grouped: into chunks that bound the
// workspace, and into persistent launches.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "layer_params.h"
#include "torch_cuda_tensors.h"

namespace rnnkern {

// A persistent launch loads the recurrent weights first, which does not pay for a step or two.
constexpr int64_t kMinPersistentSteps = 4;

// Pre-activations of a chunk, at most: 256 MB in float32. It bounds what a call needs beyond its
// results and saved tensors, and keeps the elements of a product within an int. The tests lower it.
inline int64_t max_chunk_elems = int64_t(1) << 26;

inline int64_t chunk_steps(const Call& call, int64_t preacts) {
  const int64_t per_step = std::max<int64_t>(call.batch * preacts, 1);
  return std::clamp<int64_t>(max_chunk_elems / per_step, 1, call.steps);
}

// One direction of a layer, as the persistent engine sees it.
struct PersistentLayer {
  CellId cell;
  ScalarType dtype;
  int64_t units;
  bool projected, backward, resets;

  // The grid for so many steps of so many rows; no blocks: the stepwise engine takes them.
  cuda::PersistentPlan plan(int64_t steps, int64_t batch, int directions = 1) const {
    if (projected || int(cell) >= kCellCount || steps < kMinPersistentSteps) return {};
    return cuda::persistent_plan(int(cell), cuda_dtype(dtype), units, batch, backward, directions,
                                 resets);
  }
  // For both directions in one launch. Packed directions differ in their rows.
  cuda::PersistentPlan plan_bidirectional(int64_t steps, int64_t batch, int64_t directions,
                                          bool packed) const {
    return directions == 2 && !packed ? plan(steps, batch, 2) : cuda::PersistentPlan{};
  }

  // One launch for the elements of `pending`, a direction each. The allocator may give away what
  // the blocks exchange by once it is put on the stream: later work comes after it.
  template <class Params>
  void launch(std::vector<Params>& pending, const DeviceScope& device, const Tensor& like) const {
    const int directions = int(pending.size());
    const cuda::PersistentPlan chosen = plan(pending[0].steps, pending[0].step.batch, directions);
    const Tensor exchange = empty(like, ScalarType::Byte, {directions * chosen.exchange_bytes});
    for (int d = 0; d < directions; ++d)
      pending[d].exchange = element_ptr(exchange, d * chosen.exchange_bytes);
    check_launch(cuda::launch_persistent(int(cell), cuda_dtype(dtype), chosen.group, pending.data(),
                                         directions, device.stream()));
    pending.clear();
  }
};

// A state after resets, (D, B, ·) or by step as the input is, or its gradient.
template <class V>
cuda::RowsByStep<V> reset_rows_by_step(const Call& call, const Tensor& state) {
  if (!state.numel()) return {};
  const SequenceView<V> rows = reset_rows<V>(call, state);
  return {rows.data, rows.t_stride, rows.b_stride};
}

inline cuda::ResetParams reset_params(const Call& call, const Resets& resets) {
  cuda::ResetParams p{};
  if (!resets.mask) return p;
  const Tensor& mask = *resets.mask;
  const int step = call.batch_first ? 1 : 0;
  p.steps = call.steps;
  p.mask = {static_cast<const uint8_t*>(element_ptr(mask)), mask.stride(step),
            mask.stride(1 - step)};
  if (resets.state.size() > 0) p.h = reset_rows_by_step<const void>(call, resets.state[0]);
  if (resets.state.size() > 1) p.c = reset_rows_by_step<const void>(call, resets.state[1]);
  return p;
}

// The masks of a direction, (T, B, kMasks, H) or packed (rows, kMasks, H), by step.
struct MaskRows {
  const void* data;
  int64_t t_stride, b_stride;
  const int64_t* offsets;  // packed: the first row of each step

  MaskRows(const Call& call, const MaybeTensor& masks, int direction)
      : data(nullptr),
        t_stride(0),
        b_stride(0),
        offsets(nullptr) {
    if (!masks) return;
    data = element_ptr(*masks, direction * masks->stride(0));
    const int step = call.batch_first ? 2 : 1;
    b_stride = masks->stride(call.packed ? 1 : 3 - step);
    if (call.packed)
      offsets = call.offsets.data();
    else
      t_stride = masks->stride(step);
  }

  void set(cuda::CellOperands& cell, int64_t t) const {
    cell.masks = data;
    cell.masks_stride = b_stride;
    cell.masks_offset = offsets ? offsets[t] * b_stride : t * t_stride;
  }
};

// Rows by number, in time-major order or as packed, and in a given tensor.
struct SequenceRows {
  const Call& call;

  int64_t row(int64_t t) const { return call.packed ? call.offsets[t] : t * call.batch; }
  int64_t batch_at(int64_t t) const {
    return call.packed ? call.offsets[t + 1] - call.offsets[t] : call.batch;
  }
  // The t of the k-th step of a direction.
  int64_t time(int direction, int64_t k) const { return direction ? call.steps - 1 - k : k; }

  // The number of steps with the same batch rows as the k-th: from it on and before `end`; or, for
  // `end` < k, from it back and after `end`.
  int64_t steps_with_same_batch(int direction, int64_t k, int64_t end) const {
    if (!call.packed) return std::abs(end - k);
    const int64_t sign = k < end ? 1 : -1, batch = batch_at(time(direction, k));
    int64_t count = 1;
    for (k += sign; k != end && batch_at(time(direction, k)) == batch; k += sign) ++count;
    return count;
  }

  int64_t row_stride(const Tensor& t) const {
    return t.stride(call.packed || call.batch_first ? 0 : 1);
  }
  int64_t offset(const Tensor& tensor, int64_t t) const {
    if (call.packed) return call.offsets[t] * tensor.stride(0);
    return t * tensor.stride(call.batch_first ? 1 : 0);
  }

  // The rows of steps [begin, end) as a matrix, by number. A view where possible, with contiguous
  // features, so that results do not depend on the strides of the input.
  Tensor matrix(const Tensor& tensor, int64_t begin, int64_t end) const {
    const int64_t count = row(end) - row(begin), features = tensor.size(tensor.dim() - 1);
    if (call.packed) {
      Tensor packed = tensor;
      return with_dense_rows(stable::narrow(packed, 0, row(begin), count));
    }
    Tensor by_time = call.batch_first ? stable::transpose(tensor, 0, 1) : tensor;
    return with_dense_rows(
        stable::reshape(stable::narrow(by_time, 0, begin, end - begin), {count, features}));
  }

  // Time-major or packed memory for all rows.
  Tensor allocate(const Tensor& like, int64_t features) const {
    if (call.packed) return empty(like, like.scalar_type(), {call.rows, features});
    return empty(like, like.scalar_type(), {call.steps, call.batch, features});
  }
  // The same memory with the caller's dimensions. It is no view of `memory`, as views that are made
  // inside an operator cannot be changed in place.
  Tensor to_caller_layout(const Tensor& memory) const {
    if (!call.batch_first) return memory;
    const int64_t features = memory.size(2);
    const int64_t sizes[] = {call.batch, call.steps, features};
    const int64_t strides[] = {features, call.batch * features, 1};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(memory.get(), 3, sizes, strides, 0, &handle));
    return Tensor(handle);
  }
};

}  // namespace rnnkern
