// Simple recurrent unit, SRU (Lei et al. 2018), whose gates see c alone, by a weight v per unit.
// The highway takes W x as a gate of its own, as the authors' code does where x is not as wide as
// h:
//   f = sigmoid(preact + v_f c)   r = sigmoid(preact + v_r c)   g, x = preact
//   c' = f c + (1 - f) g          h' = r c' + (1 - r) x
#pragma once
#include "cells/cell.h"

struct SRU : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"candidate", "forget", "reset", "highway"};
  static constexpr const char* kStateNames[] = {"h", "c"};
  static constexpr const char* kSavedNames[] = {"candidate", "forget", "reset", "highway"};
  static constexpr const char* kParamNames[] = {"forget", "reset"};
  static constexpr int kGates = 4, kPreacts = 4, kStates = 2, kSaved = 4, kParams = 2;
  static constexpr Recurrent kRecurrent = Recurrent::none;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, V* next,
                                 V* saved) {
    const V g = preact[0], x = preact[3], c = prev[1];
    const V f = sigmoid(preact[1] + params[0] * c), r = sigmoid(preact[2] + params[1] * c);
    next[1] = g + f * (c - g);
    next[0] = x + r * (next[1] - x);
    saved[0] = g, saved[1] = f, saved[2] = r, saved[3] = x;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* params, const V* next,
                                  V* dnext, V* dprev, V* dgates, V* dparams) {
    const V g = saved[0], f = saved[1], r = saved[2], x = saved[3], c = prev[1];
    const V one(1), dh = dnext[0], dc = dnext[1] + dh * r;
    dgates[0] = dc * (one - f);
    dgates[1] = dc * (c - g) * f * (one - f);
    dgates[2] = dh * (next[1] - x) * r * (one - r);
    dgates[3] = dh * (one - r);
    dparams[0] = dgates[1] * c;
    dparams[1] = dgates[2] * c;
    dnext[1] = dc;
    dprev[0] = V(0);
    dprev[1] = dc * f + dgates[1] * params[0] + dgates[2] * params[1];
  }
};
