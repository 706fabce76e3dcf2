// Light GRU (Ravanelli et al. 2018), without its batch normalisation of W_ih x:
//   z = sigmoid(preact)   a = relu(preact)   h' = z h + (1 - z) a
#pragma once
#include "cells/cell.h"

struct LiGRU : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"candidate", "update"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"candidate", "update"};
  static constexpr int kGates = 2, kPreacts = 2, kStates = 1, kSaved = 2;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V a = relu(preact[0]), z = sigmoid(preact[1]);
    next[0] = a + z * (prev[0] - a);
    saved[0] = a, saved[1] = z;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V*, V* dnext, V* dprev,
                                  V* dgates) {
    const V a = saved[0], z = saved[1], one(1), dh = dnext[0];
    dgates[0] = where_positive(a, dh * (one - z));
    dgates[1] = dh * (prev[0] - a) * z * (one - z);
    dprev[0] = dh * z;
  }
};
