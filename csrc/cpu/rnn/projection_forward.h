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
        depth_(p.hidden_size),
        panels_(unit_layout(p.h_size(), p, plan)),
        unpacked_(plan.unpacked_weights) {
    if (!weight_) return;
    packed_ = arena.alloc<T>(panels_.size(depth_));
    m_ = arena.alloc<T>(p.sequence.batch * depth_);
  }

  // m of one step, of batch row b and those after it.
  StridedRows<T> m(int64_t b) const { return {m_ + b * depth_, depth_}; }

  void pack(Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel)
      if (!is_unpacked(panel)) pack_gates(panels_, panel, weight_, depth_, the_only_gate, packed_);
  }

  // h = W_hr m for batch rows [b0, b1), its units split over the team.
  void run(int64_t b0, int64_t b1, StridedRows<T> h, Team team) const {
    const int64_t count = panels_.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel) {
      const int vectors = panels_.nr(panel), width = vectors * kLanes;
      const int64_t first = panels_.first_unit(panel);
      UnpackedOperands<T> rows{nullptr, depth_, depth_, {}};
      for (int v = 0; v < vectors; ++v) rows.b[v] = weight_ + (first + v * kLanes) * depth_;
      GemmOperands<T> packed{nullptr, depth_, 1, depth_, packed_ + panels_.offset(panel) * depth_,
                             width};
      for_mc_blocks(b1 - b0, [&](int64_t r, int n) {
        alignas(64) T tile[kMC * kMaxNR * kLanes];
        const COperand<T> out{nullptr, 0, tile, width};
        rows.a = packed.a = m(b0 + r).data;
        if (is_unpacked(panel))
          gemm_unpacked(n, vectors, &rows, 1, out);
        else
          gemm(n, vectors, &packed, 1, out);
        write_tile(tile, width, n, panels_.units - first, h[r] + first, h.stride, false);
      });
    }
  }

 private:
  // Whether W_hr is read as it lies.
  bool is_unpacked(int64_t panel) const { return unpacked_ && panels_.is_full(panel); }

  const T* weight_;  // (P, H); all else is for this one
  int64_t depth_;
  PackedLayout<T> panels_;
  bool unpacked_;
  T *packed_, *m_;
};

}  // namespace rnnkern::RNNKERN_ISA
