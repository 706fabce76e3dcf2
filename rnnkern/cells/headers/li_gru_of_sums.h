// Light GRU (Ravanelli et al. 2018) of sums that are given, which the authors normalise over the
// batch, with dropout on the candidate:
//   z = sigmoid(preact)   a = mask relu(preact)   h' = z h + (1 - z) a
#pragma once
#include "cells/cell.h"

struct LiGRUOfSums : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"candidate", "update"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kSavedNames[] = {"candidate", "update"};
  static constexpr const char* kMaskNames[] = {"dropout"};
  static constexpr int kGates = 2, kPreacts = 2, kStates = 1, kSaved = 2, kMasks = 1;
  static constexpr Input kInput = Input::given;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* masks, V* next,
                                 V* saved) {
    const V a = masks[0] * relu(preact[0]), z = sigmoid(preact[1]);
    next[0] = a + z * (prev[0] - a);
    saved[0] = a, saved[1] = z;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* masks, const V*, V* dnext,
                                  V* dprev, V* dgates) {
    const V a = saved[0], z = saved[1], one(1), dh = dnext[0];
    dgates[0] = where_positive(a, masks[0] * dh * (one - z));
    dgates[1] = dh * (prev[0] - a) * z * (one - z);
    dprev[0] = dh * z;
  }
};
