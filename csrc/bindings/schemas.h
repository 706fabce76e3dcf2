// The operators' schemas. `resets` and what follows it: see Resets in call.h; `masks` are those of
// a cell that takes some. The tests' operators
// on the simulated chip have the same. No list is ever empty: ahead-of-time packages hand over an
// empty list of tensors as None.
#pragma once
#include "../core/call_spec.h"

namespace rnnkern {

// The gradients that a backward pass is asked for: `needs` is a sum of these.
enum Needs : int64_t { kNeedInput = 1, kNeedState = 2, kNeedWeights = 4, kNeedResetState = 8 };

}  // namespace rnnkern

#define RNNKERN_STEPS_SCHEMA \
  "Tensor? resets=None, Tensor? reset_h=None, Tensor? reset_c=None, Tensor? masks=None"
#define RNNKERN_FORWARD_SCHEMA                                                     \
  "forward(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] " \
  "weights, " RNNKERN_CALL_SPEC_SCHEMA ", bool train, " RNNKERN_STEPS_SCHEMA       \
  ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved, Tensor c_states)"
// A layer's weights as the engine multiplies by them, opaque, for this process's instruction-set
// level; `format` is a WeightFormat (core/prepacked.h).
#define RNNKERN_PREPACK_SCHEMA                          \
  "prepack(Tensor[] weights, " RNNKERN_CALL_SPEC_SCHEMA \
  ", int format, Tensor? masks=None) -> Tensor"
#define RNNKERN_FORWARD_PREPACKED_SCHEMA                                                   \
  "forward_prepacked(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor " \
  "prepacked, " RNNKERN_CALL_SPEC_SCHEMA                                                   \
  ", int hidden_size, int proj_size) -> (Tensor output, Tensor h_n, Tensor c_n)"
#define RNNKERN_BACKWARD_SCHEMA                                                      \
  "backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor input, "     \
  "Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor output, " \
  "Tensor saved, Tensor c_states, " RNNKERN_CALL_SPEC_SCHEMA                         \
  ", int needs, bool flow, " RNNKERN_STEPS_SCHEMA                                    \
  ") -> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights, " \
  "Tensor flow_h, Tensor flow_c, Tensor grad_reset_h, Tensor grad_reset_c)"
