// The forward pass's projection of a step: h = W_hr m.
#pragma once
#include "../gemm/gemm_unpacked.h"
#include "../runtime/arena.h"
#include "projection.h"

namespace rnnkern::RNNKERN_ISA {

template <class T>
class ForwardProjection {
  static constexpr int kLanes = Vec<T>::kLanes;

 public:
  static constexpr bool kExists = true;
  ForwardProjection(const ForwardParams<T>& p, const Plan& plan, int direction, Arena& packed,
                    Arena& arena)
      : weight_(p.weights[direction].hr),
        k_(p.hidden_size),
        panels_(p.prepacked ? PackedLayout<T>(p.h_size(), 1) : unit_layout(p.h_size(), p, plan)),
        rounded_(p.weight_format() != WeightFormat::same),
        unpacked_(plan.unpacked_weights) {
    if (!p.proj_size || direction >= p.directions) return;
    packed_ = packed.alloc<T>(panels_.size(depth()));
    m_ = arena.alloc<T>(p.sequence.batch * k_);
  }

  // m of one step, from batch row b on.
  StridedRows<T> m(int64_t b) const { return {m_ + b * k_, k_}; }

  void pack(Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) pack_panel(panel);
  }

  // h = W_hr m for batch rows [b0, b1); the team splits its units.
  void run(int64_t b0, int64_t b1, StridedRows<T> h, Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) {
      const int nr = panels_.nr(panel), width = nr * kLanes;
      const int64_t first = panels_.first_unit(panel);
      UnpackedOperands<T> unpacked{nullptr, k_, k_, {}};
      for (int v = 0; v < nr && unpacked_; ++v) unpacked.b[v] = weight_ + (first + v * kLanes) * k_;
      GemmOperands<T> packed{nullptr,
                             k_,
                             1,
                             k_,
                             packed_ + panels_.offset(panel) * depth(),
                             rounded_ ? width / 2 : width};
      for_mc_blocks(b1 - b0, [&](int64_t r, int n) {
        alignas(64) T tile[kMC * kMaxNR * kLanes];
        const COperand<T> out{nullptr, 0, tile, width};
        unpacked.a = packed.a = m(b0 + r).data;
        if (is_unpacked(panel))
          gemm_unpacked(n, nr, &unpacked, 1, out);
        else if (rounded_)
          gemm_simd<T, kFloat>(n, nr, &packed, 1, out);
        else
          gemm(n, nr, &packed, 1, out);
        write_tile(tile, width, n, panels_.units - first, h[r] + first, h.stride, false);
      });
    }
  }

 private:
  static constexpr bool kFloat = std::is_same_v<T, float>;
  int64_t depth() const { return rounded_ ? (k_ + 1) / 2 : k_; }

  void pack_panel(int64_t panel) const {
    if constexpr (kFloat)
      if (rounded_) return pack_gates_bf16(panels_, panel, weight_, k_, the_only_gate, packed_);
    if (!is_unpacked(panel)) pack_gates(panels_, panel, weight_, k_, the_only_gate, packed_);
  }

  // Whether W_hr's panel is read unpacked.
  bool is_unpacked(int64_t panel) const { return unpacked_ && panels_.is_full(panel); }

  const T* weight_;  // (P, H); all else is for this one
  int64_t k_;
  PackedLayout<T> panels_;
  bool rounded_;  // W_hr is bfloat16, two k in a row of a panel: with int8 weights, too
  bool unpacked_;
  T *packed_, *m_;
};

}  // namespace rnnkern::RNNKERN_ISA
