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
  ForwardProjection(const ForwardParams<T>& p, const Plan& plan, int direction, Arena& arena)
      : weight_(p.weights[direction].hr),
        k_(p.hidden_size),
        panels_(unit_layout(p.h_size(), p, plan)),
        unpacked_(plan.unpacked_weights) {
    if (!weight_) return;
    packed_ = arena.alloc<T>(panels_.size(k_));
    m_ = arena.alloc<T>(p.sequence.batch * k_);
  }

  // m of one step, from batch row b on.
  StridedRows<T> m(int64_t b) const { return {m_ + b * k_, k_}; }

  void pack(Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel)
      if (!is_unpacked(panel)) pack_gates(panels_, panel, weight_, k_, the_only_gate, packed_);
  }

  // h = W_hr m for batch rows [b0, b1); the team splits its units.
  void run(int64_t b0, int64_t b1, StridedRows<T> h, Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) {
      const int nr = panels_.nr(panel), width = nr * kLanes;
      const int64_t first = panels_.first_unit(panel);
      UnpackedOperands<T> unpacked{nullptr, k_, k_, {}};
      for (int v = 0; v < nr; ++v) unpacked.b[v] = weight_ + (first + v * kLanes) * k_;
      GemmOperands<T> packed{nullptr, k_, 1, k_, packed_ + panels_.offset(panel) * k_, width};
      for_mc_blocks(b1 - b0, [&](int64_t r, int n) {
        alignas(64) T tile[kMC * kMaxNR * kLanes];
        const COperand<T> out{nullptr, 0, tile, width};
        unpacked.a = packed.a = m(b0 + r).data;
        if (is_unpacked(panel))
          gemm_unpacked(n, nr, &unpacked, 1, out);
        else
          gemm(n, nr, &packed, 1, out);
        write_tile(tile, width, n, panels_.units - first, h[r] + first, h.stride, false);
      });
    }
  }

 private:
  // Whether W_hr's panel is read unpacked.
  bool is_unpacked(int64_t panel) const { return unpacked_ && panels_.is_full(panel); }

  const T* weight_;  // (P, H); all else is for this one
  int64_t k_;
  PackedLayout<T> panels_;
  bool unpacked_;
  T *packed_, *m_;
};

}  // namespace rnnkern::RNNKERN_ISA
