// The CUDA operators' view of torch: the stream, new tensors and views, products. Stable ABI only.
#pragma once
#define RNNKERN_OUT_OF_MEMORY "CUDA out of memory"
// clang-format off
#include "call.h"  // before torch's headers, which report errors by it
// clang-format on
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/params.h"

namespace rnnkern {

using Sizes = std::initializer_list<int64_t>;
namespace stable = torch::stable;

// Turns autograd's recording off for its lifetime.
class NoGrad {
 public:
  NoGrad() : recording_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(recording_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool recording_;
};

// For its lifetime the tensor's device is current and autograd records nothing.
class DeviceScope {
 public:
  explicit DeviceScope([[maybe_unused]] const Tensor& t) {
#ifndef RNNKERN_CUDA_ON_HOST
    guard_.emplace(t.get_device_index());
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cuda::Stream>(stream);
#endif
  }
  cuda::Stream stream() const { return stream_; }

 private:
  NoGrad no_grad_;
  std::optional<stable::accelerator::DeviceGuard> guard_;
  cuda::Stream stream_ = nullptr;
};

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "rnnkern: a CUDA kernel could not be launched: ", error ? error : "");
}

inline cuda::DType cuda_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return cuda::DType::float64;
    case ScalarType::Float: return cuda::DType::float32;
    case ScalarType::BFloat16: return cuda::DType::bfloat16;
    case ScalarType::Half: return cuda::DType::float16;
    default: STD_TORCH_CHECK(false, "rnnkern: unsupported dtype");
  }
}

inline ScalarType acc_dtype(ScalarType dtype) { return is_half(dtype) ? ScalarType::Float : dtype; }

// The address of an element; null in a tensor without any.
inline void* element_ptr(const Tensor& t, int64_t element = 0) {
  return t.numel() ? static_cast<char*>(t.data_ptr()) + element * int64_t(t.element_size())
                   : nullptr;
}

inline Tensor empty(const Tensor& like, ScalarType dtype, Sizes sizes) {
  return stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

// An empty tensor of these sizes, or one without elements where it is not wanted.
inline Tensor empty_if(bool wanted, const Tensor& like, ScalarType dtype, Sizes sizes) {
  return wanted ? empty(like, dtype, sizes) : empty(like, dtype, {0});
}

// A new tensor: a copy of `from`, or zeros.
inline Tensor copy_or_zeros(const MaybeTensor& from, const Tensor& like, ScalarType dtype,
                            Sizes sizes) {
  if (!from) return stable::new_zeros(like, {sizes.begin(), sizes.size()}, dtype);
  Tensor copy = empty(like, dtype, sizes);
  stable::copy_(copy, *from);
  return copy;
}

inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  Tensor copy = stable::new_empty(t, t.sizes(), dtype);
  stable::copy_(copy, t);
  return copy;
}

// A view of t, from element `first` on.
inline Tensor view(const Tensor& t, int64_t first, Sizes sizes, Sizes strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), int64_t(sizes.size()), sizes.begin(), strides.begin(), first, &handle));
  return Tensor(handle);
}

inline Tensor matrix_view(const Tensor& t, int64_t first, int64_t rows, int64_t columns,
                          int64_t row_stride) {
  return view(t, first, {rows, columns}, {row_stride, 1});
}

// Of rows (H), the units of each head: (heads, rows, H / heads).
inline Tensor head_view(const Tensor& rows, int64_t heads) {
  const int64_t width = rows.size(1), units = width / heads;
  return view(rows, 0, {heads, rows.size(0), units}, {units, rows.stride(0), 1});
}

// With dense rows of the states.
inline Resets with_dense_rows(Resets resets) {
  for (Tensor& state : resets.state) state = with_dense_rows(state);
  return resets;
}

// The last two dimensions swapped.
inline Tensor transposed(const Tensor& m) { return stable::transpose(m, m.dim() - 2, m.dim() - 1); }

// out = a b, in the dtype of out: of matrices, or of as many in each, (count, ., .).
inline void gemm(const Tensor& a, const Tensor& b, const Tensor& out) {
  const char* const op = a.dim() == 3 ? "aten::bmm" : "aten::mm";
  using stable::detail::from;
  StableIValue stack[4] = {from(a), from(b)};
  if (a.scalar_type() == out.scalar_type()) {
    stack[2] = from(out);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack, TORCH_ABI_VERSION));
  } else {
    stack[2] = from(out.scalar_type());
    stack[3] = from(out);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "dtype_out", stack, TORCH_ABI_VERSION));
  }
  stable::detail::to<Tensor>(stack[0]);  // a second handle on `out`, which we must release
}

// out = a + b for dense tensors; a and b have the dtype of out, or both its accumulation dtype.
inline void add(const Tensor& a, const Tensor& b, const Tensor& out, const DeviceScope& device) {
  const ScalarType dtype = out.scalar_type();
  check_launch(cuda::launch_add(cuda_dtype(dtype), a.scalar_type() != dtype, out.numel(),
                                element_ptr(a), element_ptr(b), element_ptr(out), device.stream()));
}

// out = a^T b, a sum over the rows of both; out is dense and has the accumulation dtype. cuBLAS
// (13.0, on Hopper) is wrong for halves where K is not a multiple of 8: as if a row were missing.
inline void gemm_tn(const Tensor& a, const Tensor& b, const Tensor& out,
                    const DeviceScope& device) {
  const int64_t rows = a.size(0), whole = rows / 8 * 8, rest = rows - whole;
  const auto gemm_some = [&](int64_t first, int64_t count, const Tensor& to) {
    Tensor some_a = a, some_b = b;
    gemm(transposed(stable::narrow(some_a, 0, first, count)),
         stable::narrow(some_b, 0, first, count), to);
  };
  if (!is_half(a.scalar_type()) || !whole || !rest) return gemm_some(0, rows, out);
  Tensor more = stable::empty_like(out);
  gemm_some(0, whole, out);
  gemm_some(whole, rest, more);
  add(out, more, out, device);
}

}  // namespace rnnkern
