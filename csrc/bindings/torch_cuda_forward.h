// The forward operator on CUDA; torch_cuda_ops.cpp says what it consists of.
#pragma once
#include "torch_cuda_sequence.h"

namespace rnnkern {

inline ForwardResult cuda_forward(Tensor input, MaybeTensor batch_sizes, Tensors state,
                                  Tensors weights, int64_t cell, bool batch_first, bool train) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  const OnDevice device(input);
  const Walk walk{call};
  const ScalarType dtype = input.scalar_type(), wide = wide_of(dtype);
  const cuda::DType storage = cuda_dtype(dtype);
  const int64_t T = call.steps, B = call.batch, D = call.directions, H = call.hidden_size;
  const int64_t R = call.width, S = call.saved_values, columns = call.gates * H;
  weights = dense(std::move(weights));

  // The running states end as h_n and c_n. Halves have them twice: h_n is also the operand of the
  // next product, h and c are what the cell reads. With a projection h is only an operand.
  const bool half = is_half(dtype), has_c = call.has_c, zeros = state.empty();
  const bool projected = call.proj_size != 0;
  const auto first_state = [&](size_t i) { return zeros ? MaybeTensor() : MaybeTensor(state[i]); };
  Tensor output = walk.allocate(input, D * R);
  Tensor h_n = start_from(first_state(0), input, dtype, {D, B, R});
  Tensor h = half && !projected ? start_from(first_state(0), input, wide, {D, B, H}) : h_n;
  Tensor c = has_c ? start_from(first_state(1), input, wide, {D, B, H}) : empty(input, dtype, {0});
  Tensor m = projected ? empty(input, dtype, {B, H}) : empty(input, dtype, {0});
  const bool save = train && S;
  Tensor saved = save ? empty(input, wide, {D, call.rows, S, H}) : empty(input, wide, {0});
  Tensor c_states =
      train && has_c ? empty(input, wide, {D, call.rows, H}) : empty(input, wide, {0});

  // Where values are saved, W_ih x goes there first and each thread overwrites what it has read.
  // Two directions that are one run each are walked at once.
  const int64_t chunk = chunk_of_steps(call, columns);
  const PersistentLayer layer{call.cell, dtype, H, projected, false};
  const bool together = chunk == T && layer.plan_both(T, B, D, call.packed).blocks;
  std::vector<cuda::PersistentForwardParams> runs;
  Tensor scratch = save ? saved : empty(input, wide, {(together ? 2 : 1) * chunk * B, columns});
  Tensor hidden = empty(input, wide, {B, columns});

  for (int d = 0; d < D; ++d) {
    const Tensor* w = &weights[d * call.per_direction];
    const Tensor w_ih = transposed(w[0]), w_hh = transposed(w[1]);
    const Tensor w_hr = transposed(w[projected ? call.per_direction - 1 : 1]);
    const int64_t direction_rows = d * call.rows, h_state = d * B * R;
    const int64_t scratch_begin =
        save ? direction_rows * S * H : (together ? direction_rows * columns : 0);
    cuda::StepForwardParams step{};
    step.units = H;
    step.input = address(scratch, scratch_begin);
    step.input_stride = save ? S * H : columns;
    step.bias_ih = call.bias ? address(w[2]) : nullptr;
    step.bias_hh = call.bias ? address(w[3]) : nullptr;
    step.c = address(c, d * B * H);
    if (projected) {
      step.h_operand = address(m);
    } else {
      step.h = address(h, h_state);
      step.h_operand = half ? address(h_n, h_state) : nullptr;
      step.y = address(output, d * R);
    }
    step.y_stride = D * R;
    step.saved = address(saved, direction_rows * S * H);
    step.c_states = address(c_states, direction_rows * H);

    bool h_is_zero = zeros;
    for (int64_t done = 0; done < T; done += chunk) {
      const int64_t ready = std::min(done + chunk, T);
      const int64_t begin = d ? T - ready : done, end = d ? T - done : ready;
      const int64_t first = save ? 0 : walk.row(begin);
      multiply(walk.rows(input, begin, end), w_ih,
               matrix(scratch, scratch_begin + (walk.row(begin) - first) * step.input_stride,
                      walk.row(end) - walk.row(begin), columns, step.input_stride));
      const auto go_to = [&](int64_t k) {
        step.row = walk.row(walk.time(d, k));
        step.input_offset = (step.row - first) * step.input_stride;
        step.y_offset = step.row * step.y_stride;
      };
      for (int64_t k = done, next; k < ready; k = next) {
        const int64_t count = walk.alike(d, k, ready), rows = walk.active(walk.time(d, k));
        next = k + count;
        step.batch = rows;
        if (together || layer.plan(count, rows).blocks) {
          go_to(k);
          runs.push_back({step, count, d ? -rows : rows, address(w[1])});
          if (!together || d == 1) launch_pending(layer, runs, device);
          h_is_zero = false;
          continue;
        }
        Tensor h_rows = matrix(h_n, h_state, rows, R, R);
        const Tensor m_rows = matrix(m, 0, projected ? rows : 0, H, H);
        const Tensor hidden_rows = matrix(hidden, 0, rows, columns, columns);
        for (; k < next; ++k) {
          go_to(k);
          if (!h_is_zero) multiply(h_rows, w_hh, hidden_rows);
          step.hidden = h_is_zero ? nullptr : address(hidden);
          h_is_zero = false;
          check_launch(cuda::launch_forward(int(call.cell), storage, step, device.stream()));
          if (projected) {
            multiply(m_rows, w_hr, h_rows);
            Tensor y = matrix(output, step.y_offset + d * R, rows, R, step.y_stride);
            stable::copy_(y, h_rows);
          }
        }
      }
    }
  }
  Tensor c_n = has_c && half ? start_from(c, input, dtype, {D, B, H}) : c;
  return {walk.outward(output), h_n, c_n, saved, c_states};
}

}  // namespace rnnkern
