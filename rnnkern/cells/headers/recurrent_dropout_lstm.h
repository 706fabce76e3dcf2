// LSTM with recurrent dropout (Semeniuta et al. 2016): the mask drops what a step adds to c, so
// that nothing that c remembers is lost.
//   i, f, o = sigmoid(preact)   g = tanh(preact)   c' = f c + i (mask g)   h' = o tanh(c')
#pragma once
#include "cells/cell.h"

struct RecurrentDropoutLSTM : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kStateNames[] = {"h", "c"};
  static constexpr const char* kSavedNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kMaskNames[] = {"dropout"};
  static constexpr int kGates = 4, kPreacts = 4, kStates = 2, kSaved = 4, kMasks = 1;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* masks, V* next,
                                 V* saved) {
    const V i = sigmoid(preact[0]), f = sigmoid(preact[1]), g = tanh(preact[2]),
            o = sigmoid(preact[3]);
    next[1] = f * prev[1] + i * (masks[0] * g);
    next[0] = o * tanh(next[1]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* masks, const V* next,
                                  V* dnext, V* dprev, V* dgates) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one(1), tanh_c = tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (one - tanh_c * tanh_c), added = dc * masks[0];
    dgates[0] = added * g * i * (one - i);
    dgates[1] = dc * prev[1] * f * (one - f);
    dgates[2] = added * i * (one - g * g);
    dgates[3] = dnext[0] * tanh_c * o * (one - o);
    dnext[1] = dc;
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }
};
