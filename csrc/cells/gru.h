// Gated recurrent unit (Cho et al. 2014) in torch.nn.GRU's variant, where the reset gate applies
// after the recurrent product:
//   r, z = sigmoid(sums)   n = tanh(W_in x + b_in + r (W_hn h + b_hn))   h' = (1 - z) n + z h
// Sums: [n, r, z, q], where n takes only the input product and q = W_hn h + b_hn only the
// recurrent one, so that both products go to consecutive sums.
#pragma once
#include "cell.h"

namespace rnnkern {

struct Gru {
  static constexpr int kGates = 3, kSums = 4, kInputSum = 0, kHiddenSum = 1;
  static constexpr int kStates = 1, kSaved = 4;
  static constexpr bool kProjects = false;
  static constexpr int input_gate(int s) { return (s + 2) % 3; }  // sums n, r, z; torch r, z, n
  static constexpr int hidden_gate(int s) { return s; }           // sums r, z, q

  template <class V>
  RNNKERN_CELL void forward(const V* sum, const V* prev, V* next, V* saved) {
    const V r = sigmoid(sum[1]), z = sigmoid(sum[2]), q = sum[3];
    const V n = tanh(sum[0] + r * q);
    next[0] = n + z * (prev[0] - n);
    saved[0] = n, saved[1] = r, saved[2] = z, saved[3] = q;
  }

  template <class V>
  RNNKERN_CELL void backward(const V* saved, const V* prev, const V*, V* dnext, V* dprev, V* dsum) {
    const V n = saved[0], r = saved[1], z = saved[2], q = saved[3];
    const V one(1), dh = dnext[0];
    const V dn = dh * (one - z) * (one - n * n);
    dsum[0] = dn;
    dsum[1] = dn * q * r * (one - r);
    dsum[2] = dh * (prev[0] - n) * z * (one - z);
    dsum[3] = dn * r;
    dprev[0] = dh * z;
  }
};

}  // namespace rnnkern
