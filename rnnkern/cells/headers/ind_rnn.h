// Independently recurrent network, IndRNN (Li et al. 2018), u a learned weight per unit:
//   h' = relu(preact + u h)
#pragma once
#include "cells/cell.h"

struct IndRNN : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"hidden"};
  static constexpr const char* kStateNames[] = {"h"};
  static constexpr const char* kParamNames[] = {"recurrent"};
  static constexpr int kGates = 1, kPreacts = 1, kStates = 1, kSaved = 0, kParams = 1;
  static constexpr Recurrent kRecurrent = Recurrent::none;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, V* next, V*) {
    next[0] = relu(preact[0] + params[0] * prev[0]);
  }

  template <class V>
  RNNKERN_HD static void backward(const V*, const V* prev, const V* params, const V* next, V* dnext,
                                  V* dprev, V* dgates, V* dparams) {
    dgates[0] = where_positive(next[0], dnext[0]);
    dparams[0] = dgates[0] * prev[0];
    dprev[0] = dgates[0] * params[0];
  }
};
