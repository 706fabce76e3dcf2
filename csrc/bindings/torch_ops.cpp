// The operators on the CPU: checks, allocations, and one struct of pointers for the engine.
//
// Only libtorch's stable ABI (TORCH_TARGET_VERSION) is used, so that one build loads in every
// torch from 2.10 on. No engine code here; no torch in the engine.
// clang-format off
#include "torch_tensors.h"  // before torch's headers, as it includes call.h
// clang-format on
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../cpu/engine.h"
#include "layer_params.h"
#include "torch_pool.h"

namespace {

using namespace rnnkern;

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
  STD_TORCH_CHECK(!weights.empty(), "rnnkern: expected a layer's weights");
  std::vector<Shape> shapes;
  for (const Tensor& w : weights) shapes.push_back(shape_of(w));
  const int64_t sizes[] = {1, 1, input_size_of(spec, shapes)}, strides[] = {0, 0, 0};
  AtenTensorHandle row;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, sizes, strides, Kind(weights[0]).dtype,
                                                  aoti_torch_device_type_cpu(), 0, &row));
  return Call(Tensor(row), {}, {}, weights, spec, masks);
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
