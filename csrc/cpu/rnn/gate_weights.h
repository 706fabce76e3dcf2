// The weights of a direction, as the forward pass multiplies by them: packed, or as they lie.
#pragma once
#include "../../core/layer_params.h"
#include "../gemm/gemm_unpacked.h"
#include "../runtime/arena.h"
#include "../runtime/plan.h"

namespace rnnkern::RNNKERN_ISA {

// How the gates' sums of a step fall into panels.
template <class Cell, class T>
PackedLayout<PackedElem<T>> gate_layout(int64_t units) {
  PackedLayout<PackedElem<T>> panels(units, Cell::kGates);
  panels.gates_share_tail_vector = Cell::kGates > 1 && Cell::kInputPreact == Cell::kHiddenPreact;
  return panels;
}

template <class Cell, class T>
class PackedGateWeights {
  using S = Acc<T>;
  using F = PackedElem<T>;
  using V = Vec<S>;
  static constexpr int kLanes = V::kLanes;

 public:
  PackedGateWeights(const ForwardParams<T>& p, const Plan& plan, int direction, Arena& arena)
      : weights_(p.weights[direction]),
        panels_(gate_layout<Cell, T>(p.hidden_size)),
        input_depth_(p.input_size / kVnniFactor<T>),
        hidden_depth_(p.h_size() / kVnniFactor<T>),
        unpacked_(plan.unpacked_weights),
        fused_input_(plan.fused_input) {
    if (direction >= p.directions) return;
    ih_ = arena.alloc<F>(panels_.size(input_depth_));
    hh_ = arena.alloc<F>(panels_.size(hidden_depth_));
    bias_ = arena.alloc<S>(Cell::kPreacts * panels_.unit_blocks() * kLanes);
    const int64_t split = plan.split_units ? plan.team(p.directions) : 1;
    prefetch_to_l2_ = panels_.bytes(hidden_depth_ + (fused_input_ ? input_depth_ : 0)) >
                          l2_budget_bytes() * split &&
                      use_software_prefetch(plan.row_block);
  }

  // From one row of a panel's sums to the next.
  int64_t preacts_ld(int64_t panel) const {
    return Cell::kPreacts == Cell::kGates ? panels_.ldb(panel)
                                          : Cell::kPreacts * panels_.unit_vectors(panel) * kLanes;
  }

  // The sum of both biases for each sum of the panel's units.
  S* bias(int64_t panel) const { return bias_ + panels_.first_unit(panel) * Cell::kPreacts; }

  void pack(int64_t begin, int64_t end) {
    const int64_t H = panels_.units;
    for (int64_t panel = begin; panel < end; ++panel) {
      if (!is_unpacked(panel)) {
        pack_gates(panels_, panel, as_packed(weights_.ih), input_depth_, Cell::input_gate, ih_);
        pack_gates(panels_, panel, as_packed(weights_.hh), hidden_depth_, Cell::hidden_gate, hh_);
      }
      S* const bias = this->bias(panel);
      const int64_t first = panels_.first_unit(panel);
      const int width = panels_.unit_vectors(panel) * kLanes;
      for (int s = 0; s < Cell::kPreacts; ++s)
        for (int l = 0; l < width; ++l) {
          const int64_t unit = first + l;
          const int in = s - Cell::kInputPreact, hidden = s - Cell::kHiddenPreact;
          S sum = 0;
          if (weights_.bias_ih && unit < H && in >= 0 && in < Cell::kGates)
            sum += to_acc(weights_.bias_ih[Cell::input_gate(in) * H + unit]);
          if (weights_.bias_hh && unit < H && hidden >= 0 && hidden < Cell::kGates)
            sum += to_acc(weights_.bias_hh[Cell::hidden_gate(hidden) * H + unit]);
          bias[s * width + l] = sum;
        }
    }
  }

  // sums = x W_ih for n rows of a panel, of several groups of rows the first or another; the panel
  // `next` comes next, or none if -1.
  void input_gemm(int64_t panel, int n, StridedRows<const T> x, bool first, int64_t next,
                  StridedRows<S> sums) const {
    const int vectors = panels_.nr(panel);
    const COperand<S> tile{nullptr, 0, sums.data, sums.stride};
    if (is_unpacked(panel)) {
      const UnpackedOperands<F> term = unpacked_input(panel, x);
      return gemm_unpacked(n, vectors, &term, 1, tile);
    }
    GemmOperands<F> term = packed_input(panel, x);
    term.prefetch_b = first;
    if (next >= 0) term.next_b = input_panel(next);
    gemm(n, vectors, &term, 1, tile);
  }

  // sums = x W_ih + h W_hh for n rows of a panel, x W_ih perhaps from ahead (`projected`). The bias
  // comes last, in the cell: a sum that begins with a large term rounds more. The first rows of a
  // step fetch the panel, all of them the beginning of the next one, or none if -1.
  void gate_gemm(int64_t panel, int n, StridedRows<const T> x, StridedRows<const T> h,
                 StridedRows<const S> projected, bool first, int64_t next, S* sums) const {
    const int vectors = panels_.nr(panel), width = panels_.unit_vectors(panel) * kLanes;
    const int64_t row = preacts_ld(panel);
    const bool is_unpacked = this->is_unpacked(panel);
    GemmOperands<F> packed[] = {packed_input(panel, x), packed_hidden(panel, h)};
    if (prefetch_to_l2_) {
      packed[0].prefetch_b = packed[1].prefetch_b = first;
      packed[0].next_b = packed[1].b;
      if (next >= 0) packed[1].next_b = fused_input_ ? input_panel(next) : hidden_panel(next);
    }
    UnpackedOperands<F> unpacked[2];
    if (is_unpacked)
      unpacked[0] = unpacked_input(panel, x), unpacked[1] = unpacked_hidden(panel, h);
    const auto add = [&](int first, int count, COperand<S> tile) {
      if (is_unpacked)
        gemm_unpacked(n, vectors, unpacked + first, count, tile);
      else
        gemm(n, vectors, packed + first, count, tile);
    };
    if constexpr (Cell::kInputPreact == Cell::kHiddenPreact) {
      if (fused_input_)
        add(0, 2, {nullptr, 0, sums, row});
      else
        add(1, 1, {projected.data, projected.stride, sums, row});
    } else {
      // The input's part fills its sums, the others begin with zeros.
      S* const input_sums = sums + Cell::kInputPreact * width;
      S* const hidden_sums = sums + Cell::kHiddenPreact * width;
      if (fused_input_) add(0, 1, {nullptr, 0, input_sums, row});
      for (int r = 0; r < n; ++r)
        for (int v = 0; v < row; v += kLanes) {
          const int at = v - Cell::kInputPreact * width;
          if (at < 0 || at >= vectors * kLanes)
            V(S(0)).store(sums + r * row + v);
          else if (!fused_input_)
            V::load(projected[r] + at).store(input_sums + r * row + at);
        }
      add(1, 1, {nullptr, 0, hidden_sums, row, true});
    }
  }

 private:
  // Whether the weights of this panel are read as they lie.
  bool is_unpacked(int64_t panel) const { return unpacked_ && panels_.is_full(panel); }

  const F* input_panel(int64_t panel) const { return ih_ + panels_.offset(panel) * input_depth_; }
  const F* hidden_panel(int64_t panel) const { return hh_ + panels_.offset(panel) * hidden_depth_; }

  // What a panel's products are made of: x or h, and its weights, packed or as they lie.
  GemmOperands<F> packed_input(int64_t panel, StridedRows<const T> x) const {
    return packed(x, input_depth_, input_panel(panel), panel);
  }
  GemmOperands<F> packed_hidden(int64_t panel, StridedRows<const T> h) const {
    return packed(h, hidden_depth_, hidden_panel(panel), panel);
  }
  GemmOperands<F> packed(StridedRows<const T> left, int64_t depth, const F* weight,
                         int64_t panel) const {
    return {as_packed(left.data), left.stride / kVnniFactor<T>, 1, depth, weight,
            panels_.ldb(panel)};
  }
  UnpackedOperands<F> unpacked_input(int64_t panel, StridedRows<const T> x) const {
    return unpacked(panel, x, as_packed(weights_.ih), input_depth_, Cell::input_gate);
  }
  UnpackedOperands<F> unpacked_hidden(int64_t panel, StridedRows<const T> h) const {
    return unpacked(panel, h, as_packed(weights_.hh), hidden_depth_, Cell::hidden_gate);
  }
  template <class GateOf>
  UnpackedOperands<F> unpacked(int64_t panel, StridedRows<const T> left, const F* weight,
                               int64_t depth, GateOf gate_of) const {
    UnpackedOperands<F> term{as_packed(left.data), left.stride / kVnniFactor<T>, depth, {}};
    const int width = panels_.unit_vectors(panel);
    for (int v = 0; v < panels_.nr(panel); ++v) {
      const int64_t unit = panels_.first_unit(panel) + v % width * kLanes;
      term.b[v] = weight + (gate_of(v / width) * panels_.units + unit) * depth;
    }
    return term;
  }

  const Weights<T> weights_;
  const PackedLayout<F> panels_;
  const int64_t input_depth_, hidden_depth_;  // in factors
  const bool unpacked_, fused_input_;
  bool prefetch_to_l2_;  // whether those of a step are fetched into the second-level caches
  F *ih_, *hh_;          // packed
  S* bias_;              // packed: one row of all sums
};

}  // namespace rnnkern::RNNKERN_ISA
