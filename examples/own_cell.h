// A leaky integrator with a learned leak a per unit, the template of docs/guide/own-cell.md:
//   g = tanh(preact)   h' = h + sigmoid(a) (g - h)
#pragma once
#include "cells/cell.h"

struct Leaky : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"candidate"};   // rows of W_ih, in this order
  static constexpr const char* kStateNames[] = {"h"};          // h first
  static constexpr const char* kSavedNames[] = {"candidate"};  // what backward needs
  static constexpr const char* kParamNames[] = {"leak"};       // learned values per unit
  static constexpr int kGates = 1, kPreacts = 1, kStates = 1, kSaved = 1, kParams = 1;

  // V is a vector of units. preact = W_ih x + b_ih + W_hh h + b_hh.
  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, V* next,
                                 V* saved) {
    const V g = tanh(preact[0]);
    next[0] = prev[0] + sigmoid(params[0]) * (g - prev[0]);
    saved[0] = g;
  }

  // From the loss's derivatives by the states after (dnext) to those by the states before (dprev,
  // without the way through W_hh), by the pre-activations and by the learned values.
  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* params, const V*,
                                  V* dnext, V* dprev, V* dgates, V* dparams) {
    const V g = saved[0], leak = sigmoid(params[0]), one(1), dh = dnext[0];
    dgates[0] = dh * leak * (one - g * g);
    dparams[0] = dh * (g - prev[0]) * leak * (one - leak);
    dprev[0] = dh * (one - leak);
  }
};
