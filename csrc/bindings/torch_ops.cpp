// The operators on the CPU: checks, allocations, and one struct of pointers for the engine.
//
// Only libtorch's stable ABI (TORCH_TARGET_VERSION) is used, so that one build loads in every
// torch from 2.10 on. No engine code here; no torch in the engine.
// clang-format off
#include "call.h"  // before torch's headers, which report errors by it
// clang-format on
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <chrono>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "../core/cell_table.h"
#include "../cpu/engine.h"
#include "../cpu/runtime/plan_resets.h"
#include "layer_params.h"
#include "torch_pool.h"

namespace {

using namespace rnnkern;

// With RNNKERN_POISON set, new tensors are filled with NaN: what a kernel leaves unwritten shows.
const bool kPoison = std::getenv("RNNKERN_POISON") != nullptr;

int32_t aoti_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float32();
  }
}

// Strides are those of the contiguous tensor, but for `swapped`: the first two dimensions then lie
// in memory in the other order.
Tensor allocate(ScalarType dtype, std::initializer_list<int64_t> sizes, bool swapped = false) {
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

Tensor nothing(ScalarType dtype) { return allocate(dtype, {0}); }

// Contiguous, of three or four dimensions.
Tensor zeros_as(const Tensor& t, ScalarType dtype) {
  Tensor zeros = t.dim() == 3 ? allocate(dtype, {t.size(0), t.size(1), t.size(2)})
                              : allocate(dtype, {t.size(0), t.size(1), t.size(2), t.size(3)});
  return torch::stable::zero_(zeros);
}

// A tensor of rows with `features` columns, laid out in time-major order.
Tensor allocate_rows(const Call& call, ScalarType dtype, int64_t features) {
  if (call.packed) return allocate(dtype, {call.rows, features});
  if (call.batch_first) return allocate(dtype, {call.batch, call.steps, features}, true);
  return allocate(dtype, {call.steps, call.batch, features});
}

Tensor converted(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
Tensors converted(Tensors&& tensors, ScalarType dtype) {
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

// The masks of a row must be neighbours in memory; rows may lie anywhere.
template <class T>
MaybeTensor masks_as(const MaybeTensor& masks) {
  if (!masks) return masks;
  const Tensor t = with_dense_rows(converted(*masks, kType<Acc<T>>));
  const int64_t last = t.dim() - 1;
  const bool adjoin = t.size(last - 1) <= 1 || t.stride(last - 1) == t.size(last);
  return adjoin ? t : torch::stable::contiguous(t);
}

// With prepacked weights, `weights` is empty.
template <class T>
ForwardResult forward_typed(const Call& call, const Tensor& input, const Tensors& state,
                            const Tensors& weights, const Resets& resets, const MaybeTensor& masks,
                            bool train, const PrepackedHeader* prepacked = nullptr) {
  constexpr ScalarType dtype = kType<T>, wide = kType<Acc<T>>;
  const int64_t D = call.directions, B = call.batch;
  Tensor output = allocate_rows(call, dtype, D * call.width);
  Tensor h_n = allocate(dtype, {D, B, call.width});
  Tensor c_n = call.has_c ? allocate(wide, {D, B, call.c_width}) : nothing(wide);
  // Opaque: their layout is that of saved_layout.h, rnnkern/saved_layout.py reads it.
  Tensor saved = allocate(dtype, {train ? call.saved_size() : 0});
  Tensor c_states = allocate(wide, {train ? call.c_states_size() : 0});
  if (B > 0) {
    rnnkern::ForwardParams<T> p{};
    fill(p, call, input, state, weights);
    if (resets.mask) fill_resets(p, call, *resets.mask, resets.state);
    if (masks) fill_masks(p, call, *masks);
    p.prepacked = prepacked;
    p.y = rows_of<T>(call, output);
    p.h_n = data<T>(h_n);
    p.c_n = data_or_null<Acc<T>>(c_n);
    p.saved = data_or_null<T>(saved);
    p.c_states = data_or_null<Acc<T>>(c_states);
    run_engine([&] { forward(p, kTorchPool, int(torch::stable::get_num_threads())); });
  }
  return {output, h_n, c_n, saved, c_states};
}

ForwardResult forward_op(ForwardArgs args) {
  const Call call(args.input, args.batch_sizes, args.state, args.weights, args.spec,
                  args.masks.has_value());
  const ScalarType dtype = args.input.scalar_type();
  call.check_resets(args.resets, Kind(args.input));
  call.check_masks(args.masks, Kind(args.input));
  auto [output, h_n, c_n, saved, c_states] = visit_type(call, dtype, [&]<class T>(T) {
    return forward_typed<T>(call, rows_as<T>(args.input), states_as<T>(std::move(args.state)),
                            weights_as<T>(std::move(args.weights)),
                            resets_as<T>(std::move(args.resets)), masks_as<T>(args.masks),
                            args.train);
  });
  return {converted(output, dtype), converted(h_n, dtype), converted(c_n, dtype),
          converted(saved, dtype), c_states};
}

// A layer's weights alone, as a call without rows to compute.
Call weights_call(const Tensors& weights, const CallSpec& spec, bool masks) {
  STD_TORCH_CHECK(!weights.empty() && weights[0].dim() == 2, "rnnkern: expected a layer's weights");
  const int64_t sizes[] = {1, 1, weights[0].size(1)}, strides[] = {0, 0, 0};
  AtenTensorHandle row;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, sizes, strides, Kind(weights[0]).dtype,
                                                  aoti_torch_device_type_cpu(), 0, &row));
  return Call(Tensor(row), {}, {}, weights, spec, masks);
}

// As allocate_block, in torch's memory.
Tensor allocate_bytes(int64_t bytes) {
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

template <class T>
Tensor prepack_typed(const Call& call, const Tensors& weights, WeightFormat format,
                     const MaybeTensor& masks, int tag) {
  LayerParams<T> p{};
  fill(p, call, weights[0], {}, weights);
  if (masks) p.masks.data = data<const Acc<T>>(*masks);
  Tensor memory = allocate_bytes(int64_t(prepacked_bytes(p, format)));
  prepack(p, format, tag, memory.data_ptr());
  return memory;
}

Tensor prepack_op(Tensors weights, const CallSpec& spec, int64_t format, const MaybeTensor& masks) {
  const Call call = weights_call(weights, spec, masks.has_value());
  call.check_constant_masks(masks, Kind(weights[0]));
  const ScalarType dtype = weights[0].scalar_type();
  STD_TORCH_CHECK(format >= 0 && format <= int64_t(WeightFormat::int8),
                  "rnnkern: no format of weights ", format);
  STD_TORCH_CHECK(format == 0 || dtype == ScalarType::Float,
                  "rnnkern: only float32 weights can be rounded to bfloat16 or int8");
  return visit_type(call, dtype, [&]<class T>(T) {
    const MaybeTensor own = masks ? dense(converted(*masks, kType<Acc<T>>)) : masks;
    return prepack_typed<T>(call, weights_as<T>(std::move(weights)), WeightFormat(format), own,
                            int(dtype));
  });
}

const PrepackedHeader& read_prepacked(const Tensor& memory) {
  STD_TORCH_CHECK(memory.dim() == 1 && memory.is_cpu() && memory.is_contiguous() &&
                      memory.scalar_type() == ScalarType::Byte,
                  "rnnkern: prepacked weights are a 1-D uint8 tensor on the CPU");
  check_memory(memory, "the prepacked weights");
  const void* const data = memory.const_data_ptr();
  const char* const refusal = prepacked_refusal(data, size_t(memory.numel()));
  STD_TORCH_CHECK(!refusal, "rnnkern: ", refusal ? refusal : "");
  return *static_cast<const PrepackedHeader*>(data);
}

using InferenceResult = std::tuple<Tensor, Tensor, Tensor>;

InferenceResult forward_prepacked_op(const Tensor& input, const MaybeTensor& batch_sizes,
                                     Tensors state, const Tensor& prepacked, const CallSpec& spec,
                                     int64_t hidden_size, int64_t proj_size) {
  const PrepackedHeader& header = read_prepacked(prepacked);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(is_of(header, spec, hidden_size, proj_size),
                  "rnnkern: the prepacked weights are another layer's");
  STD_TORCH_CHECK(header.tag == int32_t(dtype),
                  "rnnkern: the prepacked weights and input differ in dtype");
  const WeightShapes weights(spec, header);
  const Call call(input, batch_sizes, state, weights.shapes(), spec, has_masks(header));
  const auto run = [&]<class T>(T) {
    return forward_typed<T>(call, rows_as<T>(input), states_as<T>(std::move(state)), {}, {}, {},
                            false, &header);
  };
  auto [output, h_n, c_n, saved, c_states] = header.element_size == 8   ? run(double{})
                                             : header.element_size == 2 ? run(bfloat16{})
                                                                        : run(float{});
  return {converted(output, dtype), converted(h_n, dtype), converted(c_n, dtype)};
}

// The operators with the spec's fields one by one, as torch calls them.
template <class SpecTypes>
struct PrepackedOps;
template <class... Spec>
struct PrepackedOps<std::tuple<Spec...>> {
  static Tensor prepack(Tensors weights, Spec... spec, int64_t format, MaybeTensor masks) {
    return prepack_op(std::move(weights), CallSpec{spec...}, format, masks);
  }
  static InferenceResult forward(Tensor input, MaybeTensor batch_sizes, MaybeTensor h_0,
                                 MaybeTensor c_0, Tensor prepacked, Spec... spec,
                                 int64_t hidden_size, int64_t proj_size) {
    return forward_prepacked_op(input, batch_sizes, given(h_0, c_0), prepacked, CallSpec{spec...},
                                hidden_size, proj_size);
  }
};

struct Grads {
  MaybeTensor output, h_n, c_n;
};

template <class T>
BackwardResult backward_typed(const Call& call, const Grads& given, const Tensor& input,
                              const Tensors& state, const Tensors& weights, const Tensor& output,
                              const Tensor& saved, const Tensor& c_states, const Resets& resets,
                              const MaybeTensor& masks, int64_t needs, bool flow) {
  using S = Acc<T>;
  constexpr ScalarType dtype = kType<S>;
  const int64_t D = call.directions, B = call.batch;
  const auto when = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? allocate(dtype, sizes) : nothing(dtype);
  };
  Tensor dx = needs & kNeedInput ? allocate_rows(call, dtype, call.input_size) : nothing(dtype);
  Tensor dh_0 = when(needs & kNeedState, {D, B, call.width});
  Tensor dc_0 = when(needs & kNeedState && call.has_c, {D, B, call.c_width});
  Tensor flow_h = when(flow, {D, call.rows, call.width});
  Tensor flow_c = when(flow && call.has_c, {D, call.rows, call.c_width});
  Tensor dreset[] = {nothing(dtype), nothing(dtype)};
  for (size_t i = 0; i < resets.state.size() && needs & kNeedResetState; ++i)
    dreset[i] = zeros_as(resets.state[i], dtype);
  Tensors grads;
  if (needs & kNeedWeights)
    for (const Tensor& w : weights)
      grads.push_back(w.dim() == 3   ? allocate(dtype, {w.size(0), w.size(1), w.size(2)})
                      : w.dim() == 2 ? allocate(dtype, {w.size(0), w.size(1)})
                                     : allocate(dtype, {w.size(0)}));
  if (B == 0) {
    for (Tensor& g : grads) torch::stable::zero_(g);
    return {dx, dh_0, dc_0, grads, flow_h, flow_c, dreset[0], dreset[1]};
  }
  rnnkern::BackwardParams<T> p{};
  fill(p, call, input, state, weights);
  p.y = rows_of<const T>(call, output);
  p.saved = data_or_null<T>(saved);
  p.c_states = data_or_null<S>(c_states);
  if (given.output) p.dy = rows_of<const T>(call, *given.output);
  p.dh_n = data_or_null<S>(given.h_n);
  p.dc_n = call.has_c ? data_or_null<S>(given.c_n) : nullptr;
  if (needs & kNeedInput) p.dx = rows_of<S>(call, dx);
  p.dh_0 = data_or_null<S>(dh_0);
  p.dc_0 = data_or_null<S>(dc_0);
  if (resets.mask) fill_resets(p, call, *resets.mask, resets.state);
  if (masks) fill_masks(p, call, *masks);
  if (dreset[0].numel()) p.dreset_h = reset_rows<S>(call, dreset[0]);
  if (dreset[1].numel()) p.dreset_c = reset_rows<S>(call, dreset[1]);
  if (!grads.empty()) fill_grads(p, call, grads);
  p.flow_h = data_or_null<S>(flow_h);
  p.flow_c = data_or_null<S>(flow_c);
  run_engine([&] { backward(p, kTorchPool, int(torch::stable::get_num_threads())); });
  return {dx, dh_0, dc_0, grads, flow_h, flow_c, dreset[0], dreset[1]};
}

BackwardResult backward_op(BackwardArgs args) {
  const Call call(args.input, args.batch_sizes, args.state, args.weights, args.spec,
                  args.masks.has_value());
  const ScalarType dtype = args.input.scalar_type();
  call.check_backward(args, dtype);
  auto [dx, dh_0, dc_0, grads, flow_h, flow_c, dreset_h,
        dreset_c] = visit_type(call, dtype, [&]<class T>(T) {
    const auto optional = [](const MaybeTensor& t) {
      return t ? MaybeTensor(dense(converted(*t, kType<Acc<T>>))) : t;
    };
    const Grads grads{args.grad_output ? MaybeTensor(rows_as<T>(*args.grad_output)) : MaybeTensor(),
                      optional(args.grad_h), optional(args.grad_c)};
    return backward_typed<T>(
        call, grads, rows_as<T>(args.input), states_as<T>(std::move(args.state)),
        weights_as<T>(std::move(args.weights)), rows_as<T>(args.output),
        dense(converted(args.saved, kType<T>)), dense(args.c_states),
        resets_as<T>(std::move(args.resets)), masks_as<T>(args.masks), args.needs, args.flow);
  });
  return {converted(dx, dtype),
          converted(dh_0, dtype),
          converted(dc_0, dtype),
          converted(std::move(grads), dtype),
          flow_h,
          flow_c,
          converted(dreset_h, dtype),
          converted(dreset_c, dtype)};
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
      for (int64_t i = begin; i < end; ++i) work[i] = engine.peak_fma_loop(1'000'000);
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

// How a call with resets would run: "mask" or "episodes", and the rule.
std::tuple<std::string, std::string> plan_resets_op(int64_t steps, int64_t batch,
                                                    int64_t hidden_size, int64_t episodes) {
  const rnnkern::ResetsPlan plan = rnnkern::plan_resets(steps, batch, hidden_size, episodes);
  return {plan.mask ? "mask" : "episodes", plan.rule};
}

// How a call would be cut, as JSON.
std::string plan_op(int64_t cell, int64_t steps, int64_t batch, int64_t input_size,
                    int64_t hidden_size, int64_t proj_size, int64_t directions,
                    int64_t element_size, bool backward, int64_t threads, int64_t heads) {
  const CellFacts* const facts = cell_facts(cell);
  STD_TORCH_CHECK(facts, "rnnkern: no cell ", cell);
  const bool as_they_are =
      supports<rnnkern::bfloat16>(CellId(cell), input_size, hidden_size, proj_size);
  if (element_size == 2 && !as_they_are) element_size = sizeof(float);
  rnnkern::PlanInput in{steps,     batch,        steps * batch,  input_size,      hidden_size,
                        proj_size, facts->gates, facts->preacts, int(directions), int(element_size),
                        backward,  int(threads)};
  in.heads = facts->recurrent == Recurrent::none ? 0 : heads;
  const rnnkern::Plan plan = rnnkern::make_plan(in);
  const auto text = [](const char* s) { return std::string("\"") + s + '"'; };
  const rnnkern::PlanRules& rules = plan.rules;
  return "{\"threads\": " + std::to_string(plan.threads) + ", \"split\": \"" +
         (plan.split_units ? "units" : "rows") +
         "\", \"fused_input\": " + (plan.fused_input ? "true" : "false") +
         ", \"unpacked_weights\": " + (plan.unpacked_weights ? "true" : "false") +
         ", \"row_block\": " + std::to_string(plan.row_block) +
         ", \"input_chunk\": " + std::to_string(plan.input_chunk) +
         ", \"wgrad_rows\": " + std::to_string(plan.wgrad_rows) +
         ", \"wgrad_chunk\": " + std::to_string(plan.wgrad_chunk) +
         ", \"rule\": {\"threads\": " + text(rules.threads) + ", \"split\": " + text(rules.split) +
         ", \"input\": " + text(rules.input) + ", \"weights\": " + text(rules.weights) +
         ", \"wgrad\": " + text(rules.wgrad) + "}}";
}

}  // namespace

STABLE_TORCH_LIBRARY(rnnkern, m) {
  m.def(RNNKERN_FORWARD_SCHEMA);
  m.def(RNNKERN_PREPACK_SCHEMA);
  m.def(RNNKERN_FORWARD_PREPACKED_SCHEMA);
  m.def(RNNKERN_BACKWARD_SCHEMA);
  m.def("info() -> str");
  m.def("cells() -> str");
  m.def("peak(int threads) -> float");
  m.def(
      "plan(int cell, int steps, int batch, int input_size, int hidden_size, int proj_size, "
      "int directions, int element_size, bool backward, int threads, int heads=1) -> str");
  m.def("plan_resets(int steps, int batch, int hidden_size, int episodes) -> (str way, str rule)");
  m.def(
      "cuda_plan(Tensor input, int cell, int steps, int batch, int hidden_size, int proj_size, "
      "int directions, bool packed, bool backward) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CPU, m) {
  m.impl("forward", TORCH_BOX(&ForwardOp<forward_op>::call));
  m.impl("backward", TORCH_BOX(&BackwardOp<backward_op>::call));
  m.impl("prepack", TORCH_BOX(&PrepackedOps<CallSpec::Types>::prepack));
  m.impl("forward_prepacked", TORCH_BOX(&PrepackedOps<CallSpec::Types>::forward));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("info", TORCH_BOX(&info));
  m.impl("cells", TORCH_BOX(&rnnkern::cell_table));
  m.impl("peak", TORCH_BOX(&peak));
  m.impl("plan", TORCH_BOX(&plan_op));
  m.impl("plan_resets", TORCH_BOX(&plan_resets_op));
}
