// The backward operator on CUDA; torch_cuda_ops.cpp says what it consists of.
#pragma once
#include "torch_cuda_gates.h"
#include "torch_cuda_sequence.h"

namespace rnnkern {

// What a chunk of steps leaves for the gradients of one direction's weights, a row each.
struct ChunkOperands {
  Tensor dgates, x, previous;
  MaybeTensor total, m;  // with a projection
};

// The gradients of one direction's weights from a chunk, in the order of the weights. Halves too
// are added up in the wide type, whatever way a product is split.
inline Tensors chunk_weight_grads(const Call& call, const Gates& gates, const ChunkOperands& chunk,
                                  const OnDevice& device) {
  const int64_t H = call.hidden_size, rows = chunk.dgates.size(0), stride = gates.sums * H;
  const ScalarType type = wide_of(chunk.dgates.scalar_type());
  Tensors grads;
  const auto columns = [&](const Run& run) {
    return matrix(chunk.dgates, run.sum * H, rows, run.count * H, stride);
  };
  const auto weight = [&](const std::vector<Run>& runs, const Tensor& operand) {
    const int64_t width = operand.size(1);
    Tensor grad = empty(chunk.dgates, type, {call.gates * H, width});
    for (const Run& run : runs)
      multiply_rows(columns(run), operand,
                    matrix(grad, run.gate * H * width, run.count * H, width, width), device);
    grads.push_back(grad);
  };
  const auto bias = [&](const std::vector<Run>& runs) {
    Tensor grad = empty(chunk.dgates, type, {call.gates * H});
    const int64_t over_rows = 0;
    for (const Run& run : runs) {
      Tensor part = stable::narrow(grad, 0, run.gate * H, run.count * H);
      stable::sum_out(part, columns(run), torch::headeronly::IntHeaderOnlyArrayRef(&over_rows, 1));
    }
    grads.push_back(grad);
  };
  weight(gates.input, chunk.x);
  weight(gates.hidden, chunk.previous);
  if (call.bias) {
    bias(gates.input);
    if (gates.first_input_sum == gates.first_hidden_sum)
      grads.push_back(stable::clone(grads.back()));
    else
      bias(gates.hidden);
  }
  if (chunk.total) {
    grads.push_back(empty(chunk.dgates, type, {call.proj_size, H}));
    multiply_rows(*chunk.total, *chunk.m, grads.back(), device);
  }
  return grads;
}

inline BackwardResult cuda_backward(MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c,
                                    Tensor input, MaybeTensor batch_sizes, Tensors state,
                                    Tensors weights, Tensor output, Tensor saved, Tensor c_states,
                                    int64_t cell, bool batch_first, int64_t needs, bool flow) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  call.check_backward(input, grad_output, grad_h, grad_c, output, saved, c_states,
                      wide_of(input.scalar_type()));
  const OnDevice device(input);
  const Walk walk{call};
  const Gates gates(call.cell);
  const ScalarType dtype = input.scalar_type(), wide = wide_of(dtype);
  const cuda::DType storage = cuda_dtype(dtype);
  const int64_t T = call.steps, B = call.batch, D = call.directions, H = call.hidden_size;
  const int64_t R = call.width, S = call.saved_values, I = call.input_size;
  const int64_t sums = gates.sums * H, chunk = chunk_of_steps(call, sums);
  const bool has_c = call.has_c, projected = call.proj_size != 0;
  weights = dense(std::move(weights));
  state = dense(std::move(state));
  output = with_dense_rows(output);
  saved = dense(saved);
  c_states = dense(c_states);
  if (grad_output) grad_output = with_dense_rows(*grad_output);

  const auto when = [&](bool wanted, ScalarType type, Sizes sizes) {
    return wanted ? empty(input, type, sizes) : empty(input, type, {0});
  };
  Tensor dx = needs & kNeedInput ? walk.allocate(input, I) : empty(input, dtype, {0});
  Tensor flow_h = when(flow, wide, {D, call.rows, R});
  Tensor flow_c = when(flow && has_c, wide, {D, call.rows, H});
  Tensors grads;

  // The gradient of h comes in two parts: dh from the cell, `dh_recurrent` through W_hh. A row that
  // has not ended yet, in a walk against time, has dh from h_n and no dh_recurrent.
  Tensor dh = start_from(grad_h, input, wide, {D, B, R});
  Tensor dc = has_c ? start_from(grad_c, input, wide, {D, B, H}) : empty(input, wide, {0});
  Tensor dh_recurrent = start_from({}, input, wide, {D, B, R});
  const bool want_weights = needs & kNeedWeights;
  const int64_t chunk_rows = std::min(chunk * B, call.rows);
  const PersistentLayer layer{call.cell, dtype, H, projected, true};
  const bool together = chunk == T && layer.plan_both(T, B, D, call.packed).blocks;
  const int64_t held = together ? 2 : 1;  // chunks at a time
  Tensor dgates = empty(input, dtype, {held * chunk_rows, sums});
  Tensor previous = when(want_weights, dtype, {held * chunk_rows, R});
  Tensor total = when(projected, dtype, {chunk_rows, R});
  Tensor m = when(projected && want_weights, dtype, {chunk_rows, H});
  Tensor dm = when(projected, wide, {B, H});
  Tensor second_dx = when(needs & kNeedInput && D > 1, dtype, {chunk_rows, I});
  std::vector<Tensors> sum_of_grads(D);
  std::vector<cuda::PersistentBackwardParams> runs;
  const auto held_row = [&](int d) { return together ? d * chunk_rows : 0; };

  // Steps [begin, end) of a direction, the last first.
  const auto walk_back = [&](int d, int64_t begin, int64_t end) {
    const Tensor* w = &weights[d * call.per_direction];
    const int64_t direction_rows = d * call.rows, h_state = d * B * R, c_state = d * B * H;
    cuda::StepBackwardParams step{};
    step.units = H;
    step.width = R;
    step.y = address(output, d * R);
    step.y_stride = walk.row_stride(output);
    step.h0 = state.empty() ? nullptr : address(state[0], h_state);
    step.c0 = state.size() < 2 ? nullptr : address(state[1], c_state);
    step.saved = address(saved, direction_rows * S * H);
    step.c_states = address(c_states, direction_rows * H);
    step.dy = grad_output ? address(*grad_output, d * R) : nullptr;
    step.dy_stride = grad_output ? walk.row_stride(*grad_output) : 0;
    step.dh_recurrent = address(dh_recurrent, h_state);
    step.dh = address(dh, h_state);
    step.dc = address(dc, c_state);
    step.flow_h = address(flow_h, direction_rows * R);
    step.flow_c = address(flow_c, direction_rows * H);
    step.dgates = address(dgates, held_row(d) * sums);
    step.h_prev = address(previous, held_row(d) * R);
    step.dh_total = address(total);
    step.m = address(m);
    step.dm = address(dm);
    const int64_t first = walk.row(d ? T - end : begin);

    const auto set_previous = [&](int64_t k, auto* batch, auto* row, auto* y_offset) {
      const int64_t before = walk.time(d, k - 1);
      *batch = k ? std::min(step.batch, walk.active(before)) : 0;
      *row = k ? walk.row(before) : 0;
      *y_offset = k ? walk.offset(output, before) : 0;
    };
    const auto go_to = [&](int64_t k) {
      const int64_t t = walk.time(d, k);
      step.row = walk.row(t);
      step.chunk_row = step.row - first;
      step.y_offset = walk.offset(output, t);
      step.dy_offset = grad_output ? walk.offset(*grad_output, t) : 0;
      set_previous(k, &step.prev_batch, &step.prev_row, &step.prev_y_offset);
    };
    for (int64_t k = end - 1, next; k >= begin; k = next) {
      const int64_t count = walk.alike(d, k, begin - 1), rows = walk.active(walk.time(d, k));
      next = k - count;
      step.batch = rows;
      if (together || layer.plan(count, rows).blocks) {
        go_to(k);
        cuda::PersistentBackwardParams run{};
        const int64_t before = walk.time(d, k - 1), last = walk.time(d, next + 1);
        run.step = step;
        run.steps = count;
        run.row_step = d ? rows : -rows;
        run.y_step = walk.offset(output, before) - step.y_offset;
        run.dy_step = grad_output ? walk.offset(*grad_output, before) - step.dy_offset : 0;
        set_previous(next + 1, &run.last_prev_batch, &run.last_prev_row, &run.last_prev_y);
        run.last_prev_row -= walk.row(last);
        run.last_prev_y -= walk.offset(output, last);
        run.w_hh = address(w[1]);
        runs.push_back(run);
        if (!together || d == 1) launch_pending(layer, runs, device);
        continue;
      }
      for (; k > next; --k) {
        go_to(k);
        if (projected) {
          check_launch(cuda::launch_dh_total(storage, step, device.stream()));
          multiply(matrix(total, step.chunk_row * R, rows, R, R), w[call.per_direction - 1],
                   matrix(dm, 0, rows, H, H));
        }
        check_launch(cuda::launch_backward(int(call.cell), storage, step, device.stream()));
        if (k || needs & kNeedState)
          multiply(matrix(dgates, step.chunk_row * sums + gates.first_hidden_sum * H, rows,
                          call.gates * H, sums),
                   w[1], matrix(dh_recurrent, h_state, rows, R, R));
      }
    }
  };

  // The gradients of the weights and of the input, from what walk_back left of these steps.
  const auto multiply_out = [&](int d, int64_t begin, int64_t end) {
    const int64_t t0 = d ? T - end : begin, t1 = d ? T - begin : end;
    const int64_t first = walk.row(t0), rows = walk.row(t1) - first, at = held_row(d);
    if (want_weights) {
      ChunkOperands operands{matrix(dgates, at * sums, rows, sums, sums),
                             walk.rows(input, t0, t1),
                             matrix(previous, at * R, rows, R, R),
                             {},
                             {}};
      if (projected) {
        operands.total = matrix(total, 0, rows, R, R);
        operands.m = matrix(m, 0, rows, H, H);
      }
      Tensors part = chunk_weight_grads(call, gates, operands, device);
      for (size_t i = 0; i < sum_of_grads[d].size(); ++i)
        add(sum_of_grads[d][i], part[i], sum_of_grads[d][i], device);
      if (sum_of_grads[d].empty()) sum_of_grads[d] = std::move(part);
    }
    if (needs & kNeedInput) {
      const Tensor w_ih = Gates::in_sum_order(weights[d * call.per_direction], gates.input, H);
      Tensor to = matrix(dx, first * I, rows, I, I);
      Tensor part = d ? matrix(second_dx, 0, rows, I, I) : to;
      multiply(matrix(dgates, at * sums + gates.first_input_sum * H, rows, call.gates * H, sums),
               w_ih, part);
      if (d) add(to, part, to, device);
    }
  };

  for (int d = 0; d < D; ++d)
    for (int64_t end = T; end > 0; end -= std::min(chunk, end)) {
      const int64_t begin = std::max<int64_t>(end - chunk, 0);
      walk_back(d, begin, end);
      if (!together) multiply_out(d, begin, end);
    }
  for (int d = 0; together && d < D; ++d) multiply_out(d, 0, T);
  for (Tensors& of_direction : sum_of_grads)
    for (Tensor& grad : of_direction) grads.push_back(in_dtype(grad, dtype));

  Tensor dh_0 = when(needs & kNeedState, dtype, {D, B, R});
  if (needs & kNeedState) add(dh, dh_recurrent, dh_0, device);
  Tensor dc_0 = needs & kNeedState && has_c ? in_dtype(dc, dtype) : empty(input, dtype, {0});
  return {needs & kNeedInput ? walk.outward(dx) : dx, dh_0, dc_0, grads, flow_h, flow_c};
}

}  // namespace rnnkern
