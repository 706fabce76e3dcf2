// Minimal GRU, minGRU (Feng et al. 2024), whose gates do not see h:
//   z = sigmoid(preact)   g = preact   h' = (1 - z) h + z g
#pragma once
#include "cells/cell.h"

struct MinGRU : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"update", "candidate"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"update", "candidate"};
  static constexpr int kGates = 2, kPreacts = 2, kStates = 1, kSaved = 2;
  static constexpr Recurrent kRecurrent = Recurrent::none;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V z = sigmoid(preact[0]), g = preact[1];
    next[0] = prev[0] + z * (g - prev[0]);
    saved[0] = z, saved[1] = g;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V*, V* dnext, V* dprev,
                                  V* dgates) {
    const V z = saved[0], g = saved[1], one(1), dh = dnext[0];
    dgates[0] = dh * (g - prev[0]) * z * (one - z);
    dgates[1] = dh * z;
    dprev[0] = dh * (one - z);
  }
};
