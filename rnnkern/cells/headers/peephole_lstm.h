// LSTM with peephole connections (Gers & Schmidhuber 2000), p_i, p_f, p_o a weight per unit:
//   i = sigmoid(preact + p_i c)   f = sigmoid(preact + p_f c)   g = tanh(preact)
//   c' = f c + i g   o = sigmoid(preact + p_o c')   h' = o tanh(c')
#pragma once
#include "cells/cell.h"

struct PeepholeLSTM : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kStateNames[] = {"h", "c"};
  static constexpr const char* kSavedNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kParamNames[] = {"input", "forget", "output"};
  static constexpr int kGates = 4, kPreacts = 4, kStates = 2, kSaved = 4, kParams = 3;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, V* next,
                                 V* saved) {
    const V i = sigmoid(preact[0] + params[0] * prev[1]);
    const V f = sigmoid(preact[1] + params[1] * prev[1]);
    const V g = tanh(preact[2]), c = f * prev[1] + i * g;
    const V o = sigmoid(preact[3] + params[2] * c);
    next[0] = o * tanh(c);
    next[1] = c;
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* params, const V* next,
                                  V* dnext, V* dprev, V* dgates, V* dparams) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one(1), tanh_c = tanh(next[1]);
    dgates[3] = dnext[0] * tanh_c * o * (one - o);
    const V dc = dnext[1] + dnext[0] * o * (one - tanh_c * tanh_c) + dgates[3] * params[2];
    dgates[0] = dc * g * i * (one - i);
    dgates[1] = dc * prev[1] * f * (one - f);
    dgates[2] = dc * i * (one - g * g);
    dparams[0] = dgates[0] * prev[1];
    dparams[1] = dgates[1] * prev[1];
    dparams[2] = dgates[3] * next[1];
    dnext[1] = dc;
    dprev[0] = V(0);
    dprev[1] = dc * f + dgates[0] * params[0] + dgates[1] * params[1];
  }
};
