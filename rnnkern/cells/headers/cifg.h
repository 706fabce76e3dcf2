// LSTM with coupled input and forget gates, CIFG (Greff et al. 2017):
//   f, o = sigmoid(preact)   g = tanh(preact)   c' = f c + (1 - f) g   h' = o tanh(c')
#pragma once
#include "cells/cell.h"

struct CIFG : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"forget", "cell", "output"};
  static constexpr const char* kStateNames[] = {"h", "c"};
  static constexpr const char* kSavedNames[] = {"forget", "cell", "output"};
  static constexpr int kGates = 3, kPreacts = 3, kStates = 2, kSaved = 3;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V f = sigmoid(preact[0]), g = tanh(preact[1]), o = sigmoid(preact[2]);
    const V c = g + f * (prev[1] - g);
    next[0] = o * tanh(c);
    next[1] = c;
    saved[0] = f, saved[1] = g, saved[2] = o;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* next, V* dnext, V* dprev,
                                  V* dgates) {
    const V f = saved[0], g = saved[1], o = saved[2];
    const V one(1), tanh_c = tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (one - tanh_c * tanh_c);
    dgates[0] = dc * (prev[1] - g) * f * (one - f);
    dgates[1] = dc * (one - f) * (one - g * g);
    dgates[2] = dnext[0] * tanh_c * o * (one - o);
    dnext[1] = dc;
    dprev[0] = V(0);
    dprev[1] = dc * f;
  }
};
