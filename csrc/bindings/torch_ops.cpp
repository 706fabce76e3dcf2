// The operators on the CPU: checks, allocations, and one struct of pointers for the engine.
//
// Only libtorch's stable ABI (TORCH_TARGET_VERSION) is used, so that one build loads in every
// torch from 2.10 on. No engine code here; no torch in the engine.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/engine.h"

namespace {

using rnnkern::CellId;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

constexpr rnnkern::ParallelFor kTorchPool{
    [](int count, void (*body)(void*, int, int), void* context) {
      torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
        body(context, int(begin), int(end));
      });
    }};

// With RNNKERN_POISON set, new tensors are filled with NaN: what a kernel leaves unwritten shows.
const bool kPoison = std::getenv("RNNKERN_POISON") != nullptr;

// Strides are those of the contiguous tensor, but for `swapped`: the first two dimensions then lie
// in memory in the other order.
Tensor allocate(ScalarType dtype, std::initializer_list<int64_t> sizes, bool swapped = false) {
  const int64_t dim = int64_t(sizes.size());
  const int64_t* size = sizes.begin();
  int64_t stride[4], numel = 1;
  for (int64_t i = dim - 1; i >= 0; numel *= size[i--])
    stride[i] = numel > 0 ? numel : 1;
  if (swapped) {
    stride[1] = size[0] * size[2];
    stride[0] = size[2];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, size, stride,
      dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (kPoison) torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
  return tensor;
}

Tensor nothing(ScalarType dtype) { return allocate(dtype, {0}); }

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Tensors dense(Tensors tensors) {
  for (Tensor& t : tensors) t = dense(t);
  return tensors;
}

// The features of a row must be neighbours in memory; rows may lie anywhere.
Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() ? data<T>(t) : nullptr;
}
template <class T>
const T* data_or_null(const MaybeTensor& t) {
  return t ? data<const T>(*t) : nullptr;
}

// The sizes of a call, checked against its tensors. Throws where a kernel would read wrongly.
struct Call {
  CellId cell;
  int gates, saved_values;
  bool has_c, bias, packed, batch_first;
  int directions, per_direction;
  int64_t steps, batch, rows, input_size, hidden_size;
  std::vector<int64_t> offsets;

  Call(const Tensor& input, const MaybeTensor& batch_sizes, const Tensors& state,
       const Tensors& weights, int64_t cell_id, bool batch_first_)
      : cell(CellId(cell_id)), packed(batch_sizes.has_value()), batch_first(batch_first_ && !packed) {
    STD_TORCH_CHECK(cell_id >= 0 && cell_id < rnnkern::kCellCount, "rnnkern: no cell ", cell_id);
    rnnkern::visit_cell(cell, [&](auto c) {
      gates = c.kGates, saved_values = c.kSaved, has_c = c.kStates > 1;
    });
    STD_TORCH_CHECK(weights.size() >= 2, "rnnkern: expected at least two weights");
    bias = weights.size() > 2 && weights[2].dim() == 1;
    per_direction = bias ? 4 : 2;
    directions = int(weights.size()) / per_direction;
    STD_TORCH_CHECK(directions >= 1 && directions <= rnnkern::kMaxDirections &&
                        int(weights.size()) == directions * per_direction,
                    "rnnkern: unexpected number of weights, ", weights.size());
    STD_TORCH_CHECK(input.dim() == (packed ? 2 : 3), "rnnkern: input must have ", packed ? 2 : 3,
                    " dimensions, got ", input.dim());
    input_size = input.size(input.dim() - 1);
    hidden_size = weights[1].size(1);
    if (packed) {
      read_offsets(*batch_sizes, input.size(0));
    } else {
      steps = input.size(batch_first ? 1 : 0);
      batch = input.size(batch_first ? 0 : 1);
      rows = steps * batch;
    }
    STD_TORCH_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    check_weights(input, weights);
    STD_TORCH_CHECK(state.empty() || state.size() == (has_c ? 2 : 1), "rnnkern: expected ",
                    has_c ? 2 : 1, " states, got ", state.size());
    for (const Tensor& s : state) check(s, input, "state", {directions, batch, hidden_size});
  }

  void read_offsets(const Tensor& batch_sizes, int64_t given_rows) {
    STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.is_cpu() &&
                        batch_sizes.scalar_type() == ScalarType::Long,
                    "rnnkern: batch_sizes must be a 1-D int64 tensor on the CPU");
    const Tensor sizes = torch::stable::contiguous(batch_sizes);
    const int64_t* size = data<const int64_t>(sizes);
    steps = sizes.numel();
    offsets.resize(steps + 1);
    batch = steps ? size[0] : 0;
    for (int64_t t = 0; t < steps; ++t) {
      STD_TORCH_CHECK(size[t] >= 0 && (t == 0 || size[t] <= size[t - 1]),
                      "rnnkern: batch_sizes must not grow");
      offsets[t + 1] = offsets[t] + size[t];
    }
    rows = offsets[steps];
    STD_TORCH_CHECK(rows == given_rows, "rnnkern: batch_sizes add up to ", rows,
                    " rows, but the data has ", given_rows);
  }

  void check_weights(const Tensor& input, const Tensors& weights) const {
    const int64_t rows_of = gates * hidden_size;
    for (int d = 0; d < directions; ++d) {
      const Tensor* w = &weights[d * per_direction];
      check(w[0], input, "weight_ih", {rows_of, input_size});
      check(w[1], input, "weight_hh", {rows_of, hidden_size});
      if (bias) {
        check(w[2], input, "bias_ih", {rows_of});
        check(w[3], input, "bias_hh", {rows_of});
      }
    }
  }

  static void check(const Tensor& t, const Tensor& input, const char* name,
                    std::initializer_list<int64_t> sizes) {
    bool same = t.dim() == int64_t(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(int64_t(i)) == sizes.begin()[i];
    if (!same) {
      std::string expected, got;
      for (int64_t s : sizes) expected += " " + std::to_string(s);
      for (int64_t i = 0; i < t.dim(); ++i) got += " " + std::to_string(t.size(i));
      STD_TORCH_CHECK(false, "rnnkern: ", name, " must have the sizes", expected, ", got", got);
    }
    STD_TORCH_CHECK(t.scalar_type() == input.scalar_type() && t.is_cpu() == input.is_cpu(),
                    "rnnkern: ", name, " and input differ in dtype or device");
  }

  template <class T>
  rnnkern::Rows<T> rows_of(const Tensor& t) const {
    if (packed) return {data<T>(t), 0, t.stride(0)};
    return {data<T>(t), t.stride(batch_first ? 1 : 0), t.stride(batch_first ? 0 : 1)};
  }

  template <class T>
  void fill(rnnkern::Layer<T>& p, const Tensor& input, const Tensors& state,
            const Tensors& weights) const {
    p.cell = cell;
    p.sequence = {steps, batch, packed ? offsets.data() : nullptr};
    p.input_size = input_size;
    p.hidden_size = hidden_size;
    p.directions = directions;
    p.x = rows_of<const T>(input);
    for (int d = 0; d < directions; ++d) {
      const Tensor* w = &weights[d * per_direction];
      p.weights[d] = {data<const T>(w[0]), data<const T>(w[1]), bias ? data<const T>(w[2]) : nullptr,
                      bias ? data<const T>(w[3]) : nullptr};
    }
    p.h0 = state.empty() ? nullptr : data<const T>(state[0]);
    p.c0 = state.size() < 2 ? nullptr : data<const T>(state[1]);
  }

  // A tensor of rows with `features` columns, laid out in time-major order.
  Tensor allocate_rows(const Tensor& like, int64_t features) const {
    const ScalarType dtype = like.scalar_type();
    if (packed) return allocate(dtype, {rows, features});
    if (batch_first) return allocate(dtype, {batch, steps, features}, true);
    return allocate(dtype, {steps, batch, features});
  }
};

bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
Tensors converted(Tensors tensors, ScalarType dtype) {
  for (Tensor& t : tensors) t = converted(t, dtype);
  return tensors;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
ForwardResult forward_typed(const Call& call, const Tensor& input, const Tensors& state,
                            const Tensors& weights, bool train) {
  const ScalarType dtype = input.scalar_type();
  const int64_t D = call.directions, B = call.batch, H = call.hidden_size;
  Tensor output = call.allocate_rows(input, D * H);
  Tensor h_n = allocate(dtype, {D, B, H});
  Tensor c_n = call.has_c ? allocate(dtype, {D, B, H}) : nothing(dtype);
  Tensor saved = train && call.saved_values
                     ? allocate(dtype, {D, call.rows, call.saved_values, H})
                     : nothing(dtype);
  Tensor cells =
      train && call.has_c ? allocate(dtype, {D, call.rows, H}) : nothing(dtype);
  if (B > 0) {
    rnnkern::Forward<T> p{};
    call.fill(p, input, state, weights);
    p.y = call.rows_of<T>(output);
    p.h_n = data<T>(h_n);
    p.c_n = data_or_null<T>(c_n);
    p.saved = data_or_null<T>(saved);
    p.cells = data_or_null<T>(cells);
    rnnkern::forward(p, kTorchPool, int(torch::stable::get_num_threads()));
  }
  return {output, h_n, c_n, saved, cells};
}

// Halves are computed in float32: converted here at the edges.
ScalarType compute_type(ScalarType dtype) {
  STD_TORCH_CHECK(is_half(dtype) || dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "rnnkern: unsupported dtype");
  return is_half(dtype) ? ScalarType::Float : dtype;
}

ForwardResult forward(Tensor input, MaybeTensor batch_sizes, Tensors state, Tensors weights,
                      int64_t cell, bool batch_first, bool train) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  const ScalarType dtype = input.scalar_type(), compute = compute_type(dtype);
  const auto typed = compute == ScalarType::Double ? forward_typed<double> : forward_typed<float>;
  auto [output, h_n, c_n, saved, cells] =
      typed(call, dense_rows(converted(input, compute)), dense(converted(state, compute)),
            dense(converted(weights, compute)), train);
  return {converted(output, dtype), converted(h_n, dtype), converted(c_n, dtype), saved, cells};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor, Tensor>;

struct Grads {
  MaybeTensor output, h_n, c_n;
};

enum Needs : int64_t { kNeedInput = 1, kNeedState = 2, kNeedWeights = 4 };

template <class T>
BackwardResult backward_typed(const Call& call, const Grads& given, const Tensor& input,
                              const Tensors& state, const Tensors& weights, const Tensor& output,
                              const Tensor& saved, const Tensor& cells, int64_t needs, bool flow) {
  const ScalarType dtype = input.scalar_type();
  const int64_t D = call.directions, B = call.batch, H = call.hidden_size;
  const auto when = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? allocate(dtype, sizes) : nothing(dtype);
  };
  Tensor dx = needs & kNeedInput ? call.allocate_rows(input, call.input_size) : nothing(dtype);
  Tensor dh_0 = when(needs & kNeedState, {D, B, H});
  Tensor dc_0 = when(needs & kNeedState && call.has_c, {D, B, H});
  Tensor flow_h = when(flow, {D, call.rows, H});
  Tensor flow_c = when(flow && call.has_c, {D, call.rows, H});
  Tensors grads;
  if (needs & kNeedWeights)
    for (const Tensor& w : weights)
      grads.push_back(w.dim() == 2 ? allocate(dtype, {w.size(0), w.size(1)})
                                   : allocate(dtype, {w.size(0)}));
  if (B == 0) {
    for (Tensor& g : grads) torch::stable::zero_(g);
    return {dx, dh_0, dc_0, grads, flow_h, flow_c};
  }
  rnnkern::Backward<T> p{};
  call.fill(p, input, state, weights);
  p.y = call.rows_of<const T>(output);
  p.saved = data_or_null<T>(saved);
  p.cells = data_or_null<T>(cells);
  if (given.output) p.dy = call.rows_of<const T>(*given.output);
  p.dh_n = data_or_null<T>(given.h_n);
  p.dc_n = call.has_c ? data_or_null<T>(given.c_n) : nullptr;
  if (needs & kNeedInput) p.dx = call.rows_of<T>(dx);
  p.dh_0 = data_or_null<T>(dh_0);
  p.dc_0 = data_or_null<T>(dc_0);
  for (int d = 0; d < D && !grads.empty(); ++d) {
    const Tensor* g = &grads[d * call.per_direction];
    p.grads[d] = {data<T>(g[0]), data<T>(g[1]), call.bias ? data<T>(g[2]) : nullptr,
                  call.bias ? data<T>(g[3]) : nullptr};
  }
  p.flow_h = data_or_null<T>(flow_h);
  p.flow_c = data_or_null<T>(flow_c);
  rnnkern::backward(p, kTorchPool, int(torch::stable::get_num_threads()));
  return {dx, dh_0, dc_0, grads, flow_h, flow_c};
}

BackwardResult backward(MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c,
                        Tensor input, MaybeTensor batch_sizes, Tensors state, Tensors weights,
                        Tensor output, Tensor saved, Tensor cells, int64_t cell, bool batch_first,
                        int64_t needs, bool flow) {
  const Call call(input, batch_sizes, state, weights, cell, batch_first);
  const ScalarType dtype = input.scalar_type();
  const int64_t D = call.directions, H = call.hidden_size;
  if (call.packed) {
    Call::check(output, input, "output", {call.rows, D * H});
    if (grad_output) Call::check(*grad_output, input, "grad_output", {call.rows, D * H});
  } else {
    const int64_t first = call.batch_first ? call.batch : call.steps;
    const int64_t second = call.batch_first ? call.steps : call.batch;
    Call::check(output, input, "output", {first, second, D * H});
    if (grad_output) Call::check(*grad_output, input, "grad_output", {first, second, D * H});
  }
  if (grad_h) Call::check(*grad_h, input, "grad_h", {D, call.batch, H});
  if (grad_c && call.has_c) Call::check(*grad_c, input, "grad_c", {D, call.batch, H});
  STD_TORCH_CHECK(saved.numel() == D * call.rows * call.saved_values * H &&
                      cells.numel() == (call.has_c ? D * call.rows * H : 0),
                  "rnnkern: the forward pass was not run with train=True");
  const ScalarType compute = compute_type(dtype);
  const auto rows = [&](const Tensor& t) { return dense_rows(converted(t, compute)); };
  const auto optional = [&](const MaybeTensor& t) {
    return t ? MaybeTensor(dense(converted(*t, compute))) : t;
  };
  const Grads given{grad_output ? MaybeTensor(rows(*grad_output)) : grad_output, optional(grad_h),
                    optional(grad_c)};
  const auto typed = compute == ScalarType::Double ? backward_typed<double> : backward_typed<float>;
  auto [dx, dh_0, dc_0, grads, flow_h, flow_c] =
      typed(call, given, rows(input), dense(converted(state, compute)),
            dense(converted(weights, compute)), rows(output), dense(saved), dense(cells), needs,
            flow);
  return {converted(dx, dtype),    converted(dh_0, dtype), converted(dc_0, dtype),
          converted(grads, dtype), flow_h,                 flow_c};
}

std::string info() {
  int count;
  const rnnkern::Engine* const* engines = rnnkern::available_engines(&count);
  std::string levels;
  for (int i = 0; i < count; ++i)
    levels += std::string(i ? ", " : "") + "\"" + engines[i]->name + "\"";
  return std::string("{\"isa\": \"") + rnnkern::engine().name + "\", \"available\": [" + levels +
         "], \"vector_bytes\": " + std::to_string(rnnkern::engine().vector_bytes) +
         ", \"threads\": " + std::to_string(torch::stable::get_num_threads()) + "}";
}

// The machine's limit: float32 fused multiply-adds per second on `threads` threads, in GFLOP/s.
double peak(int64_t threads) {
  const auto& engine = rnnkern::engine();
  const auto time_once = [&] {
    std::vector<double> work(threads, 0.);
    const auto start = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work[i] = engine.burn(1'000'000);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double sum = 0;
    for (double w : work) sum += w;
    return sum / seconds.count() * 1e-9;
  };
  double best = 0;
  for (int i = 0; i < 5; ++i) best = std::max(best, time_once());
  return best;
}

// How a call would be cut, as JSON.
std::string plan(int64_t cell, int64_t steps, int64_t batch, int64_t input_size,
                 int64_t hidden_size, int64_t directions, int64_t element_size, bool backward,
                 int64_t threads) {
  STD_TORCH_CHECK(cell >= 0 && cell < rnnkern::kCellCount, "rnnkern: no cell ", cell);
  rnnkern::PlanInput in{steps,      batch, steps * batch,     input_size, hidden_size, 0, 0,
                        int(directions), int(element_size), backward,   backward,    int(threads)};
  rnnkern::visit_cell(CellId(cell), [&](auto c) { in.gates = c.kGates, in.sums = c.kSums; });
  const rnnkern::Plan plan = rnnkern::make_plan(in);
  return "{\"threads\": " + std::to_string(plan.threads) + ", \"split\": \"" +
         (plan.by_units ? "units" : "rows") +
         "\", \"fused_input\": " + (plan.fused_input ? "true" : "false") +
         ", \"direct\": " + (plan.direct ? "true" : "false") +
         ", \"row_block\": " + std::to_string(plan.row_block) +
         ", \"input_chunk\": " + std::to_string(plan.input_chunk) +
         ", \"gradient_chunk\": " + std::to_string(plan.gradient_chunk) + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY(rnnkern, m) {
  m.def(
      "forward(Tensor input, Tensor? batch_sizes, Tensor[] state, Tensor[] weights, int cell, "
      "bool batch_first, bool train) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved, "
      "Tensor cells)");
  m.def(
      "backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor input, "
      "Tensor? batch_sizes, Tensor[] state, Tensor[] weights, Tensor output, Tensor saved, "
      "Tensor cells, int cell, bool batch_first, int needs, bool flow) -> (Tensor grad_input, "
      "Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights, Tensor flow_h, Tensor flow_c)");
  m.def("info() -> str");
  m.def("peak(int threads) -> float");
  m.def(
      "plan(int cell, int steps, int batch, int input_size, int hidden_size, int directions, "
      "int element_size, bool backward, int threads) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("info", TORCH_BOX(&info));
  m.impl("peak", TORCH_BOX(&peak));
  m.impl("plan", TORCH_BOX(&plan));
}
