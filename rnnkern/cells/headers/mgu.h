// Minimal gated unit (Zhou et al. 2016), with the gate after the recurrent product, as in
// torch.nn.GRU:
//   f = sigmoid(preact)   n = tanh(W_in x + b_in + f (W_hn h + b_hn))   h' = (1 - f) h + f n
// Pre-activations: [n, f, q]. n takes only the input product, and q = W_hn h + b_hn only the
// recurrent one.
#pragma once
#include "cells/cell.h"

struct MGU : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"forget", "new"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"new", "forget", "q"};
  static constexpr int kGates = 2, kPreacts = 3, kInputPreact = 0, kHiddenPreact = 1;
  static constexpr int kStates = 1, kSaved = 3;
  static constexpr int input_gate(int s) { return (s + 1) % 2; }  // here n, f; in weights f, n

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V f = sigmoid(preact[1]), q = preact[2], n = tanh(preact[0] + f * q);
    next[0] = prev[0] + f * (n - prev[0]);
    saved[0] = n, saved[1] = f, saved[2] = q;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V*, V* dnext, V* dprev,
                                  V* dgates) {
    const V n = saved[0], f = saved[1], q = saved[2], one(1), dh = dnext[0];
    const V dn = dh * f * (one - n * n);
    dgates[0] = dn;
    dgates[1] = (dh * (n - prev[0]) + dn * q) * f * (one - f);
    dgates[2] = dn * f;
    dprev[0] = dh * (one - f);
  }
};
