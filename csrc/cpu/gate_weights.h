// The weights of a direction, as the forward pass multiplies by them: packed, or as they lie.
#pragma once
#include "arena.h"
#include "direct.h"
#include "params.h"
#include "plan.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class GateWeights {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

 public:
  GateWeights(const Forward<T>& p, const Plan& plan, int direction, Arena& arena)
      : weights_(p.weights[direction]),
        panels_(p.hidden_size, Cell::kGates),
        input_size_(p.input_size),
        width_(p.width()),
        direct_(plan.direct),
        fused_input_(plan.fused_input) {
    if (direction >= p.directions) return;
    ih_ = arena.take<T>(panels_.size(input_size_));
    hh_ = arena.take<T>(panels_.size(width_));
    bias_ = arena.take<T>(Cell::kSums * panels_.blocks() * kLanes);
    const int64_t split = plan.by_units ? plan.team(p.directions) : 1;
    far_ = panels_.bytes(width_ + (fused_input_ ? input_size_ : 0)) > kResident * split;
  }

  // The sum of both biases for each sum of the panel's units.
  T* bias(int64_t panel) const { return bias_ + panels_.first_unit(panel) * Cell::kSums; }

  void pack(int64_t begin, int64_t end) {
    const int64_t H = panels_.units;
    for (int64_t panel = begin; panel < end; ++panel) {
      if (!direct(panel)) {
        pack_gates(panels_, panel, weights_.ih, input_size_, Cell::input_gate, ih_);
        pack_gates(panels_, panel, weights_.hh, width_, Cell::hidden_gate, hh_);
      }
      T* const bias = this->bias(panel);
      const int64_t first = panels_.first_unit(panel);
      const int width = panels_.width(panel) * kLanes;
      for (int s = 0; s < Cell::kSums; ++s)
        for (int l = 0; l < width; ++l) {
          const int64_t unit = first + l;
          const int in = s - Cell::kInputSum, hidden = s - Cell::kHiddenSum;
          T sum = 0;
          if (weights_.bias_ih && unit < H && in >= 0 && in < Cell::kGates)
            sum += weights_.bias_ih[Cell::input_gate(in) * H + unit];
          if (weights_.bias_hh && unit < H && hidden >= 0 && hidden < Cell::kGates)
            sum += weights_.bias_hh[Cell::hidden_gate(hidden) * H + unit];
          bias[s * width + l] = sum;
        }
    }
  }

  // sums = x W_ih for n rows of a panel, of several groups of rows the first or another; the panel
  // `next` comes next, or none if -1.
  void multiply_input(int64_t panel, int n, RowsOf<const T> x, bool first, int64_t next,
                      T* sums) const {
    const int vectors = panels_.vectors(panel);
    const Tile<T> tile{kZeroSums<T>, 0, sums, panels_.step(panel)};
    if (direct(panel)) {
      const DirectTerm<T> term = lying_input(panel, x);
      return direct_product(n, vectors, &term, 1, tile);
    }
    Term<T> term = packed_input(panel, x);
    term.fetch = first;
    if (next >= 0) term.after = input_panel(next);
    product(n, vectors, &term, 1, tile);
  }

  // sums = x W_ih + h W_hh for n rows of a panel, x W_ih perhaps from ahead (`projected`). The bias
  // comes last, in the cell: a sum that begins with a large term rounds more. The first rows of a
  // step fetch the panel, all of them the beginning of the next one, or none if -1.
  void add_up(int64_t panel, int n, RowsOf<const T> x, RowsOf<const T> h, RowsOf<const T> projected,
              bool first, int64_t next, T* sums) const {
    const int vectors = panels_.vectors(panel), width = panels_.width(panel) * kLanes;
    const int64_t row = Cell::kSums * width;
    const bool direct = this->direct(panel);
    Term<T> packed[] = {packed_input(panel, x), packed_hidden(panel, h)};
    if (far_) {
      packed[0].fetch = packed[1].fetch = first;
      packed[0].after = packed[1].b;
      if (next >= 0) packed[1].after = fused_input_ ? input_panel(next) : hidden_panel(next);
    }
    DirectTerm<T> lying[2];
    if (direct) lying[0] = lying_input(panel, x), lying[1] = lying_hidden(panel, h);
    const auto add = [&](int first, int count, Tile<T> tile) {
      if (direct)
        direct_product(n, vectors, lying + first, count, tile);
      else
        product(n, vectors, packed + first, count, tile);
    };
    if constexpr (Cell::kInputSum == Cell::kHiddenSum) {
      if (fused_input_)
        add(0, 2, {kZeroSums<T>, 0, sums, row});
      else
        add(1, 1, {projected.data, projected.stride, sums, row});
    } else {
      T* const input_sums = sums + Cell::kInputSum * width;
      T* const hidden_sums = sums + Cell::kHiddenSum * width;
      for (int r = 0; r < n; ++r)
        for (int v = 0; v < row; v += kLanes) V(T(0)).store(sums + r * row + v);
      if (fused_input_)
        add(0, 1, {input_sums, row, input_sums, row});
      else
        for (int r = 0; r < n; ++r)
          for (int v = 0; v < vectors * kLanes; v += kLanes)
            V::load(projected[r] + v).store(input_sums + r * row + v);
      add(1, 1, {hidden_sums, row, hidden_sums, row});
    }
  }

 private:
  // Whether the weights of this panel are read as they lie.
  bool direct(int64_t panel) const { return direct_ && panels_.full(panel); }

  const T* input_panel(int64_t panel) const { return ih_ + panels_.before(panel) * input_size_; }
  const T* hidden_panel(int64_t panel) const { return hh_ + panels_.before(panel) * width_; }

  // What a panel's products are made of: x or h, and its weights, packed or as they lie.
  Term<T> packed_input(int64_t panel, RowsOf<const T> x) const {
    return {x.data, x.stride, 1, input_size_, input_panel(panel), panels_.step(panel)};
  }
  Term<T> packed_hidden(int64_t panel, RowsOf<const T> h) const {
    return {h.data, h.stride, 1, width_, hidden_panel(panel), panels_.step(panel)};
  }
  DirectTerm<T> lying_input(int64_t panel, RowsOf<const T> x) const {
    return lying(panel, x, weights_.ih, input_size_, Cell::input_gate);
  }
  DirectTerm<T> lying_hidden(int64_t panel, RowsOf<const T> h) const {
    return lying(panel, h, weights_.hh, width_, Cell::hidden_gate);
  }
  template <class GateOf>
  DirectTerm<T> lying(int64_t panel, RowsOf<const T> left, const T* weight, int64_t depth,
                      GateOf gate_of) const {
    DirectTerm<T> term{left.data, left.stride, depth, {}};
    const int width = panels_.width(panel);
    for (int v = 0; v < panels_.vectors(panel); ++v) {
      const int64_t unit = panels_.first_unit(panel) + v % width * kLanes;
      term.weight[v] = weight + (gate_of(v / width) * panels_.units + unit) * depth;
    }
    return term;
  }

  const Weights<T> weights_;
  const Panels<T> panels_;
  const int64_t input_size_, width_;
  const bool direct_, fused_input_;
  bool far_;     // whether those of a step are too many for the second-level caches
  T *ih_, *hh_;  // packed
  T* bias_;      // packed: one row of all sums
};

}  // namespace rnnkern::RNNKERN_ISA
