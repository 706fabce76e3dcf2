// LSTM with layer normalisation (Ba et al. 2016) of W_ih x, of W_hh h and of c, gains g and biases
// b:
//   i, f, o = sigmoid(preact)   g = tanh(preact)   preact = sums + g_hh norm(W_hh h)
//   c' = f c + i g   h' = o tanh(g_c norm(c') + b_c)
// The sums that are given are the normalised W_ih x; the bias of norm(W_hh h) would add to theirs.
#pragma once
#include "cells/cell.h"

struct LayerNormLSTMOfSums : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kStateNames[] = {"h", "c"};
  static constexpr const char* kSavedNames[] = {"input",     "forget",      "cell",
                                                "output",    "norm input",  "norm forget",
                                                "norm cell", "norm output", "norm scale"};
  static constexpr const char* kParamNames[] = {"input",  "forget", "cell",
                                                "output", "c gain", "c bias"};
  static constexpr int kGates = 4, kPreacts = 8, kHiddenPreact = 4, kStates = 2, kSaved = 9;
  static constexpr int kParams = 6, kNormalizedState = 1;
  static constexpr Input kInput = Input::given;
  static constexpr bool kNormalizesHidden = true;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, V* next,
                                 V* saved) {
    const V i = sigmoid(preact[0] + params[0] * preact[4]),
            f = sigmoid(preact[1] + params[1] * preact[5]),
            g = tanh(preact[2] + params[2] * preact[6]),
            o = sigmoid(preact[3] + params[3] * preact[7]);
    next[1] = f * prev[1] + i * g;
    next[0] = o;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  RNNKERN_HD static V output(V o, V norm, const V* params) {
    return o * tanh(params[4] * norm + params[5]);
  }

  template <class V>
  RNNKERN_HD static V output_backward(const V* saved, V norm, const V* params, V dh) {
    const V tanh_c = tanh(params[4] * norm + params[5]);
    return params[4] * (dh * saved[3] * (V(1) - tanh_c * tanh_c));
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* params, const V* next,
                                  V* dnext, V* dprev, V* dgates, V* dparams) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one(1), dc = dnext[1];
    const V tanh_c = tanh(params[4] * next[1] + params[5]);
    dgates[0] = dc * g * i * (one - i);
    dgates[1] = dc * prev[1] * f * (one - f);
    dgates[2] = dc * i * (one - g * g);
    dgates[3] = dnext[0] * tanh_c * o * (one - o);
    for (int k = 0; k < 4; ++k) {
      dgates[4 + k] = params[k] * dgates[k];
      dparams[k] = saved[4 + k] * dgates[k];
    }
    dparams[5] = dnext[0] * o * (one - tanh_c * tanh_c);
    dparams[4] = next[1] * dparams[5];
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }
};
