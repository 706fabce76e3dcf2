// The operators on CUDA, stepwise: any GPU, any size, every floating dtype.
//
// Forward: x W_ih^T for a chunk of time is one large product; then per step one product h W_hh^T
// and one pointwise kernel. Backward: per step one pointwise kernel and one product dsum W_hh;
// then, chunk by chunk, the gradients of the input and of the weights, large products again. A
// projection adds one product per step each way. Products go through torch's dispatcher, so that
// its settings (tf32, workspace, deterministic) hold; everything is put on torch's current stream,
// memory comes from torch's allocator, and nothing waits for the device: a call can be captured in
// a CUDA graph.
//
// For bfloat16 and float16 the operands of a product have that type; its result, the running
// states, `saved` and `cells` are float32.
//
// Only libtorch's stable ABI is used. The tests build this file for the CPU too
// (RNNKERN_CUDA_ON_HOST), with the kernels' threads run one after the other.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda_gates.h"

namespace {

using namespace rnnkern;
using cuda::BackwardRun;
using cuda::BackwardStep;
using cuda::ForwardRun;
using cuda::ForwardStep;
using cuda::Storage;

// A run loads the recurrent weights once: not worth it for a step or two.
constexpr int64_t kShortestRun = 4;

// Steps are taken in chunks that hold so many sums at a time, 256 MB in float32: what a call needs
// beyond its results and what is saved stays bounded, and no product has more elements than an int
// counts.
int64_t chunk_sums = int64_t(1) << 26;

int64_t chunk_of_steps(const Call& call, int64_t sums) {
  return std::clamp<int64_t>(chunk_sums / std::max<int64_t>(call.batch * sums, 1), 1, call.steps);
}

ForwardResult forward(Tensor input, MaybeTensor batch_sizes, Tensors state, Tensors weights,
                      int64_t cell, bool batch_first, bool train) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  const OnDevice device(input);
  const Walk walk{call};
  const ScalarType dtype = input.scalar_type(), wide = wide_of(dtype);
  const Storage storage = storage_of(dtype);
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
  Tensor cells = train && has_c ? empty(input, wide, {D, call.rows, H}) : empty(input, wide, {0});

  // Where values are saved, W_ih x goes there first and each thread overwrites what it has read.
  // Two directions that are one run each are walked at once.
  const int64_t chunk = chunk_of_steps(call, columns);
  const bool together = D == 2 && !call.packed && chunk == T && T >= kShortestRun && !projected &&
                        on_chip(int(call.cell), storage, H, B, false, 2).blocks;
  std::vector<ForwardRun> runs;
  Tensor scratch = save ? saved : empty(input, wide, {(together ? 2 : 1) * chunk * B, columns});
  Tensor hidden = empty(input, wide, {B, columns});

  for (int d = 0; d < D; ++d) {
    const Tensor* w = &weights[d * call.per_direction];
    const Tensor w_ih = transposed(w[0]), w_hh = transposed(w[1]);
    const Tensor w_hr = transposed(w[projected ? call.per_direction - 1 : 1]);
    const int64_t direction_rows = d * call.rows, h_state = d * B * R;
    const int64_t scratch_begin =
        save ? direction_rows * S * H : (together ? direction_rows * columns : 0);
    ForwardStep step{};
    step.units = H;
    step.input = address(scratch, scratch_begin);
    step.input_row = save ? S * H : columns;
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
    step.y_row = D * R;
    step.saved = address(saved, direction_rows * S * H);
    step.cells = address(cells, direction_rows * H);

    bool h_is_zero = zeros;
    Tensor h_rows = matrix(h_n, h_state, B, R, R), m_rows = matrix(m, 0, projected ? B : 0, H, H);
    Tensor hidden_rows = matrix(hidden, 0, B, columns, columns);
    int64_t bound = B;
    for (int64_t done = 0; done < T; done += chunk) {
      const int64_t ready = std::min(done + chunk, T);
      const int64_t begin = d ? T - ready : done, end = d ? T - done : ready;
      const int64_t first = save ? 0 : walk.row(begin);
      multiply(walk.rows(input, begin, end), w_ih,
               matrix(scratch, scratch_begin + (walk.row(begin) - first) * step.input_row,
                      walk.row(end) - walk.row(begin), columns, step.input_row));
      for (int64_t k = done, count; k < ready; k += count) {
        const int64_t t = walk.time(d, k);
        count = walk.alike(d, k, ready);
        step.batch = walk.active(t);
        step.row = walk.row(t);
        step.input_offset = (step.row - first) * step.input_row;
        step.y_offset = step.row * step.y_row;
        if (count >= kShortestRun && !projected &&
            (together || on_chip(int(call.cell), storage, H, step.batch, false, 1).blocks)) {
          runs.push_back({step, count, d ? -step.batch : step.batch, address(w[1])});
          h_is_zero = false;
          if (together && d == 0) continue;
          check_launch(launch_forward_runs(int(call.cell), storage, runs.data(), int(runs.size()),
                                           device.stream()));
          runs.clear();
          continue;
        }
        count = 1;
        if (step.batch != bound) {
          bound = step.batch;
          h_rows = matrix(h_n, h_state, bound, R, R);
          hidden_rows = matrix(hidden, 0, bound, columns, columns);
          if (projected) m_rows = matrix(m, 0, bound, H, H);
        }
        if (!h_is_zero) multiply(h_rows, w_hh, hidden_rows);
        step.hidden = h_is_zero ? nullptr : address(hidden);
        h_is_zero = false;
        check_launch(launch_forward(int(call.cell), storage, step, device.stream()));
        if (projected) {
          multiply(m_rows, w_hr, h_rows);
          Tensor y = matrix(output, step.y_offset + d * R, bound, R, step.y_row);
          stable::copy_(y, h_rows);
        }
      }
    }
  }
  Tensor c_n = has_c && half ? start_from(c, input, dtype, {D, B, H}) : c;
  return {walk.outward(output), h_n, c_n, saved, cells};
}

// out = a^T b, added up over the rows of both; out is dense and of the wide type. cuBLAS (13.0, on
// Hopper) is wrong for halves where their number is not a multiple of 8: as if a row were missing.
void multiply_rows(const Tensor& a, const Tensor& b, const Tensor& out, const OnDevice& device) {
  const int64_t rows = a.size(0), whole = rows / 8 * 8, rest = rows - whole;
  const auto multiply_some = [&](int64_t first, int64_t count, const Tensor& to) {
    Tensor some_a = a, some_b = b;
    multiply(transposed(stable::narrow(some_a, 0, first, count)),
             stable::narrow(some_b, 0, first, count), to);
  };
  if (!is_half(a.scalar_type()) || !whole || !rest) return multiply_some(0, rows, out);
  Tensor more = stable::empty_like(out);
  multiply_some(0, whole, out);
  multiply_some(whole, rest, more);
  add(out, more, out, device);
}

// What a chunk of steps leaves for the gradients of one direction's weights, a row each.
struct ChunkOperands {
  Tensor dsum, x, previous;
  MaybeTensor total, m;  // with a projection
};

// The gradients of one direction's weights from a chunk, in the order of the weights.
Tensors chunk_weight_grads(const Call& call, const Gates& gates, const ChunkOperands& chunk,
                           ScalarType type, const OnDevice& device) {
  const int64_t H = call.hidden_size, rows = chunk.dsum.size(0), stride = gates.sums * H;
  Tensors grads;
  const auto columns = [&](const Run& run) {
    return matrix(chunk.dsum, run.sum * H, rows, run.count * H, stride);
  };
  const auto weight = [&](const std::vector<Run>& runs, const Tensor& operand) {
    const int64_t width = operand.size(1);
    Tensor grad = empty(chunk.dsum, type, {call.gates * H, width});
    for (const Run& run : runs)
      multiply_rows(columns(run), operand,
                    matrix(grad, run.gate * H * width, run.count * H, width, width), device);
    grads.push_back(grad);
  };
  const auto bias = [&](const std::vector<Run>& runs) {
    Tensor grad = empty(chunk.dsum, type, {call.gates * H});
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
    grads.push_back(empty(chunk.dsum, type, {call.proj_size, H}));
    multiply_rows(*chunk.total, *chunk.m, grads.back(), device);
  }
  return grads;
}

BackwardResult backward(MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c,
                        Tensor input, MaybeTensor batch_sizes, Tensors state, Tensors weights,
                        Tensor output, Tensor saved, Tensor cells, int64_t cell, bool batch_first,
                        int64_t needs, bool flow) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  call.check_backward(input, grad_output, grad_h, grad_c, output, saved, cells,
                      wide_of(input.scalar_type()));
  const OnDevice device(input);
  const Walk walk{call};
  const Gates gates(call.cell);
  const ScalarType dtype = input.scalar_type(), wide = wide_of(dtype);
  const Storage storage = storage_of(dtype);
  const int64_t T = call.steps, B = call.batch, D = call.directions, H = call.hidden_size;
  const int64_t R = call.width, S = call.saved_values, I = call.input_size;
  const int64_t sums = gates.sums * H, chunk = chunk_of_steps(call, sums);
  const bool has_c = call.has_c, projected = call.proj_size != 0;
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
  Tensor flow_h = when(flow, wide, {D, call.rows, R});
  Tensor flow_c = when(flow && has_c, wide, {D, call.rows, H});
  Tensors grads;

  // The gradient of h comes in two parts: dh from the cell, `recurrent` through W_hh. A row that
  // has not ended yet, in a walk against time, has dh from h_n and nothing recurrent.
  Tensor dh = start_from(grad_h, input, wide, {D, B, R});
  Tensor dc = has_c ? start_from(grad_c, input, wide, {D, B, H}) : empty(input, wide, {0});
  Tensor recurrent = start_from({}, input, wide, {D, B, R});
  const bool want_weights = needs & kNeedWeights;
  const int64_t chunk_rows = std::min(chunk * B, call.rows);
  const bool together = D == 2 && !call.packed && chunk == T && T >= kShortestRun && !projected &&
                        on_chip(int(call.cell), storage, H, B, true, 2).blocks;
  const int64_t held = together ? 2 : 1;  // chunks at a time
  Tensor dsum = empty(input, dtype, {held * chunk_rows, sums});
  Tensor previous = when(want_weights, dtype, {held * chunk_rows, R});
  Tensor total = when(projected, dtype, {chunk_rows, R});
  Tensor m = when(projected && want_weights, dtype, {chunk_rows, H});
  Tensor dm = when(projected, wide, {B, H});
  Tensor second_dx = when(needs & kNeedInput && D > 1, dtype, {chunk_rows, I});
  std::vector<Tensors> sum_of_grads(D);
  std::vector<BackwardRun> runs;
  const auto held_row = [&](int d) { return together ? d * chunk_rows : 0; };

  // Steps [begin, end) of a direction, the last first.
  const auto walk_back = [&](int d, int64_t begin, int64_t end) {
    const Tensor* w = &weights[d * call.per_direction];
    const int64_t direction_rows = d * call.rows, h_state = d * B * R, c_state = d * B * H;
    BackwardStep step{};
    step.units = H;
    step.width = R;
    step.y = address(output, d * R);
    step.y_row = walk.row_stride(output);
    step.h0 = state.empty() ? nullptr : address(state[0], h_state);
    step.c0 = state.size() < 2 ? nullptr : address(state[1], c_state);
    step.saved = address(saved, direction_rows * S * H);
    step.cells = address(cells, direction_rows * H);
    step.dy = grad_output ? address(*grad_output, d * R) : nullptr;
    step.dy_row = grad_output ? walk.row_stride(*grad_output) : 0;
    step.recurrent = address(recurrent, h_state);
    step.dh = address(dh, h_state);
    step.dc = address(dc, c_state);
    step.flow_h = address(flow_h, direction_rows * R);
    step.flow_c = address(flow_c, direction_rows * H);
    step.dsum = address(dsum, held_row(d) * sums);
    step.previous = address(previous, held_row(d) * R);
    step.total = address(total);
    step.m = address(m);
    step.dm = address(dm);
    const int64_t first = walk.row(d ? T - end : begin);

    for (int64_t k = end - 1, count; k >= begin; k -= count) {
      const int64_t t = walk.time(d, k);
      count = walk.alike(d, k, begin - 1);
      step.batch = walk.active(t);
      step.row = walk.row(t);
      step.chunk_row = step.row - first;
      step.y_offset = walk.offset(output, t);
      step.dy_offset = grad_output ? walk.offset(*grad_output, t) : 0;
      const auto set_previous = [&](int64_t k, auto* batch, auto* row, auto* y_offset) {
        const int64_t before = walk.time(d, k - 1);
        *batch = k ? std::min(step.batch, walk.active(before)) : 0;
        *row = k ? walk.row(before) : 0;
        *y_offset = k ? walk.offset(output, before) : 0;
      };
      set_previous(k, &step.previous_batch, &step.previous_row, &step.previous_y_offset);
      if (count >= kShortestRun && !projected &&
          (together || on_chip(int(call.cell), storage, H, step.batch, true, 1).blocks)) {
        BackwardRun run{};
        const int64_t before = walk.time(d, k - 1), last = walk.time(d, k - count + 1);
        run.step = step;
        run.steps = count;
        run.row_step = d ? step.batch : -step.batch;
        run.y_step = walk.offset(output, before) - step.y_offset;
        run.dy_step = grad_output ? walk.offset(*grad_output, before) - step.dy_offset : 0;
        set_previous(k - count + 1, &run.last_previous_batch, &run.last_before_row,
                     &run.last_before_y);
        run.last_before_row -= walk.row(last);
        run.last_before_y -= walk.offset(output, last);
        run.w_hh = address(w[1]);
        runs.push_back(run);
        if (together && d == 0) continue;
        check_launch(launch_backward_runs(int(call.cell), storage, runs.data(), int(runs.size()),
                                          device.stream()));
        runs.clear();
        continue;
      }
      count = 1;
      if (projected) {
        check_launch(launch_total(storage, step, device.stream()));
        multiply(matrix(total, step.chunk_row * R, step.batch, R, R), w[call.per_direction - 1],
                 matrix(dm, 0, step.batch, H, H));
      }
      check_launch(launch_backward(int(call.cell), storage, step, device.stream()));
      if (k || needs & kNeedState)
        multiply(matrix(dsum, step.chunk_row * sums + gates.first_hidden_sum * H, step.batch,
                        call.gates * H, sums),
                 w[1], matrix(recurrent, h_state, step.batch, R, R));
    }
  };

  // The gradients of the weights and of the input, from what walk_back left of these steps.
  const auto multiply_out = [&](int d, int64_t begin, int64_t end) {
    const int64_t t0 = d ? T - end : begin, t1 = d ? T - begin : end;
    const int64_t first = walk.row(t0), rows = walk.row(t1) - first, at = held_row(d);
    if (want_weights) {
      // Halves too are added up in the wide type, whatever way a product is split.
      ChunkOperands operands{matrix(dsum, at * sums, rows, sums, sums),
                             walk.rows(input, t0, t1),
                             matrix(previous, at * R, rows, R, R),
                             {},
                             {}};
      if (projected) {
        operands.total = matrix(total, 0, rows, R, R);
        operands.m = matrix(m, 0, rows, H, H);
      }
      Tensors part = chunk_weight_grads(call, gates, operands, wide, device);
      for (size_t i = 0; i < sum_of_grads[d].size(); ++i)
        add(sum_of_grads[d][i], part[i], sum_of_grads[d][i], device);
      if (sum_of_grads[d].empty()) sum_of_grads[d] = std::move(part);
    }
    if (needs & kNeedInput) {
      const Tensor w_ih = Gates::in_sum_order(weights[d * call.per_direction], gates.input, H);
      Tensor to = matrix(dx, first * I, rows, I, I);
      Tensor part = d ? matrix(second_dx, 0, rows, I, I) : to;
      multiply(matrix(dsum, at * sums + gates.first_input_sum * H, rows, call.gates * H, sums),
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
  if (needs & kNeedState) add(dh, recurrent, dh_0, device);
  Tensor dc_0 = needs & kNeedState && has_c ? in_dtype(dc, dtype) : empty(input, dtype, {0});
  return {needs & kNeedInput ? walk.outward(dx) : dx, dh_0, dc_0, grads, flow_h, flow_c};
}

#ifdef RNNKERN_CUDA_ON_HOST
int64_t set_chunk(int64_t sums) { return std::exchange(chunk_sums, sums); }
#endif

}  // namespace

#ifdef RNNKERN_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rnnkern, CUDA, m) {
#endif
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

#ifdef RNNKERN_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(rnnkern_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("set_chunk", TORCH_BOX(&set_chunk));
}
#endif
