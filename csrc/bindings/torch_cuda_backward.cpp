// The backward operator on CUDA. Chunk by chunk, the last first: the steps, by the stepwise or the
// persistent engine, then the gradients of the weights and of the input for all rows of the chunk.
#include "torch_cuda_cell.h"
#include "torch_cuda_ops.h"
#include "torch_cuda_sequence.h"
#include "torch_cuda_tensors.h"

namespace rnnkern {
namespace {

class BackwardCall {
 public:
  BackwardCall(const Call& call, BackwardArgs given)
      : call_(call),
        device_(given.input),
        rows_{call_},
        cell_(call.cell),
        dtype_(given.input.scalar_type()),
        acc_dtype_(acc_dtype(dtype_)),
        T_(call.steps),
        B_(call.batch),
        D_(call.directions),
        H_(call.hidden_size),
        R_(call.width),
        C_(call.c_width),
        I_(call.input_size),
        columns_(call.gates * H_),
        grad_values_((cell_.preacts + call.params) * H_),
        projected_(call.proj_size != 0),
        need_input_(given.needs & kNeedInput),
        need_state_(given.needs & kNeedState),
        need_weights_(given.needs & kNeedWeights),
        need_reset_(given.needs & kNeedResetState && !given.resets.state.empty()),
        layer_{call.cell, dtype_, H_, projected_, true, given.resets.mask.has_value()},
        chunk_(chunk_steps(call, grad_values_)),
        chunk_rows_(std::min(chunk_ * B_, call.rows)),
        bidirectional_launch_(chunk_ == T_ &&
                              layer_.plan_bidirectional(T_, B_, D_, call.packed).blocks),
        given_(std::move(given)) {
    given_.weights = dense(std::move(given_.weights));
    given_.state = dense(std::move(given_.state));
    given_.output = with_dense_rows(given_.output);
    given_.saved = dense(given_.saved);
    given_.c_states = dense(given_.c_states);
    if (given_.grad_output) given_.grad_output = with_dense_rows(*given_.grad_output);
    given_.resets = with_dense_rows(std::move(given_.resets));
    if (given_.masks) given_.masks = with_dense_masks(*given_.masks);
    allocate(given_.flow);
  }

  BackwardResult run() {
    for (int d = 0; d < D_; ++d)
      for (int64_t end = T_; end > 0; end -= std::min(chunk_, end)) {
        const int64_t begin = std::max<int64_t>(end - chunk_, 0);
        run_steps(d, begin, end);
        if (!bidirectional_launch_) finish_chunk(d, begin, end);
      }
    for (int d = 0; bidirectional_launch_ && d < D_; ++d) finish_chunk(d, 0, T_);
    if (given_.resets.mask && (need_state_ || need_reset_)) end_first_gradients();
    return result();
  }

 private:
  void allocate(bool flow) {
    const Tensor& like = given_.input;
    dx_ = need_input_ ? rows_.allocate(like, I_) : empty(like, dtype_, {0});
    flow_h_ = empty_if(flow, like, acc_dtype_, {D_, call_.rows, R_});
    flow_c_ = empty_if(flow && call_.has_c, like, acc_dtype_, {D_, call_.rows, C_});

    // The gradient of h comes in two parts: dh from the cell, dh_recurrent through W_hh. Against
    // time, a row that has not ended yet has dh from h_n and no dh_recurrent.
    dh_ = copy_or_zeros(given_.grad_h, like, acc_dtype_, {D_, B_, R_});
    dc_ = call_.has_c ? copy_or_zeros(given_.grad_c, like, acc_dtype_, {D_, B_, C_})
                      : empty(like, acc_dtype_, {0});
    dh_recurrent_ = copy_or_zeros({}, like, acc_dtype_, {D_, B_, R_});

    const int64_t chunks = bidirectional_launch_ ? 2 : 1;  // at a time
    dgates_ = empty(like, dtype_, {chunks * chunk_rows_, grad_values_});
    h_prev_ = empty_if(need_weights_ && call_.heads, like, dtype_, {chunks * chunk_rows_, R_});
    if (has_heads())
      head_dgates_ = empty(like, dtype_, {call_.heads, chunk_rows_, columns_ / call_.heads});
    dh_total_ = empty_if(projected_, like, dtype_, {chunk_rows_, R_});
    m_ = empty_if(projected_ && need_weights_, like, dtype_, {chunk_rows_, H_});
    dm_ = empty_if(projected_, like, acc_dtype_, {B_, H_});
    reverse_dx_ = empty_if(need_input_ && D_ > 1, like, dtype_, {chunk_rows_, I_});
    wgrads_.resize(D_);
    for (const Tensor& state : given_.resets.state)
      dreset_.push_back(need_reset_ ? stable::new_zeros(like, state.sizes(), acc_dtype_)
                                    : empty(like, acc_dtype_, {0}));
  }

  const Tensor& weight(int d, int i) const { return given_.weights[d * call_.places.count + i]; }
  const Tensor& w_hr(int d) const { return weight(d, call_.places.hr); }
  bool has_heads() const { return call_.heads && weight(0, call_.places.hh).dim() == 3; }
  // A direction's first row in dgates_ and h_prev_.
  int64_t chunk_offset(int d) const { return bidirectional_launch_ ? d * chunk_rows_ : 0; }
  const void* state_ptr(size_t i, int64_t offset) const {
    return i < given_.state.size() ? element_ptr(given_.state[i], offset) : nullptr;
  }

  cuda::StepBackwardParams direction_params(int d) const {
    const int64_t first_row = d * call_.rows, h_offset = d * B_ * R_, c_offset = d * B_ * C_;
    cuda::StepBackwardParams step{};
    step.units = H_;
    step.width = R_;
    step.y = element_ptr(given_.output, d * R_);
    step.y_stride = rows_.row_stride(given_.output);
    step.h0 = state_ptr(0, h_offset);
    step.c0 = state_ptr(1, c_offset);
    step.saved = element_ptr(given_.saved, first_row * call_.saved_values * H_);
    step.c_states = element_ptr(given_.c_states, first_row * C_);
    step.dy = given_.grad_output ? element_ptr(*given_.grad_output, d * R_) : nullptr;
    step.dy_stride = given_.grad_output ? rows_.row_stride(*given_.grad_output) : 0;
    step.dh_recurrent = element_ptr(dh_recurrent_, h_offset);
    step.dh = element_ptr(dh_, h_offset);
    step.dc = element_ptr(dc_, c_offset);
    step.flow_h = element_ptr(flow_h_, first_row * R_);
    step.flow_c = element_ptr(flow_c_, first_row * C_);
    step.dgates = element_ptr(dgates_, chunk_offset(d) * grad_values_);
    step.h_prev = element_ptr(h_prev_, chunk_offset(d) * R_);
    step.dh_total = element_ptr(dh_total_);
    step.m = element_ptr(m_);
    step.dm = element_ptr(dm_);
    step.resets = reset_params(call_, given_.resets);
    if (dreset_.size() > 0) step.dreset_h = reset_rows_by_step<void>(call_, dreset_[0]);
    if (dreset_.size() > 1) step.dreset_c = reset_rows_by_step<void>(call_, dreset_[1]);
    step.cell.heads = call_.heads;
    if (call_.params) step.cell.params = element_ptr(weight(d, call_.places.params));
    step.head_dgates = has_heads() ? element_ptr(head_dgates_) : nullptr;
    step.chunk_rows = chunk_rows_;
    return step;
  }

  // Steps [begin, end) of a direction, the last first.
  void run_steps(int d, int64_t begin, int64_t end) {
    cuda::StepBackwardParams step = direction_params(d);
    chunk_row_ = rows_.row(d ? T_ - end : begin);
    for (int64_t k = end - 1, count; k >= begin; k -= count) {
      count = rows_.steps_with_same_batch(d, k, begin - 1);
      step.batch = rows_.batch_at(rows_.time(d, k));
      if (bidirectional_launch_ || layer_.plan(count, step.batch).blocks)
        persistent(d, k, count, step);
      else
        stepwise(d, k, count, step);
    }
  }

  // The rows of a step that had a step before, the number of the first and its offset in y.
  struct PrevRows {
    int64_t batch, row, y_offset;
  };
  PrevRows prev_rows(int d, int64_t k, int64_t batch) const {
    if (k == 0) return {0, 0, 0};
    const int64_t t = rows_.time(d, k - 1);
    return {std::min(batch, rows_.batch_at(t)), rows_.row(t), rows_.offset(given_.output, t)};
  }

  void set_step(int d, int64_t k, cuda::StepBackwardParams& step) const {
    const int64_t t = rows_.time(d, k);
    step.t = t;
    step.row = rows_.row(t);
    step.chunk_row = step.row - chunk_row_;
    step.y_offset = rows_.offset(given_.output, t);
    step.dy_offset = given_.grad_output ? rows_.offset(*given_.grad_output, t) : 0;
    const PrevRows prev = prev_rows(d, k, step.batch);
    step.prev_batch = prev.batch;
    step.prev_row = prev.row;
    step.prev_y_offset = prev.y_offset;
  }

  // Steps k, k - 1, ... in one launch. With two directions in one, the first waits for the second.
  void persistent(int d, int64_t k, int64_t count, cuda::StepBackwardParams& step) {
    set_step(d, k, step);
    const int64_t first = k - count + 1;  // of these steps in the direction's order: done last
    const int64_t t_prev = rows_.time(d, k - 1), t_first = rows_.time(d, first);
    const PrevRows prev = prev_rows(d, first, step.batch);
    cuda::PersistentBackwardParams params{};
    params.step = step;
    params.steps = count;
    params.row_step = d ? step.batch : -step.batch;
    params.y_step = rows_.offset(given_.output, t_prev) - step.y_offset;
    if (given_.grad_output)
      params.dy_step = rows_.offset(*given_.grad_output, t_prev) - step.dy_offset;
    params.last_prev_batch = prev.batch;
    params.last_prev_row = prev.row - rows_.row(t_first);
    params.last_prev_y = prev.y_offset - rows_.offset(given_.output, t_first);
    params.w_hh = element_ptr(weight(d, 1));
    pending_.push_back(params);
    if (!bidirectional_launch_ || d == 1) layer_.launch(pending_, device_, given_.input);
  }

  // Steps k, k - 1, ... by a pointwise kernel each, then W_hh^T dgates.
  void stepwise(int d, int64_t k, int64_t count, cuda::StepBackwardParams& step) {
    const cuda::DType dtype = cuda_dtype(dtype_);
    const int64_t batch = step.batch;
    const Tensor w_hh = call_.heads ? hidden_weight(d) : Tensor();
    const MaskRows masks(call_, given_.masks, d);
    for (const int64_t end = k - count; k > end; --k) {
      set_step(d, k, step);
      masks.set(step.cell, step.t);
      if (projected_) {
        check_launch(cuda::launch_dh_total(dtype, step, device_.stream()));
        gemm(matrix_view(dh_total_, step.chunk_row * R_, batch, R_, R_), w_hr(d),
             matrix_view(dm_, 0, batch, H_, H_));
      }
      cell_.backward(dtype, step, device_.stream());
      if (call_.heads && (k || need_state_ || need_reset_)) recurrent_dgrad(d, step, w_hh);
    }
  }

  // W_hh with its rows as dgates_ has its columns, or, with heads, as head_dgates_ has them.
  Tensor hidden_weight(int d) const {
    const Tensor& w_hh = weight(d, call_.places.hh);
    return has_heads() ? w_hh : CudaCell::in_preact_order(w_hh, cell_.hidden, H_);
  }

  // dh_recurrent_ = W_hh^T dgates of a step.
  void recurrent_dgrad(int d, const cuda::StepBackwardParams& step, const Tensor& w_hh) const {
    const Tensor dh = matrix_view(dh_recurrent_, d * B_ * R_, step.batch, R_, R_);
    if (has_heads())
      gemm(of_heads(step.chunk_row, step.batch), w_hh, head_view(dh, call_.heads));
    else
      gemm(matrix_view(dgates_, step.chunk_row * grad_values_ + cell_.first_hidden_preact * H_,
                       step.batch, columns_, grad_values_),
           w_hh, dh);
  }

  // Rows of head_dgates_: (heads, rows, gates * H / heads).
  Tensor of_heads(int64_t first, int64_t rows) const {
    const int64_t width = columns_ / call_.heads;
    return view(head_dgates_, first * width, {call_.heads, rows, width},
                {chunk_rows_ * width, width, 1});
  }

  // What is left for h_0 and c_0 by the resets before the first step.
  void end_first_gradients() {
    cuda::StepBackwardParams step = direction_params(0);
    step.batch = B_;
    step.t = -1;
    check_launch(cuda::launch_end_gradients(cuda_dtype(dtype_), step, device_.stream()));
  }

  // The gradients of the weights and of the input, from what the steps left of a chunk.
  void finish_chunk(int d, int64_t begin, int64_t end) {
    const int64_t t0 = d ? T_ - end : begin, t1 = d ? T_ - begin : end;
    if (need_weights_) wgrad(d, t0, t1);
    if (need_input_) dgrad(d, t0, t1);
  }

  // Adds the chunk's weight gradients, in the order of the weights. Halves too are accumulated in
  // float32, so that the number of chunks does not matter.
  void wgrad(int d, int64_t t0, int64_t t1) {
    const int64_t rows = rows_.row(t1) - rows_.row(t0), offset = chunk_offset(d);
    const Tensor dgates =
        matrix_view(dgates_, offset * grad_values_, rows, grad_values_, grad_values_);
    const WeightPlaces& at = call_.places;
    Tensors grads(at.count);
    grads[at.ih] = wgrad_of(dgates, cell_.input, rows_.matrix(given_.input, t0, t1));
    if (at.hh >= 0) {
      const Tensor h_prev = matrix_view(h_prev_, offset * R_, rows, R_, R_);
      grads[at.hh] = has_heads() ? head_wgrad(h_prev) : wgrad_of(dgates, cell_.hidden, h_prev);
    }
    if (at.bias_ih >= 0) grads[at.bias_ih] = bgrad_of(dgates, cell_.input);
    if (at.bias_hh >= 0)
      grads[at.bias_hh] = cell_.shares_preacts() ? stable::clone(grads[at.bias_ih])
                                                 : bgrad_of(dgates, cell_.hidden);
    if (projected_) {
      grads[at.hr] = empty(dgates, acc_dtype_, {call_.proj_size, H_});
      gemm_tn(matrix_view(dh_total_, 0, rows, R_, R_), matrix_view(m_, 0, rows, H_, H_),
              grads[at.hr], device_);
    }
    if (at.params >= 0) {
      grads[at.params] = empty(dgates, acc_dtype_, {call_.params, H_});
      sum_rows(matrix_view(dgates, cell_.preacts * H_, rows, call_.params * H_, grad_values_),
               view(grads[at.params], 0, {call_.params * H_}, {1}));
    }
    Tensors& sums = wgrads_[d];
    for (size_t i = 0; i < sums.size(); ++i) add(sums[i], grads[i], sums[i], device_);
    if (sums.empty()) sums = std::move(grads);
  }

  Tensor columns_of(const Tensor& dgates, const GateRange& range) const {
    return matrix_view(dgates, range.preact * H_, dgates.size(0), range.count * H_, grad_values_);
  }

  // dgates^T x: the gradient of a weight whose operand was x.
  Tensor wgrad_of(const Tensor& dgates, const std::vector<GateRange>& ranges, const Tensor& x) {
    const int64_t width = x.size(1);
    Tensor grad = empty(dgates, acc_dtype_, {columns_, width});
    for (const GateRange& range : ranges)
      gemm_tn(columns_of(dgates, range), x,
              matrix_view(grad, range.gate * H_ * width, range.count * H_, width, width), device_);
    return grad;
  }

  static void sum_rows(const Tensor& rows, Tensor sum) {
    const int64_t over_rows = 0;
    stable::sum_out(sum, rows, torch::headeronly::IntHeaderOnlyArrayRef(&over_rows, 1));
  }

  // The same with heads, each by itself.
  Tensor head_wgrad(const Tensor& h_prev) const {
    const int64_t heads = call_.heads, rows = h_prev.size(0), width = columns_ / heads;
    const int64_t units = H_ / heads;
    Tensor grad = empty(h_prev, acc_dtype_, {heads, width, units});
    for (int64_t head = 0; head < heads; ++head)
      gemm_tn(matrix_view(head_dgates_, head * chunk_rows_ * width, rows, width, width),
              matrix_view(h_prev, head * units, rows, units, H_),
              matrix_view(grad, head * width * units, width, units, units), device_);
    return grad;
  }

  Tensor bgrad_of(const Tensor& dgates, const std::vector<GateRange>& ranges) {
    Tensor grad = empty(dgates, acc_dtype_, {columns_});
    for (const GateRange& range : ranges)
      sum_rows(columns_of(dgates, range),
               stable::narrow(grad, 0, range.gate * H_, range.count * H_));
    return grad;
  }

  // dx = dgates W_ih of a chunk; the second direction adds to the first.
  void dgrad(int d, int64_t t0, int64_t t1) {
    const int64_t first = rows_.row(t0), rows = rows_.row(t1) - first;
    const int64_t offset = chunk_offset(d) * grad_values_ + cell_.first_input_preact * H_;
    const Tensor w_ih = CudaCell::in_preact_order(weight(d, 0), cell_.input, H_);
    const Tensor dx = matrix_view(dx_, first * I_, rows, I_, I_);
    const Tensor to = d ? matrix_view(reverse_dx_, 0, rows, I_, I_) : dx;
    gemm(matrix_view(dgates_, offset, rows, columns_, grad_values_), w_ih, to);
    if (d) add(dx, to, dx, device_);
  }

  BackwardResult result() {
    const Tensor& like = given_.input;
    Tensors grads;
    for (const Tensors& of_direction : wgrads_)
      for (const Tensor& grad : of_direction) grads.push_back(to_dtype(grad, dtype_));
    Tensor dh_0 = empty_if(need_state_, like, dtype_, {D_, B_, R_});
    if (need_state_) add(dh_, dh_recurrent_, dh_0, device_);
    Tensor dc_0 = need_state_ && call_.has_c ? to_dtype(dc_, dtype_) : empty(like, dtype_, {0});
    const Tensor dx = need_input_ ? rows_.to_caller_layout(dx_) : dx_;
    const auto dreset = [&](size_t i) {
      return i < dreset_.size() ? to_dtype(dreset_[i], dtype_) : empty(like, dtype_, {0});
    };
    return {dx, dh_0, dc_0, grads, flow_h_, flow_c_, dreset(0), dreset(1)};
  }

  const Call& call_;
  const DeviceScope device_;
  const SequenceRows rows_;
  const CudaCell cell_;
  const ScalarType dtype_, acc_dtype_;
  const int64_t T_, B_, D_, H_, R_, C_, I_, columns_;  // columns: gates * H
  const int64_t grad_values_;                          // of a row of dgates_
  const bool projected_, need_input_, need_state_, need_weights_, need_reset_;
  const PersistentLayer layer_;
  const int64_t chunk_, chunk_rows_;  // steps, rows
  const bool bidirectional_launch_;   // two directions that are one persistent launch each: one
  BackwardArgs given_;

  Tensor dx_, flow_h_, flow_c_;            // results
  Tensor dh_, dc_, dh_recurrent_;          // running
  Tensor dgates_, h_prev_, dh_total_, m_;  // of a chunk's rows: operands of its products
  Tensor head_dgates_;                     // with heads: once more, by head
  Tensor dm_, reverse_dx_;                 // of a step, of a chunk
  std::vector<Tensors> wgrads_;            // by direction
  Tensors dreset_;                         // sums, as the states after resets
  int64_t chunk_row_ = 0;                  // number of the chunk's first row
  std::vector<cuda::PersistentBackwardParams> pending_;
};

}  // namespace

BackwardResult cuda_backward(BackwardArgs args) {
  const Call call(args.input, args.batch_sizes, args.state, args.weights, args.spec,
                  args.masks.has_value());
  call.check_backward(args, acc_dtype(args.input.scalar_type()));
  return BackwardCall(call, std::move(args)).run();
}

}  // namespace rnnkern
