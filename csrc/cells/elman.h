// Elman's simple recurrent network (1990), as in torch.nn.RNN:  h' = tanh(preact)  or relu(preact).
// Nothing is saved: the derivative follows from h' itself.
#pragma once
#include "cell.h"

namespace rnnkern {

struct Elman : CellDefaults {
  static constexpr const char* kGateNames[] = {"hidden"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr int kGates = 1, kPreacts = 1, kStates = 1, kSaved = 0;
};

struct ElmanTanh : Elman {
  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V*, V* next, V*) {
    next[0] = tanh(preact[0]);
  }

  template <class V>
  RNNKERN_HD static void backward(const V*, const V*, const V* next, V* dnext, V* dprev,
                                  V* dgates) {
    dgates[0] = dnext[0] * (V(1) - next[0] * next[0]);
    dprev[0] = V(0);
  }
};

struct ElmanRelu : Elman {
  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V*, V* next, V*) {
    next[0] = relu(preact[0]);
  }

  template <class V>
  RNNKERN_HD static void backward(const V*, const V*, const V* next, V* dnext, V* dprev,
                                  V* dgates) {
    dgates[0] = where_positive(next[0], dnext[0]);
    dprev[0] = V(0);
  }
};

}  // namespace rnnkern
