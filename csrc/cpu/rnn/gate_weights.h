// The weights of a direction for the forward pass, packed or unpacked, and the gate GEMM. Weights
// that are packed once for many calls may also be bfloat16 or int8.
#pragma once
#include "../../core/layer_params.h"
#include "../gemm/gemm_int8.h"
#include "../gemm/gemm_unpacked.h"
#include "../runtime/arena.h"
#include "../runtime/plan.h"
#include "given_sums.h"
#include "heads.h"

namespace rnnkern::RNNKERN_ISA {

// The packed layout of the gates.
template <class Cell, class T>
PackedLayout<PackedElem<T>> gate_layout(int64_t units) {
  PackedLayout<PackedElem<T>> panels(units, Cell::kGates);
  panels.gates_share_tail_vector =
      Cell::kGates > 1 && (Products<Cell>::kGiven || Cell::kInputPreact == Cell::kHiddenPreact);
  return panels;
}

template <class Cell, class T>
class PackedGateWeights {
  using S = Acc<T>;
  using F = PackedElem<T>;
  using V = Vec<S>;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kRecurs = Products<Cell>::kRecurs, kGiven = Products<Cell>::kGiven;
  static constexpr bool kHeads = Cell::kRecurrent == Recurrent::heads;

 public:
  // Of `scratch` is what packing needs besides.
  PackedGateWeights(const ForwardParams<T>& p, const Plan& plan, int direction, Arena& arena,
                    [[maybe_unused]] Arena& scratch)
      : weights_(p.weights[direction]),
        panels_(gate_layout<Cell, T>(p.hidden_size)),
        input_k_(kGiven ? 0 : p.input_size / kVnniFactor<T>),
        h_k_(kRecurs ? p.h_size() / kVnniFactor<T> : 0),
        heads_(kHeads ? p.hidden_size : 0, p.heads, panels_.blocks_per_panel * kLanes,
               p.weight_format() == WeightFormat::int8 ? kInt8K : 1),
        hidden_k_(kHeads ? heads_.depth : h_k_),
        format_(p.weight_format()),
        unpacked_(plan.unpacked_weights),
        fused_input_(plan.fused_input) {
    if (direction >= p.directions) return;
    allocate(ih_, input_k_, arena);
    if (kRecurs) allocate(hh_, hidden_k_, arena);
    if constexpr (kHeads) {
      expanded_ = scratch.alloc<T>(Cell::kGates * p.hidden_size * hidden_k_);
      weights_.hh = expanded_;
      w_hh_ = p.weights[direction].hh;
    }
    bias_ = arena.alloc<S>(Cell::kPreacts * panels_.unit_blocks() * kLanes);
    if (Cell::kParams) params_ = arena.alloc<S>(Cell::kParams * panels_.unit_blocks() * kLanes);
    const int64_t split = plan.split_units ? plan.team(p.directions) : 1;
    prefetch_to_l2_ =
        panels_.bytes(hidden_k_ + (fused_input_ ? input_k_ : 0)) > l2_budget_bytes() * split &&
        use_software_prefetch(plan.row_block, p.prepacked) && format_ == WeightFormat::same;
  }

  // Leading dimension of a panel's pre-activations.
  int64_t preacts_ld(int64_t panel) const {
    return Products<Cell>::kCount <= Cell::kGates
               ? panels_.ldb(panel)
               : Cell::kPreacts * panels_.unit_vectors(panel) * kLanes;
  }

  // The sum of both biases for each pre-activation of the panel's units.
  S* bias(int64_t panel) const { return bias_ + panels_.first_unit(panel) * Cell::kPreacts; }
  // The learned values of the panel's units, in the same layout.
  S* params(int64_t panel) const { return params_ + panels_.first_unit(panel) * Cell::kParams; }

  void pack(int64_t begin, int64_t end) {
    const int64_t H = panels_.units;
    for (int64_t panel = begin; panel < end; ++panel) {
      if constexpr (kHeads)
        expand_heads(heads_, w_hh_, Cell::kGates, panels_.first_unit(panel),
                     min(panels_.first_unit(panel + 1), H), expanded_);
      if (!is_unpacked(panel)) {
        if (!kGiven) pack(panel, weights_.ih, input_k_, Cell::input_gate, ih_);
        if (kRecurs) pack(panel, weights_.hh, hidden_k_, Cell::hidden_gate, hh_);
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
      for (int k = 0; k < Cell::kParams; ++k)
        for (int l = 0; l < width; ++l)
          params(panel)[k * width + l] =
              first + l < H ? to_acc(weights_.params[k * H + first + l]) : S(0);
    }
  }

  // preacts = x W_ih for n rows of a panel. `first`: the panel's first rows, which prefetch it;
  // `next` is the panel that comes next, or -1.
  void input_gemm(int64_t panel, int n, StridedRows<const T> x, bool first, int64_t next,
                  StridedRows<S> preacts) const {
    const int nr = panels_.nr(panel);
    const COperand<S> c{nullptr, 0, preacts.data, preacts.stride};
    if (is_unpacked(panel)) {
      const UnpackedOperands<F> ab = unpacked_input(panel, x);
      return gemm_unpacked(n, nr, &ab, 1, c);
    }
    GemmOperands<F> ab = packed_input(panel, x);
    ab.prefetch_b = first;
    if (next >= 0) ab.next_b = input_panel(next);
    gemm_packed(n, nr, &ab, 1, c);
  }

  // preacts = x W_ih + h W_hh for n rows of a panel; x W_ih may be computed already (x_preacts).
  // The epilogue adds the bias last: a sum that begins with a large term rounds more. `first` and
  // `next` as for input_gemm.
  void gate_gemm(int64_t panel, int n, StridedRows<const T> x, StridedRows<const T> h,
                 StridedRows<const S> x_preacts, bool first, int64_t next, S* preacts) const {
    const int nr = panels_.nr(panel), width = panels_.unit_vectors(panel) * kLanes;
    const int64_t ld = preacts_ld(panel);
    const bool is_unpacked = this->is_unpacked(panel);
    GemmOperands<F> packed[] = {packed_input(panel, x), packed_hidden(panel, h)};
    if (prefetch_to_l2_) {
      packed[0].prefetch_b = packed[1].prefetch_b = first;
      packed[0].next_b = packed[1].b;
      if (next >= 0)
        packed[1].next_b = fused_input_ && !kGiven ? input_panel(next) : hidden_panel(next);
    }
    UnpackedOperands<F> unpacked[2];
    if (is_unpacked)
      unpacked[0] = unpacked_input(panel, x), unpacked[1] = unpacked_hidden(panel, h);
    const auto multiply = [&](int first, int count, COperand<S> c) {
      if (is_unpacked)
        gemm_unpacked(n, nr, unpacked + first, count, c);
      else
        gemm_packed(n, nr, packed + first, count, c);
    };
    if constexpr (kGiven) {
      multiply(1, 1, {nullptr, 0, preacts, ld});
    } else if constexpr (Cell::kInputPreact == Cell::kHiddenPreact) {
      if (fused_input_)
        multiply(0, 2, {nullptr, 0, preacts, ld});
      else
        multiply(1, 1, {x_preacts.data, x_preacts.stride, preacts, ld});
    } else {
      S* const input_preacts = preacts + Cell::kInputPreact * width;
      if (fused_input_) multiply(0, 1, {nullptr, 0, input_preacts, ld});
      begin_hidden(panel, n, fused_input_ ? StridedRows<const S>{} : x_preacts, preacts);
      multiply(1, 1, {nullptr, 0, preacts + Cell::kHiddenPreact * width, ld, true});
    }
  }

  // A row of x and one of h as bytes, with a scale each, in lanes: what a step with int8 weights
  // reads. 0 with other weights.
  int64_t quantized_lanes() const {
    if (kGiven && !kRecurs) return 0;
    return format_ == WeightFormat::int8 ? int8_lanes(input_k_) + int8_lanes(h_k_) + 2 : 0;
  }

  // Quantises n rows of x and h, side by side.
  void quantize_rows(int64_t n, StridedRows<const T> x, StridedRows<const T> h, S* rows) const {
    if constexpr (std::is_same_v<T, float>)
      for (int64_t r = 0; r < n; ++r, rows += quantized_lanes()) {
        S* const hidden = rows + int8_lanes(input_k_) + 1;
        rows[int8_lanes(input_k_)] = quantize(x[r], input_k_, reinterpret_cast<int8_t*>(rows));
        hidden[int8_lanes(h_k_)] = quantize(h[r], h_k_, reinterpret_cast<int8_t*>(hidden));
      }
  }

  // gate_gemm() with int8 weights, for n of those rows.
  void gate_gemm_int8(int64_t panel, int n, const S* rows, S* preacts) const {
    if constexpr (std::is_same_v<T, float>) {
      const int nr = panels_.nr(panel), width = panels_.unit_vectors(panel) * kLanes;
      const int64_t ld = preacts_ld(panel), stride = quantized_lanes();
      const auto bytes = [&](const S* row, int64_t k, int64_t first_k = 0) {
        return Int8Rows{reinterpret_cast<const int32_t*>(row) + first_k / kInt8K,
                        row + int8_lanes(k), stride};
      };
      const S* const hidden = rows + int8_lanes(input_k_) + 1;
      if constexpr (!kGiven) {
        gemm_int8(n, nr, bytes(rows, input_k_), int8(ih_), panels_.offset(panel),
                  int8_lanes(input_k_), {nullptr, 0, preacts + Cell::kInputPreact * width, ld});
        if constexpr (Cell::kInputPreact != Cell::kHiddenPreact)
          begin_hidden(panel, n, {}, preacts);
      }
      if constexpr (kRecurs)
        gemm_int8(n, nr, bytes(hidden, h_k_, first_k(panel)), int8(hh_), panels_.offset(panel),
                  int8_lanes(hidden_k_),
                  {nullptr, 0, preacts + Products<Cell>::kHidden * width, ld, !kGiven});
    }
  }

 private:
  // Whether this panel's weights are read unpacked.
  bool is_unpacked(int64_t panel) const { return unpacked_ && panels_.is_full(panel); }

  // The first k of a panel's recurrent product.
  int64_t first_k(int64_t panel) const {
    if constexpr (kHeads) return heads_.begin(panels_.first_unit(panel));
    return 0;
  }

  // One matrix, packed; in int8 with what belongs to its columns.
  struct Packed {
    F* panels;
    S* scales;
    int32_t* sums;
  };

  // Rows of a panel that hold k.
  int64_t depth(int64_t k) const {
    return format_ == WeightFormat::bfloat16 ? (k + 1) / 2
           : format_ == WeightFormat::int8   ? int8_lanes(k)
                                             : k;
  }

  void allocate(Packed& matrix, int64_t k, Arena& arena) const {
    matrix.panels = arena.alloc<F>(panels_.size(depth(k)));
    if (format_ != WeightFormat::int8) return;
    matrix.scales = arena.alloc<S>(panels_.padded_cols());
    matrix.sums = arena.alloc<int32_t>(panels_.padded_cols());
  }

  static Int8Matrix int8(const Packed& matrix) {
    return {reinterpret_cast<int32_t*>(matrix.panels), matrix.scales, matrix.sums};
  }

  template <class GateOf>
  void pack(int64_t panel, const T* weight, int64_t k, GateOf gate_of, const Packed& to) const {
    if constexpr (std::is_same_v<T, float>) {
      if (format_ == WeightFormat::bfloat16)
        return pack_gates_bf16(panels_, panel, weight, k, gate_of, to.panels);
      if (format_ == WeightFormat::int8)
        return pack_gates_int8(panels_, panel, weight, k, gate_of, int8(to));
    }
    pack_gates(panels_, panel, as_packed(weight), k, gate_of, to.panels);
  }

  void gemm_packed(int n, int nr, const GemmOperands<F>* pairs, int count,
                   const COperand<S>& c) const {
    if constexpr (std::is_same_v<T, float>)
      if (format_ == WeightFormat::bfloat16) return gemm_simd<F, true>(n, nr, pairs, count, c);
    gemm(n, nr, pairs, count, c);
  }

  // Pre-activations before the recurrent product, where it does not share the input's: the input's
  // part is there, or is copied from x_preacts; the others begin with zeros.
  void begin_hidden(int64_t panel, int n, StridedRows<const S> x_preacts, S* preacts) const {
    const int columns = int(panels_.ldb(panel)), width = panels_.unit_vectors(panel) * kLanes;
    const int64_t ld = preacts_ld(panel);
    for (int r = 0; r < n; ++r)
      for (int v = 0; v < ld; v += kLanes) {
        const int at = v - Cell::kInputPreact * width;
        if (at < 0 || at >= columns)
          V(S(0)).store(preacts + r * ld + v);
        else if (x_preacts.data)
          V::load(x_preacts[r] + at).store(preacts + r * ld + v);
      }
  }

  const F* input_panel(int64_t panel) const {
    return ih_.panels + panels_.offset(panel) * depth(input_k_);
  }
  const F* hidden_panel(int64_t panel) const {
    return hh_.panels + panels_.offset(panel) * depth(hidden_k_);
  }

  // Operand pairs of a panel: x or h, and its weights, packed or unpacked.
  GemmOperands<F> packed_input(int64_t panel, StridedRows<const T> x) const {
    return packed(x, input_k_, input_panel(panel), panel);
  }
  GemmOperands<F> packed_hidden(int64_t panel, StridedRows<const T> h) const {
    return packed({h.data + first_k(panel), h.stride}, hidden_k_, hidden_panel(panel), panel);
  }
  GemmOperands<F> packed(StridedRows<const T> left, int64_t k, const F* weight,
                         int64_t panel) const {
    const int64_t ldb = panels_.ldb(panel) / (format_ == WeightFormat::bfloat16 ? 2 : 1);
    return {as_packed(left.data), left.stride / kVnniFactor<T>, 1, k, weight, ldb};
  }
  UnpackedOperands<F> unpacked_input(int64_t panel, StridedRows<const T> x) const {
    return unpacked(panel, x, as_packed(weights_.ih), input_k_, Cell::input_gate);
  }
  UnpackedOperands<F> unpacked_hidden(int64_t panel, StridedRows<const T> h) const {
    return unpacked(panel, {h.data + first_k(panel), h.stride}, as_packed(weights_.hh), hidden_k_,
                    Cell::hidden_gate);
  }
  template <class GateOf>
  UnpackedOperands<F> unpacked(int64_t panel, StridedRows<const T> left, const F* weight, int64_t k,
                               GateOf gate_of) const {
    UnpackedOperands<F> ab{as_packed(left.data), left.stride / kVnniFactor<T>, k, {}};
    const int width = panels_.unit_vectors(panel);
    for (int v = 0; v < panels_.nr(panel); ++v) {
      const int64_t unit = panels_.first_unit(panel) + v % width * kLanes;
      ab.b[v] = weight + (gate_of(v / width) * panels_.units + unit) * k;
    }
    return ab;
  }

  Weights<T> weights_;
  const PackedLayout<F> panels_;
  const int64_t input_k_, h_k_;  // of a row of x and of h, in packed elements
  const HeadRange heads_;
  const int64_t hidden_k_;   // of a panel's recurrent product
  const T* w_hh_ = nullptr;  // in heads,
  T* expanded_ = nullptr;    // and as a matrix of panels' k, (gates H, hidden_k_), which hh then is
  const WeightFormat format_;
  const bool unpacked_, fused_input_;
  bool prefetch_to_l2_;  // those of a step exceed the L2
  Packed ih_, hh_;
  S *bias_, *params_ = nullptr;  // packed: one row of all pre-activations, and of all params
};

}  // namespace rnnkern::RNNKERN_ISA
