// The cells, and before them the functions that they ask of their value type (csrc/cells/cell.h),
// here one float or double: what is declared later would not be found for these.
//
// sigmoid and tanh are the accurate ones of the CUDA math library (at most 3 ulp in float); the
// hardware's tanh.approx has 11 good bits, too few to train in float.
#pragma once
#include <cmath>

#include "../cells/cell.h"

namespace rnnkern {

RNNKERN_CELL float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
RNNKERN_CELL double sigmoid(double x) { return 1. / (1. + exp(-x)); }
RNNKERN_CELL float tanh(float x) { return ::tanhf(x); }
RNNKERN_CELL double tanh(double x) { return ::tanh(x); }

// NaN stays NaN.
template <class V>
RNNKERN_CELL V relu(V x) {
  return x < V(0) ? V(0) : x;
}

template <class V>
RNNKERN_CELL V where_positive(V x, V y) {
  return x > V(0) ? y : V(0);
}

}  // namespace rnnkern

#include "../cells/cells.h"
