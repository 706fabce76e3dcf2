// Resets in the forward pass: a step reads the states before it from a copy, in which those of rows
// that are reset are replaced.
#pragma once
#include "epilogue.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
class ForwardResets {
  using S = Acc<T>;
  using StepOperands = RNNKERN_ISA::StepOperands<Cell, T>;
  static constexpr int kLanes = Vec<S>::kLanes;
  static constexpr int kCValues = Cell::kStates - 1;  // states besides h
  static constexpr bool kHasC = kCValues > 0, kKeepsFp32H = Epilogue<Cell, T>::kKeepsFp32H;

 public:
  // Elements of the buffer for each row of a step.
  static int64_t width(const ForwardParams<T>& p) {
    return p.resets.data ? p.h_size() + max(kCValues, 1) * p.hidden_size : 0;
  }

  ForwardResets(const ForwardParams<T>& p, const S* zeros, S* buffer,
                const PackedLayout<PackedElem<T>>& panels)
      : p_(p),
        zeros_(zeros),
        buffer_(buffer),
        panels_(panels) {}

  // With the states of rows that are reset before step t replaced, in a copy of them all.
  __attribute__((noinline)) StepOperands operator()(StepOperands step, int64_t t,
                                                    const WorkRange& range, int64_t r0,
                                                    int64_t r1) const {
    const int64_t H = p_.hidden_size, R = p_.h_size();
    const int64_t u0 = panels_.first_unit(range.p0), u1 = min(panels_.first_unit(range.p1), H);
    const StridedRows<const uint8_t> resets{p_.resets.at(p_.sequence, t) + r0 * p_.resets.b_stride,
                                            p_.resets.b_stride};
    bool any = false;
    for (int64_t r = 0; r < r1 - r0; ++r) any |= *resets[r] != 0;
    if (!any) return step;
    const StridedRows<T> h{reinterpret_cast<T*>(buffer_), R};
    const StridedRows<S> c{buffer_ + (r1 - r0) * R, kCValues * H};
    const int64_t fresh_stride = p_.reset_c.data ? H : 0;  // zeros are as one value
    const auto fresh = [&](const auto& given, int64_t r, auto* zeros) {
      return given.data ? given.at(p_.sequence, t) + (r0 + r) * given.b_stride : zeros;
    };
    for (int64_t r = 0; r < r1 - r0; ++r) {
      const bool is_reset = *resets[r];
      const T* const zeros = reinterpret_cast<const T*>(zeros_);
      std::memcpy(h[r], is_reset ? fresh(p_.reset_h, r, zeros) : step.h_prev[r], R * sizeof(T));
      if constexpr (kKeepsFp32H)
        for (int64_t u = u0; u < u1 && is_reset; ++u) step.h_fp32_next[r][u] = to_acc(h[r][u]);
      if constexpr (kHasC) {
        const S* const fresh_c = fresh(p_.reset_c, r, const_cast<const S*>(zeros_));
        for (int64_t u = u0; u < u1; u += kLanes)
          for (int k = 0; k < kCValues; ++k) {
            const S* const kept = step.c_prev.of(u)[r] + k * step.c_prev.value_stride(u);
            std::memcpy(c[r] + k * H + u, is_reset ? fresh_c + k * fresh_stride + u : kept,
                        min<int64_t>(u1 - u, kLanes) * sizeof(S));
          }
      }
    }
    step.h_prev = {h.data, h.stride};
    if (kHasC) step.c_prev = {{}, {c.data, c.stride}, H};
    return step;
  }

 private:
  const ForwardParams<T>& p_;
  const S* const zeros_;
  S* const buffer_;
  const PackedLayout<PackedElem<T>>& panels_;
};

}  // namespace rnnkern::RNNKERN_ISA
