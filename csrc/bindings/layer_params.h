// The engine's parameters of a checked call, from tensors of torch: its own or its stable ABI's.
#pragma once
#include <optional>

#include "../core/call_shape.h"
#include "../core/layer_params.h"

namespace rnnkern {

template <class T, class AnyTensor>
T* data(const AnyTensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T, class AnyTensor>
T* data_or_null(const AnyTensor& t) {
  return t.numel() ? data<T>(t) : nullptr;
}
template <class T, class AnyTensor>
const T* data_or_null(const std::optional<AnyTensor>& t) {
  return t ? data<const T>(*t) : nullptr;
}

template <class T, class AnyTensor>
SequenceView<T> rows_of(const CallShape& call, const AnyTensor& t) {
  if (call.packed) return {data<T>(t), 0, t.stride(0)};
  return {data<T>(t), t.stride(call.batch_first ? 1 : 0), t.stride(call.batch_first ? 0 : 1)};
}

template <class T, class AnyTensor, class AnyTensors>
void fill(LayerParams<T>& p, const CallShape& call, const AnyTensor& input, const AnyTensors& state,
          const AnyTensors& weights) {
  p.cell = call.cell;
  p.sequence = {call.steps, call.batch, call.packed ? call.offsets.data() : nullptr};
  p.input_size = call.input_size;
  p.hidden_size = call.hidden_size;
  p.proj_size = call.proj_size;
  p.directions = call.directions;
  p.heads = call.heads;
  p.x = rows_of<const T>(call, input);
  for (int d = 0; d < call.directions && !weights.empty(); ++d) {
    const AnyTensor* w = &weights[d * call.places.count];
    p.weights[d] =
        call.places.pointers<Weights<T>>([&](int place) { return data<const T>(w[place]); });
  }
  p.h0 = state.empty() ? nullptr : data<const T>(state[0]);
  p.c0 = state.size() < 2 ? nullptr : data<const Acc<T>>(state[1]);
}

// The rows of a state after resets, (D, B, ·) or by step as the input is, or of its gradient.
template <class T, class AnyTensor>
SequenceView<T> reset_rows(const CallShape& call, const AnyTensor& t) {
  if (t.dim() == 3) return {data<T>(t), 0, t.stride(1)};
  return {data<T>(t), t.stride(call.batch_first ? 2 : 1), t.stride(call.batch_first ? 1 : 2)};
}

template <class T, class AnyTensor, class AnyTensors>
void fill_resets(LayerParams<T>& p, const CallShape& call, const AnyTensor& mask,
                 const AnyTensors& state) {
  const int step = call.batch_first ? 1 : 0;
  p.resets = {data<const uint8_t>(mask), mask.stride(step), mask.stride(1 - step)};
  if (state.size() > 0) p.reset_h = reset_rows<const T>(call, state[0]);
  if (state.size() > 1) p.reset_c = reset_rows<const Acc<T>>(call, state[1]);
}

// `masks`: as CallShape::check_masks has them; those of a row lie side by side.
template <class T, class AnyTensor>
void fill_masks(LayerParams<T>& p, const CallShape& call, const AnyTensor& masks) {
  const int step = call.batch_first ? 2 : 1, row = call.packed ? 1 : 3 - step;
  p.masks = {data<const Acc<T>>(masks), call.packed ? 0 : masks.stride(step), masks.stride(row)};
  p.masks_d_stride = masks.stride(0);
}

// `grads`: of all weights.
template <class T, class AnyTensors>
void fill_grads(BackwardParams<T>& p, const CallShape& call, const AnyTensors& grads) {
  using S = Acc<T>;
  for (int d = 0; d < call.directions; ++d) {
    const auto* g = &grads[d * call.places.count];
    p.grads[d] = call.places.pointers<WeightGrads<S>>([&](int place) { return data<S>(g[place]); });
  }
}

}  // namespace rnnkern
