// The operators on CUDA, stepwise: any GPU, any size, every floating dtype.
//
// Forward: x W_ih^T for all of time (in chunks when nothing is saved) is one large product; then
// per step one product h W_hh^T and one pointwise kernel. Backward: per step one pointwise kernel
// and one product dsum W_hh; then the gradients of the input and of the weights, large products
// over all of time. Products go through torch's dispatcher, so that its settings (tf32, workspace,
// deterministic) hold; everything is put on torch's current stream, memory comes from torch's
// allocator, and nothing waits for the device: a call can be captured in a CUDA graph.
//
// For bfloat16 and float16 the operands of a product have that type; its result, the running
// states, `saved` and `cells` are float32.
//
// Only libtorch's stable ABI is used. The tests build this file for the CPU too
// (RNNKERN_CUDA_ON_HOST), with the kernels' threads run one after the other.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda_tensors.h"

namespace {

using namespace rnnkern;
using cuda::BackwardStep;
using cuda::ForwardStep;
using cuda::Storage;

// Elements of x W_ih^T that are held at a time when they need not be kept: 256 MB in float32.
#ifndef RNNKERN_INPUT_CHUNK
#define RNNKERN_INPUT_CHUNK (int64_t(1) << 26)
#endif

// Gates that are neighbours both in torch's order and among the sums: gates [gate, gate + count)
// are the sums [sum, sum + count).
struct Run {
  int sum, gate, count;
};

struct Gates {
  int sums, first_input_sum, first_hidden_sum;
  std::vector<Run> input, hidden;

  explicit Gates(CellId id) {
    visit_cell(id, [&](auto cell) {
      using Cell = decltype(cell);
      sums = Cell::kSums;
      first_input_sum = Cell::kInputSum;
      first_hidden_sum = Cell::kHiddenSum;
      input = runs(Cell::kGates, first_input_sum, Cell::input_gate);
      hidden = runs(Cell::kGates, first_hidden_sum, Cell::hidden_gate);
    });
  }

  static std::vector<Run> runs(int gates, int first_sum, int (*gate_of)(int)) {
    std::vector<Run> all;
    for (int s = 0; s < gates; ++s) {
      if (s && gate_of(s) == gate_of(s - 1) + 1)
        ++all.back().count;
      else
        all.push_back({first_sum + s, gate_of(s), 1});
    }
    return all;
  }

  // The weight with its rows in the order of the sums.
  static Tensor in_sum_order(const Tensor& weight, const std::vector<Run>& runs, int64_t units) {
    if (runs.size() == 1) return weight;
    const int64_t columns = weight.size(1);
    Tensor ordered = stable::empty_like(weight);
    for (const Run& run : runs) {
      const int64_t rows = run.count * units, from = run.gate * units;
      Tensor to =
          matrix(ordered, (run.sum - runs[0].sum) * units * columns, rows, columns, columns);
      stable::copy_(to, matrix(weight, from * columns, rows, columns, columns));
    }
    return ordered;
  }
};

ForwardResult forward(Tensor input, MaybeTensor batch_sizes, Tensors state, Tensors weights,
                      int64_t cell, bool batch_first, bool train) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  const OnDevice device(input);
  const Walk walk{call};
  const ScalarType dtype = input.scalar_type(), wide = wide_of(dtype);
  const Storage storage = storage_of(dtype);
  const int64_t T = call.steps, B = call.batch, D = call.directions, H = call.hidden_size;
  const int64_t S = call.saved_values, columns = call.gates * H;
  weights = dense(std::move(weights));

  // The running states end as h_n and c_n. Halves have them twice: h_n is also the operand of the
  // next product, h and c are what the cell reads.
  const bool half = is_half(dtype), has_c = call.has_c, zeros = state.empty();
  const auto first_state = [&](size_t i) { return zeros ? MaybeTensor() : MaybeTensor(state[i]); };
  Tensor output = walk.allocate(input, D * H);
  Tensor h_n = start_from(first_state(0), input, dtype, {D, B, H});
  Tensor h = half ? start_from(first_state(0), input, wide, {D, B, H}) : h_n;
  Tensor c = has_c ? start_from(first_state(1), input, wide, {D, B, H}) : empty(input, dtype, {0});
  const bool save = train && S;
  Tensor saved = save ? empty(input, wide, {D, call.rows, S, H}) : empty(input, wide, {0});
  Tensor cells = train && has_c ? empty(input, wide, {D, call.rows, H}) : empty(input, wide, {0});

  // Where values are saved, W_ih x goes there first and each thread overwrites what it has read.
  const int64_t chunk =
      save ? T : std::clamp<int64_t>(RNNKERN_INPUT_CHUNK / std::max<int64_t>(B * columns, 1), 1, T);
  Tensor scratch = save ? saved : empty(input, wide, {chunk * B, columns});
  Tensor hidden = empty(input, wide, {B, columns});

  for (int d = 0; d < D; ++d) {
    const Tensor* w = &weights[d * call.per_direction];
    const Tensor w_ih = transposed(w[0]), w_hh = transposed(w[1]);
    const int64_t direction_rows = d * call.rows, direction_state = d * B * H;
    const int64_t scratch_begin = save ? direction_rows * S * H : 0;
    ForwardStep step{};
    step.units = H;
    step.input = address(scratch, scratch_begin);
    step.input_row = save ? S * H : columns;
    step.bias_ih = call.bias ? address(w[2]) : nullptr;
    step.bias_hh = call.bias ? address(w[3]) : nullptr;
    step.h = address(h, direction_state);
    step.c = address(c, direction_state);
    step.h_operand = half ? address(h_n, direction_state) : nullptr;
    step.y = address(output, d * H);
    step.y_row = D * H;
    step.saved = address(saved, direction_rows * S * H);
    step.cells = address(cells, direction_rows * H);

    bool h_is_zero = zeros;
    Tensor h_rows = matrix(h_n, direction_state, B, H, H);
    Tensor hidden_rows = matrix(hidden, 0, B, columns, columns);
    int64_t bound = B;
    for (int64_t done = 0; done < T; done += chunk) {
      const int64_t ready = std::min(done + chunk, T);
      const int64_t begin = d ? T - ready : done, end = d ? T - done : ready;
      const int64_t first = save ? 0 : walk.row(begin);
      multiply(walk.rows(input, begin, end), w_ih,
               matrix(scratch, scratch_begin + (walk.row(begin) - first) * step.input_row,
                      walk.row(end) - walk.row(begin), columns, step.input_row));
      for (int64_t k = done; k < ready; ++k) {
        const int64_t t = walk.time(d, k);
        step.batch = walk.active(t);
        step.row = walk.row(t);
        step.input_offset = (step.row - first) * step.input_row;
        step.y_offset = step.row * step.y_row;
        if (step.batch != bound) {
          bound = step.batch;
          h_rows = matrix(h_n, direction_state, bound, H, H);
          hidden_rows = matrix(hidden, 0, bound, columns, columns);
        }
        if (!h_is_zero) multiply(h_rows, w_hh, hidden_rows);
        step.hidden = h_is_zero ? nullptr : address(hidden);
        h_is_zero = false;
        check_launch(launch_forward(int(call.cell), storage, step, device.stream()));
      }
    }
  }
  Tensor c_n = has_c && half ? start_from(c, input, dtype, {D, B, H}) : c;
  return {walk.outward(output), h_n, c_n, saved, cells};
}

// The gradients of one direction's weights, in the order of the weights.
void add_weight_grads(Tensors& grads, const Call& call, const Gates& gates, const Tensor& dsum,
                      const Tensor& x, const Tensor& previous) {
  const int64_t H = call.hidden_size, stride = gates.sums * H;
  const auto columns = [&](const Run& run) {
    return matrix(dsum, run.sum * H, call.rows, run.count * H, stride);
  };
  const auto weight = [&](const std::vector<Run>& runs, const Tensor& operand) {
    const int64_t width = operand.size(1);
    Tensor grad = empty(dsum, dsum.scalar_type(), {call.gates * H, width});
    for (const Run& run : runs)
      multiply(transposed(columns(run)), operand,
               matrix(grad, run.gate * H * width, run.count * H, width, width));
    grads.push_back(grad);
  };
  const auto bias = [&](const std::vector<Run>& runs) {
    Tensor grad = empty(dsum, dsum.scalar_type(), {call.gates * H});
    const int64_t over_rows = 0;
    for (const Run& run : runs) {
      Tensor part = stable::narrow(grad, 0, run.gate * H, run.count * H);
      stable::sum_out(part, columns(run), torch::headeronly::IntHeaderOnlyArrayRef(&over_rows, 1));
    }
    grads.push_back(grad);
  };
  weight(gates.input, x);
  weight(gates.hidden, previous);
  if (!call.bias) return;
  bias(gates.input);
  if (gates.first_input_sum == gates.first_hidden_sum)
    grads.push_back(stable::clone(grads.back()));
  else
    bias(gates.hidden);
}

BackwardResult backward(MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c,
                        Tensor input, MaybeTensor batch_sizes, Tensors state, Tensors weights,
                        Tensor output, Tensor saved, Tensor cells, int64_t cell, bool batch_first,
                        int64_t needs, bool flow) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  call.check_backward(input, grad_output, grad_h, grad_c, output, saved, cells);
  const OnDevice device(input);
  const Walk walk{call};
  const Gates gates(call.cell);
  const ScalarType dtype = input.scalar_type(), wide = wide_of(dtype);
  const Storage storage = storage_of(dtype);
  const int64_t T = call.steps, B = call.batch, D = call.directions, H = call.hidden_size;
  const int64_t S = call.saved_values, I = call.input_size, sums = gates.sums * H;
  const bool has_c = call.has_c;
  weights = dense(std::move(weights));
  state = dense(std::move(state));
  output = with_dense_rows(output);
  saved = dense(saved);
  cells = dense(cells);
  if (grad_output) grad_output = with_dense_rows(*grad_output);

  const auto when = [&](bool wanted, ScalarType type, Sizes sizes) {
    return wanted ? empty(input, type, sizes) : empty(input, type, {0});
  };
  Tensor dx = needs & kNeedInput ? walk.allocate(input, I) : empty(input, dtype, {0});
  Tensor flow_h = when(flow, wide, {D, call.rows, H});
  Tensor flow_c = when(flow && has_c, wide, {D, call.rows, H});
  Tensors grads;

  // The gradient of h comes in two parts: dh from the cell, `recurrent` through W_hh. A row that
  // has not ended yet, in a walk against time, has dh from h_n and nothing recurrent.
  Tensor dh = start_from(grad_h, input, wide, {D, B, H});
  Tensor dc = has_c ? start_from(grad_c, input, wide, {D, B, H}) : empty(input, wide, {0});
  Tensor recurrent = start_from({}, input, wide, {D, B, H});
  Tensor dsum = empty(input, dtype, {call.rows, sums});
  Tensor previous = when(needs & kNeedWeights, dtype, {call.rows, H});
  MaybeTensor x;
  if (needs & kNeedWeights) x = walk.rows(input, 0, T);

  for (int d = 0; d < D; ++d) {
    const Tensor* w = &weights[d * call.per_direction];
    const int64_t direction_rows = d * call.rows, direction_state = d * B * H;
    BackwardStep step{};
    step.units = H;
    step.y = address(output, d * H);
    step.y_row = walk.row_stride(output);
    step.h0 = state.empty() ? nullptr : address(state[0], direction_state);
    step.c0 = state.size() < 2 ? nullptr : address(state[1], direction_state);
    step.saved = address(saved, direction_rows * S * H);
    step.cells = address(cells, direction_rows * H);
    step.dy = grad_output ? address(*grad_output, d * H) : nullptr;
    step.dy_row = grad_output ? walk.row_stride(*grad_output) : 0;
    step.recurrent = address(recurrent, direction_state);
    step.dh = address(dh, direction_state);
    step.dc = address(dc, direction_state);
    step.dsum = address(dsum);
    step.previous = address(previous);
    step.flow_h = address(flow_h, direction_rows * H);
    step.flow_c = address(flow_c, direction_rows * H);

    for (int64_t k = T - 1; k >= 0; --k) {
      const int64_t t = walk.time(d, k), before = walk.time(d, k - 1);
      step.batch = walk.active(t);
      step.row = walk.row(t);
      step.y_offset = walk.offset(output, t);
      step.dy_offset = grad_output ? walk.offset(*grad_output, t) : 0;
      step.previous_batch = k ? std::min(step.batch, walk.active(before)) : 0;
      step.previous_row = k ? walk.row(before) : 0;
      step.previous_y_offset = k ? walk.offset(output, before) : 0;
      check_launch(launch_backward(int(call.cell), storage, step, device.stream()));
      if (k || needs & kNeedState)
        multiply(matrix(dsum, step.row * sums + gates.first_hidden_sum * H, step.batch,
                        call.gates * H, sums),
                 w[1], matrix(recurrent, direction_state, step.batch, H, H));
    }

    if (needs & kNeedWeights) add_weight_grads(grads, call, gates, dsum, *x, previous);
    if (needs & kNeedInput) {
      Tensor part = d == 0 ? dx : empty(input, dtype, {call.rows, I});
      multiply(matrix(dsum, gates.first_input_sum * H, call.rows, call.gates * H, sums),
               Gates::in_sum_order(w[0], gates.input, H), matrix(part, 0, call.rows, I, I));
      if (d)
        check_launch(launch_add(storage, false, call.rows * I, address(dx), address(part),
                                address(dx), device.stream()));
    }
  }

  Tensor dh_0 = when(needs & kNeedState, dtype, {D, B, H});
  if (needs & kNeedState)
    check_launch(launch_add(storage, true, D * B * H, address(dh), address(recurrent),
                            address(dh_0), device.stream()));
  Tensor dc_0 = !(needs & kNeedState) || !has_c ? empty(input, dtype, {0})
                : is_half(dtype)                ? start_from(dc, input, dtype, {D, B, H})
                                                : dc;
  return {needs & kNeedInput ? walk.outward(dx) : dx, dh_0, dc_0, grads, flow_h, flow_c};
}

}  // namespace

#ifdef RNNKERN_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rnnkern, CUDA, m) {
#endif
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
