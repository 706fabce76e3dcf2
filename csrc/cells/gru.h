// Gated recurrent unit (Cho et al. 2014) in torch.nn.GRU's variant, where the reset gate applies
// after the recurrent product:
//   r, z = sigmoid(preact)   n = tanh(W_in x + b_in + r (W_hn h + b_hn))   h' = (1 - z) n + z h
// Pre-activations: [n, r, z, q]. n takes only the input product, and q = W_hn h + b_hn only the
// recurrent one. So each product fills consecutive pre-activations.
#pragma once
#include "cell.h"

namespace rnnkern {

struct Gru : CellDefaults {
  static constexpr const char* kGateNames[] = {"reset", "update", "new"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"new", "reset", "update", "q"};
  static constexpr int kGates = 3, kPreacts = 4, kInputPreact = 0, kHiddenPreact = 1;
  static constexpr int kStates = 1, kSaved = 4;
  static constexpr int input_gate(int s) { return (s + 2) % 3; }  // here n, r, z; torch r, z, n

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V r = sigmoid(preact[1]), z = sigmoid(preact[2]), q = preact[3];
    const V n = tanh(preact[0] + r * q);
    next[0] = n + z * (prev[0] - n);
    saved[0] = n, saved[1] = r, saved[2] = z, saved[3] = q;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V*, V* dnext, V* dprev,
                                  V* dgates) {
    const V n = saved[0], r = saved[1], z = saved[2], q = saved[3];
    const V one(1), dh = dnext[0];
    const V dn = dh * (one - z) * (one - n * n);
    dgates[0] = dn;
    dgates[1] = dn * q * r * (one - r);
    dgates[2] = dh * (prev[0] - n) * z * (one - z);
    dgates[3] = dn * r;
    dprev[0] = dh * z;
  }
};

}  // namespace rnnkern
