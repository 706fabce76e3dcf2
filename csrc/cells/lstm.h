// Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000),
// as in torch.nn.LSTM:
//   i, f, o = sigmoid(preact)   g = tanh(preact)   c' = f c + i g   h' = o tanh(c')
#pragma once
#include "cell.h"

namespace rnnkern {

struct Lstm : CellDefaults {
  static constexpr const char* kGateNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kStateNames[] = {"h", "c"};
  static constexpr const char* kSavedNames[] = {"input", "forget", "cell", "output"};
  static constexpr int kGates = 4, kPreacts = 4, kStates = 2, kSaved = 4;
  static constexpr bool kProjects = true;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V i = sigmoid(preact[0]), f = sigmoid(preact[1]), g = tanh(preact[2]),
            o = sigmoid(preact[3]);
    const V c = f * prev[1] + i * g;
    next[0] = o * tanh(c);
    next[1] = c;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* next, V* dnext, V* dprev,
                                  V* dgates) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one(1), tanh_c = tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (one - tanh_c * tanh_c);
    dgates[0] = dc * g * i * (one - i);
    dgates[1] = dc * prev[1] * f * (one - f);
    dgates[2] = dc * i * (one - g * g);
    dgates[3] = dnext[0] * tanh_c * o * (one - o);
    dnext[1] = dc;
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }

  template <class V>
  RNNKERN_HD static V hidden(const V* saved, const V* next) {
    return saved[3] * tanh(next[1]);
  }
};

}  // namespace rnnkern
