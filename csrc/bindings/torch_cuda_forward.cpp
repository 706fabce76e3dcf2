// The forward operator on CUDA. Chunk by chunk: W_ih x for all steps of the chunk, then the steps,
// by the stepwise or the persistent engine.
#include "torch_cuda_cell.h"
#include "torch_cuda_ops.h"
#include "torch_cuda_sequence.h"
#include "torch_cuda_tensors.h"

namespace rnnkern {
namespace {

class ForwardCall {
 public:
  ForwardCall(const Call& call, ForwardArgs given)
      : call_(call),
        device_(given.input),
        rows_{call_},
        cell_(call.cell),
        dtype_(given.input.scalar_type()),
        acc_dtype_(acc_dtype(dtype_)),
        T_(call.steps),
        B_(call.batch),
        H_(call.hidden_size),
        R_(call.width),
        C_(call.c_width),
        columns_(call.gates * call.hidden_size),
        projected_(call.proj_size != 0),
        h_is_zero_(given.state.empty() && given.resets.state.empty()),
        input_in_saved_(given.train && call.saved_values >= call.gates),
        layer_{call.cell, dtype_, H_, projected_, false, given.resets.mask.has_value()},
        chunk_(chunk_steps(call, columns_)),
        bidirectional_launch_(
            chunk_ == T_ && layer_.plan_bidirectional(T_, B_, call.directions, call.packed).blocks),
        input_(std::move(given.input)),
        weights_(dense(std::move(given.weights))),
        resets_(with_dense_rows(std::move(given.resets))),
        masks_(given.masks ? MaybeTensor(with_dense_masks(*given.masks)) : given.masks),
        reset_params_(reset_params(call_, resets_)) {
    allocate(given.state, given.train);
  }

  ForwardResult run() {
    if (resets_.mask) reset_first_states();
    for (int d = 0; d < call_.directions; ++d) run_direction(d);
    const bool narrow_c = call_.has_c && is_half(dtype_);
    Tensor c_n = narrow_c ? copy_or_zeros(c_, input_, dtype_, {call_.directions, B_, C_}) : c_;
    return {rows_.to_caller_layout(output_), h_n_, c_n, saved_, c_states_};
  }

 private:
  // The running states end as h_n and c_n. Halves have them twice: h_n is also the operand of the
  // next product, h and c are what the cell reads. With a projection h is only an operand.
  void allocate(const Tensors& state, bool train) {
    const int64_t D = call_.directions;
    const auto initial = [&](size_t i) {
      return state.empty() ? MaybeTensor() : MaybeTensor(state[i]);
    };
    output_ = rows_.allocate(input_, D * R_);
    h_n_ = copy_or_zeros(initial(0), input_, dtype_, {D, B_, R_});
    h_ = is_half(dtype_) && !projected_ ? copy_or_zeros(initial(0), input_, acc_dtype_, {D, B_, H_})
                                        : h_n_;
    c_ = call_.has_c ? copy_or_zeros(initial(1), input_, acc_dtype_, {D, B_, C_})
                     : empty(input_, dtype_, {0});
    m_ = empty_if(projected_, input_, dtype_, {B_, H_});
    // Opaque to callers, as on the CPU. Here (D, rows, kSaved, H) and (D, rows, C), dense.
    saved_ = empty(input_, acc_dtype_, {train ? call_.saved_size() : 0});
    c_states_ = empty(input_, acc_dtype_, {train ? call_.c_states_size() : 0});
    // Where enough values are saved, W_ih x goes there first and each thread overwrites what it has
    // read.
    input_gemm_ =
        input_in_saved_
            ? saved_
            : empty(input_, acc_dtype_, {(bidirectional_launch_ ? 2 : 1) * chunk_ * B_, columns_});
    hidden_gemm_ = empty_if(call_.heads, input_, acc_dtype_, {B_, columns_});
  }

  void reset_first_states() {
    reset(h_n_, reset_params_.h, R_, 0);
    if (is_half(dtype_) && !projected_) reset(h_, reset_params_.h, H_, 0);
    if (call_.has_c) reset(c_, reset_params_.c, C_, 0);
  }

  void reset(const Tensor& state, const cuda::RowsByStep<const void>& from, int64_t width,
             int64_t t) {
    check_launch(cuda::launch_reset(cuda_dtype(dtype_), state.scalar_type() != dtype_,
                                    reset_params_, from, t, B_, width, element_ptr(state),
                                    device_.stream()));
  }

  const Tensor& weight(int d, int i) const { return weights_[d * call_.places.count + i]; }
  const Tensor& w_hr(int d) const { return weight(d, call_.places.hr); }
  const void* weight_ptr(int d, int place) const {
    return place < 0 ? nullptr : element_ptr(weight(d, place));
  }
  int64_t h_offset(int d) const { return d * B_ * R_; }
  // A direction's part of input_gemm_: within saved_, or a workspace of one chunk.
  int64_t input_gemm_offset(int d) const {
    if (input_in_saved_) return d * call_.rows * call_.saved_values * H_;
    return bidirectional_launch_ ? d * call_.rows * columns_ : 0;
  }

  cuda::StepForwardParams direction_params(int d) const {
    const int64_t first_row = d * call_.rows;
    cuda::StepForwardParams step{};
    step.units = H_;
    step.input = element_ptr(input_gemm_, input_gemm_offset(d));
    step.input_stride = input_in_saved_ ? call_.saved_values * H_ : columns_;
    step.bias_ih = weight_ptr(d, call_.places.bias_ih);
    step.bias_hh = weight_ptr(d, call_.places.bias_hh);
    step.c = element_ptr(c_, d * B_ * C_);
    if (projected_) {
      step.h_operand = element_ptr(m_);
    } else {
      step.h = element_ptr(h_, h_offset(d));
      step.h_operand = is_half(dtype_) ? element_ptr(h_n_, h_offset(d)) : nullptr;
      step.y = element_ptr(output_, d * R_);
    }
    step.y_stride = call_.directions * R_;
    step.saved = element_ptr(saved_, first_row * call_.saved_values * H_);
    step.c_states = element_ptr(c_states_, first_row * C_);
    step.resets = reset_params_;
    step.cell.heads = call_.heads;
    step.cell.params = weight_ptr(d, call_.places.params);
    return step;
  }

  void run_direction(int d) {
    cuda::StepForwardParams step = direction_params(d);
    const Tensor w_ih_t = transposed(weight(d, 0));
    bool h_is_zero = h_is_zero_;
    for (int64_t begin = 0; begin < T_; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, T_);
      chunk_row_ = input_gemm(d, begin, end, w_ih_t, step.input_stride);
      for (int64_t k = begin, count; k < end; k += count) {
        count = rows_.steps_with_same_batch(d, k, end);
        step.batch = rows_.batch_at(rows_.time(d, k));
        if (bidirectional_launch_ || layer_.plan(count, step.batch).blocks)
          persistent(d, k, count, step);
        else
          stepwise(d, k, count, step, h_is_zero);
        h_is_zero = false;
      }
    }
  }

  // W_ih x for steps [begin, end) of a direction; returns the number of the row that is the first
  // of input_gemm_.
  int64_t input_gemm(int d, int64_t begin, int64_t end, const Tensor& w_ih_t, int64_t stride) {
    const int64_t t0 = d ? T_ - end : begin, t1 = d ? T_ - begin : end;
    const int64_t first = input_in_saved_ ? 0 : rows_.row(t0);
    const int64_t offset = input_gemm_offset(d) + (rows_.row(t0) - first) * stride;
    gemm(rows_.matrix(input_, t0, t1), w_ih_t,
         matrix_view(input_gemm_, offset, rows_.row(t1) - rows_.row(t0), columns_, stride));
    return first;
  }

  void set_step(int d, int64_t k, cuda::StepForwardParams& step) const {
    step.t = rows_.time(d, k);
    step.row = rows_.row(step.t);
    step.input_offset = (step.row - chunk_row_) * step.input_stride;
    step.y_offset = step.row * step.y_stride;
  }

  // With two directions in one launch the first one waits for the second.
  void persistent(int d, int64_t k, int64_t count, cuda::StepForwardParams& step) {
    set_step(d, k, step);
    const int64_t row_step = d ? -step.batch : step.batch;
    pending_.push_back({step, count, row_step, element_ptr(weight(d, 1)), nullptr, 0, 0});
    if (!bidirectional_launch_ || d == 1) layer_.launch(pending_, device_, input_);
  }

  // hidden_gemm_ = W_hh h, by head if there are some.
  void hidden_gemm(int d, const Tensor& h_rows) const {
    const int64_t rows = h_rows.size(0), heads = call_.heads, width = columns_ / heads;
    const Tensor w_hh_t = transposed(weight(d, call_.places.hh));
    if (w_hh_t.dim() == 2)
      gemm(h_rows, w_hh_t, matrix_view(hidden_gemm_, 0, rows, columns_, columns_));
    else
      gemm(head_view(h_rows, heads), w_hh_t,
           view(hidden_gemm_, 0, {heads, rows, width}, {rows * width, width, 1}));
  }

  void stepwise(int d, int64_t k, int64_t count, cuda::StepForwardParams& step, bool h_is_zero) {
    Tensor h_rows = matrix_view(h_n_, h_offset(d), step.batch, R_, R_);
    const Tensor m_rows = matrix_view(m_, 0, projected_ ? step.batch : 0, H_, H_);
    const MaskRows masks(call_, masks_, d);
    for (const int64_t end = k + count; k < end; ++k) {
      set_step(d, k, step);
      masks.set(step.cell, step.t);
      const bool multiplies = !h_is_zero && call_.heads;
      if (multiplies) hidden_gemm(d, h_rows);
      step.hidden = multiplies ? element_ptr(hidden_gemm_) : nullptr;
      h_is_zero = false;
      cell_.forward(cuda_dtype(dtype_), step, device_.stream());
      if (projected_) {
        gemm(m_rows, transposed(w_hr(d)), h_rows);
        Tensor y = matrix_view(output_, step.y_offset + d * R_, step.batch, R_, step.y_stride);
        stable::copy_(y, h_rows);
        if (resets_.mask && k + 1 < T_) reset(h_n_, reset_params_.h, R_, k + 1);
      }
    }
  }

  const Call& call_;
  const DeviceScope device_;
  const SequenceRows rows_;
  const CudaCell cell_;
  const ScalarType dtype_, acc_dtype_;
  const int64_t T_, B_, H_, R_, C_, columns_;  // columns: gates * H
  const bool projected_, h_is_zero_;           // h: before the first step
  const bool input_in_saved_;
  const PersistentLayer layer_;
  const int64_t chunk_;              // steps
  const bool bidirectional_launch_;  // two directions that are one persistent launch each: one
  const Tensor input_;
  const Tensors weights_;
  const Resets resets_;
  const MaybeTensor masks_;
  const cuda::ResetParams reset_params_;

  Tensor output_, h_n_, h_, c_, m_, saved_, c_states_;
  Tensor input_gemm_, hidden_gemm_;  // W_ih x of a chunk, W_hh h of a step
  int64_t chunk_row_ = 0;            // number of the first row in input_gemm_
  std::vector<cuda::PersistentForwardParams> pending_;
};

}  // namespace

ForwardResult cuda_forward(ForwardArgs args) {
  const Call call(args.input, args.batch_sizes, args.state, args.weights, args.spec,
                  args.masks.has_value());
  call.check_resets(args.resets, Kind(args.input));
  call.check_masks(args.masks, Kind(args.input));
  return ForwardCall(call, std::move(args)).run();
}

}  // namespace rnnkern
