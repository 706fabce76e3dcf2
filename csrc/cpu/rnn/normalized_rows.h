// What the forward pass does besides for a cell that normalises rows, between the gate GEMM of all
// panels and the epilogue, and after that. row_norm.h has the arithmetic.
#pragma once
#include "epilogue.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class NormalizedRows {
  using S = Acc<T>;
  using V = Vec<S>;
  using A = VecArray<S, 1>;
  using Panels = PackedLayout<PackedElem<T>>;
  using StepOperands = RNNKERN_ISA::StepOperands<Cell, T>;
  static constexpr int kLanes = V::kLanes;

 public:
  // Elements of the buffer for so many rows of a step: the sums of a block of rows, and the scales.
  static int64_t size(int64_t rows, const Panels& panels) {
    return RowNorm<Cell>::kAny ? pad(rows) + kMC * panels.padded_cols() : 0;
  }

  // Tells the step where the scales are.
  NormalizedRows(const PackedGateWeights<Cell, T>& weights, const Panels& panels, S* buffer,
                 int64_t rows, StepOperands& step)
      : weights_(weights),
        panels_(panels),
        scales_(buffer),
        sums_(buffer + pad(rows)) {
    if constexpr (RowNorm<Cell>::kSums) step.scales = scales_;
  }

  // The pre-activations of a panel, of n rows.
  S* sums(int64_t panel, int n) const { return sums_ + panels_.offset(panel) * n; }

  // Standardises the sums of n rows, from row r of the step on.
  void standardize(int64_t r, int n) const {
    if constexpr (RowNorm<Cell>::kSums)
      for (int i = 0; i < n; ++i) {
        const auto each = [&](auto&& f) __attribute__((always_inline)) {
          for (int64_t panel = 0; panel < panels_.count(); ++panel) {
            S* const row = sums(panel, n) + i * panels_.ldb(panel);
            const int64_t left = panels_.units - panels_.first_unit(panel);
            for (int s = 0; s < Cell::kGates; ++s)
              for_unit_vectors<S>(min<int64_t>(left, panels_.unit_vectors(panel) * kLanes),
                                  [&](int64_t u, int lanes) __attribute__((always_inline)) {
                                    f(row + s * panels_.gate_stride(panel) + u, lanes);
                                  });
          }
        };
        const Moments<S> moments =
            moments_of<S>(Cell::kGates * panels_.units, Cell::kNormEpsilon, each);
        each([&](S* p, int lanes) __attribute__((always_inline)) {
          moments.standardized(V::load(p, lanes)).store(p, lanes);
        });
        scales_[r + i] = moments.scale;
      }
  }

  // h of n rows, from their standardised states.
  void output(const StepOperands& step, int64_t r, int n) const {
    if constexpr (RowNorm<Cell>::kState)
      for (int64_t row = r; row < r + n; ++row) {
        const auto state = [&](int64_t u) {
          return step.c_next.of(u)[row] + RowNorm<Cell>::kCValue * step.c_next.value_stride(u);
        };
        const Moments<S> moments = moments_of<S>(panels_.units, Cell::kNormEpsilon, [&](auto&& f) {
          for_unit_vectors<S>(panels_.units, [&](int64_t u, int lanes) { f(state(u), lanes); });
        });
        for_unit_vectors<S>(panels_.units, [&](int64_t u, int lanes) {
          A params[Cell::kParams + 1], held, norm;
          for (int k = 0; k < Cell::kParams; ++k) params[k].v[0] = V::load(param(k, u));
          held.v[0] = V::load(step.h_next[row] + u, lanes);
          norm.v[0] = moments.standardized(V::load(state(u), lanes));
          Cell::output(held, norm, params).v[0].store(step.h_next[row] + u, lanes);
        });
      }
  }

 private:
  static int64_t pad(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

  // Of a vector of units.
  const S* param(int k, int64_t unit) const {
    const int64_t panel = unit / (panels_.blocks_per_panel * kLanes);
    return weights_.params(panel) + k * panels_.unit_vectors(panel) * kLanes + unit -
           panels_.first_unit(panel);
  }

  const PackedGateWeights<Cell, T>& weights_;
  const Panels& panels_;
  S *const scales_, *const sums_;
};

}  // namespace rnnkern::RNNKERN_ISA
