// Minimal LSTM, minLSTM (Feng et al. 2024), whose gates do not see h and add up to 1:
//   f, i = sigmoid(preact)   g = preact   s = f / (f + i)   h' = s h + (1 - s) g
#pragma once
#include "cells/cell.h"

struct MinLSTM : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"forget", "input", "candidate"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"forget", "input", "candidate", "share"};
  static constexpr int kGates = 3, kPreacts = 3, kStates = 1, kSaved = 4;
  static constexpr Recurrent kRecurrent = Recurrent::none;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V f = sigmoid(preact[0]), i = sigmoid(preact[1]), g = preact[2], s = f / (f + i);
    next[0] = g + s * (prev[0] - g);
    saved[0] = f, saved[1] = i, saved[2] = g, saved[3] = s;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V*, V* dnext, V* dprev,
                                  V* dgates) {
    const V f = saved[0], i = saved[1], g = saved[2], s = saved[3], one(1), dh = dnext[0];
    const V by_ratio = dh * (prev[0] - g) * s * (one - s);  // the derivative by log(f / i)
    dgates[0] = by_ratio * (one - f);
    dgates[1] = by_ratio * (i - one);
    dgates[2] = dh * (one - s);
    dprev[0] = dh * s;
  }
};
