// Layer normalisation inside a step, for cells that ask for it: of a row's W_hh h over all gates
// and units, and of a state over the units. A row's moments need all of its units, so a worker
// computes whole rows:
//
//   forward    gate_gemm of all panels | standardise | cell of all panels | standardise c | output
//   backward   adjoint of output and of c's | the cell's | that of W_hh h's
//
// A standardised value is (v - mean) * scale, scale = 1 / sqrt(variance + epsilon), as in
// torch.nn.LayerNorm; gains and biases are the cell's.
#pragma once
#include <cmath>

#include "../../core/saved_layout.h"
#include "../gemm/packed_layout.h"
#include "given_sums.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell>
struct RowNorm {
  static constexpr bool kSums = Cell::kNormalizesHidden;
  static constexpr bool kState = Cell::kNormalizedState > 0;
  static constexpr bool kAny = kSums || kState;
  static constexpr int kCValue = Cell::kNormalizedState - 1;  // the state among those besides h
  // What the engine saves: the standardised sums, and their scale for each unit.
  static constexpr int kSavedScale = Cell::kSaved - 1, kSavedSums = kSavedScale - Cell::kGates;
};

template <class S>
RNNKERN_INLINE S sum_of_lanes(Vec<S> v) {
  alignas(64) S lanes[Vec<S>::kLanes];
  v.store(lanes);
  S sum = 0;
  for (const S lane : lanes) sum += lane;
  return sum;
}

template <class S>
struct Moments {
  S mean, scale;

  RNNKERN_INLINE Vec<S> standardized(Vec<S> v) const { return (v - Vec<S>(mean)) * Vec<S>(scale); }
};

// Of `count` values. each(f) calls f(address, lanes) for vectors of them.
template <class S, class Each>
RNNKERN_INLINE Moments<S> moments_of(int64_t count, double epsilon, Each&& each) {
  using V = Vec<S>;
  V sum(S(0)), squares(S(0));
  each([&](const S* p, int lanes)
           __attribute__((always_inline)) { sum = sum + V::load(p, lanes); });
  const S mean = sum_of_lanes(sum) / S(count);
  each([&](const S* p, int lanes) __attribute__((always_inline)) {
    V d = V::load(p, lanes) - V(mean);
    if (lanes < V::kLanes) {  // whose other lanes are no values
      alignas(64) S values[V::kLanes];
      d.store(values);
      d = V::load(values, lanes);
    }
    squares = squares + d * d;
  });
  return {mean, S(1) / std::sqrt(sum_of_lanes(squares) / S(count) + S(epsilon))};
}

// The adjoint, in place: from the gradients of `count` standardised values to those of the values.
// each(f) calls f(standardised, gradients, lanes) for vectors of them.
template <class S, class Each>
RNNKERN_INLINE void standardize_backward(int64_t count, S scale, Each&& each) {
  using V = Vec<S>;
  V sum(S(0)), products(S(0));
  each([&](const S* z, S* dz, int lanes) __attribute__((always_inline)) {
    const V d = V::load(dz, lanes);
    sum = sum + d, products = products + d * V::load(z, lanes);
  });
  const V mean(sum_of_lanes(sum) / S(count)), along(sum_of_lanes(products) / S(count));
  each([&](const S* z, S* dz, int lanes) __attribute__((always_inline)) {
    const V d = V::load(dz, lanes) - mean - V::load(z, lanes) * along;
    (V(scale) * d).store(dz, lanes);
  });
}

// f(unit, lanes) for the vectors of a row's units, of which the last may be narrower.
template <class S, class F>
RNNKERN_INLINE void for_unit_vectors(int64_t units, F&& f) {
  constexpr int kLanes = Vec<S>::kLanes;
  int64_t u = 0;
  for (; u + kLanes <= units; u += kLanes) f(u, kLanes);
  if (u < units) f(u, int(units - u));
}

// A part of a step's operands: the scales of its rows' sums. Nothing for a cell without.
template <class Cell, class S, bool kSums = RowNorm<Cell>::kSums>
struct StepScales {
  S* scales = nullptr;

  template <int kCount>
  RNNKERN_INLINE void save_sums(VecArray<S, kCount>* saved, const VecArray<S, kCount>* preact,
                                int i, int64_t r) const {
    for (int s = 0; s < Cell::kGates; ++s)
      saved[RowNorm<Cell>::kSavedSums + s].v[i] = preact[Cell::kHiddenPreact + s].v[i];
    saved[RowNorm<Cell>::kSavedScale].v[i] = Vec<S>(scales[r]);
  }
};
template <class Cell, class S>
struct StepScales<Cell, S, false> {
  template <int kCount>
  RNNKERN_INLINE void save_sums(VecArray<S, kCount>*, const VecArray<S, kCount>*, int,
                                int64_t) const {}
};

// Likewise backward: a row's standardised state, and what the gradient of the state gets from it.
template <class Cell, class S, bool kState = RowNorm<Cell>::kState>
struct StepNormGrads {
  S *normalized = nullptr, *dstate = nullptr;  // (hidden)

  template <int kCount>
  RNNKERN_INLINE void load_normalized(VecArray<S, kCount>* next, VecArray<S, kCount>* dnext, int i,
                                      int64_t unit, int lanes) const {
    using V = Vec<S>;
    constexpr int k = Cell::kNormalizedState;
    next[k].v[i] = V::load(normalized + unit, lanes);
    dnext[k].v[i] = dnext[k].v[i] + V::load(dstate + unit, lanes);
  }
};
template <class Cell, class S>
struct StepNormGrads<Cell, S, false> {
  template <int kCount>
  RNNKERN_INLINE void load_normalized(VecArray<S, kCount>*, VecArray<S, kCount>*, int, int64_t,
                                      int) const {}
};

}  // namespace rnnkern::RNNKERN_ISA
