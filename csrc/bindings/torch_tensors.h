// Tensors for the engine: allocated for its results, converted to the types and layouts that it
// takes.
#pragma once
// clang-format off
#include "call.h"  // before torch's headers, which report errors by it
// clang-format on
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <limits>
#include <new>

#include "../cpu/engine.h"

namespace rnnkern {

// With RNNKERN_POISON set, new tensors are filled with NaN: what a kernel leaves unwritten shows.
inline const bool kPoison = std::getenv("RNNKERN_POISON") != nullptr;

inline int32_t aoti_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

// Strides are those of the contiguous tensor, but for `swapped`: the first two dimensions then lie
// in memory in the other order.
inline Tensor allocate(ScalarType dtype, std::initializer_list<int64_t> sizes,
                       bool swapped = false) {
  const int64_t dim = int64_t(sizes.size());
  const int64_t* size = sizes.begin();
  int64_t stride[4], numel = 1;
  for (int64_t i = dim - 1; i >= 0; numel *= size[i--]) stride[i] = numel > 0 ? numel : 1;
  if (swapped) {
    stride[1] = size[0] * size[2];
    stride[0] = size[2];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, stride, aoti_type(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  advise_huge_pages(tensor.data_ptr(), numel * tensor.element_size());
  if (kPoison) torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
  return tensor;
}

// The engine's own memory is not torch's, but it ends in the same way.
template <class F>
void run_engine(F&& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, RNNKERN_OUT_OF_MEMORY, " for rnnkern's workspace");
  }
}

inline Tensor nothing(ScalarType dtype) { return allocate(dtype, {0}); }

// Contiguous, of three or four dimensions.
inline Tensor zeros_as(const Tensor& t, ScalarType dtype) {
  Tensor zeros = t.dim() == 3 ? allocate(dtype, {t.size(0), t.size(1), t.size(2)})
                              : allocate(dtype, {t.size(0), t.size(1), t.size(2), t.size(3)});
  return torch::stable::zero_(zeros);
}

// A tensor of rows with `features` columns, laid out in time-major order.
inline Tensor allocate_rows(const Call& call, ScalarType dtype, int64_t features) {
  if (call.packed) return allocate(dtype, {call.rows, features});
  if (call.batch_first) return allocate(dtype, {call.batch, call.steps, features}, true);
  return allocate(dtype, {call.steps, call.batch, features});
}

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
inline Tensors converted(Tensors&& tensors, ScalarType dtype) {
  for (Tensor& t : tensors)
    if (t.scalar_type() != dtype) t = torch::stable::to(t, dtype);
  return std::move(tensors);
}

template <class T>
constexpr ScalarType kType = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;
template <>
constexpr ScalarType kType<bfloat16> = ScalarType::BFloat16;

// f(T{}), where the engine takes the call's tensors as T: those of half precision that it does not
// take are converted to float32 at the edges.
template <class F>
auto visit_type(const Call& call, ScalarType dtype, F&& f) {
  STD_TORCH_CHECK(is_half(dtype) || dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "rnnkern: unsupported dtype");
  if (dtype == ScalarType::Double) return f(double{});
  if (dtype == ScalarType::BFloat16 &&
      supports<bfloat16>(call.cell, call.input_size, call.hidden_size, call.proj_size))
    return f(bfloat16{});
  return f(float{});
}

// Rows of x that begin with whole factors of a product.
template <class T>
Tensor rows_as(const Tensor& t) {
  const Tensor rows = with_dense_rows(converted(t, kType<T>));
  bool whole = true;
  for (int64_t i = 0; i + 1 < rows.dim(); ++i)
    whole = whole && rows.stride(i) % kVnniFactor<T> == 0;
  return whole ? rows : torch::stable::contiguous(rows);
}
template <class T>
Tensors states_as(Tensors&& states) {
  for (size_t i = 0; i < states.size(); ++i)
    states[i] = dense(converted(states[i], i ? kType<Acc<T>> : kType<T>));
  return std::move(states);
}
template <class T>
Tensors weights_as(Tensors&& weights) {
  return dense(converted(std::move(weights), kType<T>));
}

// The states after resets; their rows may lie anywhere.
template <class T>
Resets resets_as(Resets&& resets) {
  for (size_t i = 0; i < resets.state.size(); ++i)
    resets.state[i] = with_dense_rows(converted(resets.state[i], i ? kType<Acc<T>> : kType<T>));
  return std::move(resets);
}

template <class T>
MaybeTensor masks_as(const MaybeTensor& masks) {
  return masks ? MaybeTensor(with_dense_masks(converted(*masks, kType<Acc<T>>))) : masks;
}

// As allocate_block, in torch's memory.
inline Tensor allocate_bytes(int64_t bytes) {
  constexpr int64_t kPage = kHugePage;
  const int64_t slack = bytes >= kPage / 2 ? kPage : 0, size = bytes + slack, strides[] = {1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, strides, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor memory(handle);
  advise_huge_pages(memory.data_ptr(), size_t(size));
  if (!slack) return memory;
  const int64_t begin = -reinterpret_cast<intptr_t>(memory.data_ptr()) & (kPage - 1);
  return torch::stable::narrow(memory, 0, begin, bytes);
}

}  // namespace rnnkern
