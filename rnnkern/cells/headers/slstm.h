// sLSTM of xLSTM (Beck et al. 2024): exponential gates, a normaliser n, and the stabiliser m, which
// keeps exp in range and leaves h as it would be without. Heads of units see their own h alone.
//   l = log_sigmoid(preact_f) + m   m' = max(preact_i, l)   i = exp(preact_i - m')
//   f = exp(l - m')   z = tanh(preact)   o = sigmoid(preact)
//   c' = f c + i z   n' = f n + i   h' = o c' / n'
#pragma once
#include "cells/cell.h"

struct SLSTM : rnnkern::CellDefaults {
  static constexpr const char* kGateNames[] = {"input", "forget", "cell", "output"};
  static constexpr const char* kStateNames[] = {"h", "c", "n", "m"};
  // lead: preact_i - l; decay: sigmoid(preact_f).
  static constexpr const char* kSavedNames[] = {"input",  "forget", "cell",
                                                "output", "lead",   "decay"};
  static constexpr int kGates = 4, kPreacts = 4, kStates = 4, kSaved = 6;
  static constexpr Recurrent kRecurrent = Recurrent::heads;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, V* next, V* saved) {
    const V l = log_sigmoid(preact[1]) + prev[3], m = max(preact[0], l);
    const V i = exp(preact[0] - m), f = exp(l - m), z = tanh(preact[2]), o = sigmoid(preact[3]);
    next[1] = f * prev[1] + i * z;
    next[2] = f * prev[2] + i;
    next[3] = m;
    next[0] = o * next[1] / next[2];
    saved[0] = i, saved[1] = f, saved[2] = z, saved[3] = o;
    saved[4] = preact[0] - l, saved[5] = sigmoid(preact[1]);
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* next, V* dnext, V* dprev,
                                  V* dgates) {
    const V i = saved[0], f = saved[1], z = saved[2], o = saved[3], lead = saved[4];
    const V one(1), ratio = next[1] / next[2], d_ratio = dnext[0] * o / next[2];
    const V dc = dnext[1] + d_ratio, dn = dnext[2] - d_ratio * ratio;
    const V di = (dc * z + dn) * i, df = (dc * prev[1] + dn * prev[2]) * f;
    const V dm = dnext[3] - di - df, dm_by_i = where_positive(lead, dm);
    const V dl = df + dm - dm_by_i;
    dgates[0] = di + dm_by_i;
    dgates[1] = dl * (one - saved[5]);
    dgates[2] = dc * i * (one - z * z);
    dgates[3] = dnext[0] * ratio * o * (one - o);
    dnext[1] = dc, dnext[2] = dn, dnext[3] = dm;
    dprev[0] = V(0);
    dprev[1] = dc * f, dprev[2] = dn * f, dprev[3] = dl;
  }
};
