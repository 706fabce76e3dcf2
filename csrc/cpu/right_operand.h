// The right operand of the backward pass's products: a weight matrix, whose rows are multiplied by
// the gradients of the sums they made.
#pragma once
#include "pack.h"
#include "plan.h"
#include "team.h"

namespace rnnkern::RNNKERN_ISA {

// `gates` blocks of `units` rows. Packed, or as it lies if the call is too short to repay packing;
// its rows must then fill whole vectors. Another matrix may stand beside it, from the next whole
// vector on: two narrow ones make wider tiles together.
template <class T>
struct RightOperand {
  using S = Acc<T>;
  using F = PackedElem<T>;

  Panels<F> panels;  // of all columns
  const T* weight;
  F* packed;
  int64_t units;
  int gates;
  int (*gate_of)(int s);  // the weight's block for the s-th block of the left operand
  bool direct;
  int64_t columns = panels.units;  // of the weight matrix
  const T* beside = nullptr;

  int64_t depth() const { return gates * units / kVnniFactor<T>; }  // in factors
  // The panels' column with which the matrix beside it begins.
  int64_t width() const { return Panels<F>(columns, 1).row(); }
  bool lying() const {
    return kVnniFactor<T> == 1 && direct && !beside && panels.units % Vec<F>::kLanes == 0;
  }

  void put_beside(const T* other, int64_t other_columns) {
    beside = other;
    panels = {width() + other_columns, 1};
  }

  // Row k of a packed panel is one unit of one gate, or two such as pairs. Rows are read from end
  // to end, as the processor fetches ahead.
  void pack(Team team) const {
    constexpr int64_t kLanes = Vec<F>::kLanes;
    const int64_t split = width(), other = panels.units - split;
    const int64_t rows = lying() ? 0 : depth(), count = panels.count();
    const bool past_caches = panels.bytes(rows) >= kPastCaches;
    for (int64_t k = team.begin(rows); k < team.end(rows); ++k) {
      const int64_t unit = k * kVnniFactor<T>;
      const int64_t row = gate_of(int(unit / units)) * units + unit % units;
      for (int64_t panel = 0; panel < count; ++panel) {
        F* out = packed + panels.before(panel) * rows + k * panels.step(panel);
        for (int w = 0; w < panels.width(panel); ++w, out += kLanes) {
          const int64_t c = panels.first_unit(panel) + w * kLanes;
          const int64_t ld = c < split ? columns : other;
          const T* const from = c < split ? weight + row * ld + c : beside + row * ld + c - split;
          const int64_t left = (c < split ? columns : panels.units) - c;
          const Vec<F> vector = zip_rows(from, from + ld, int(min(left, kLanes)));
          past_caches ? vector.stream(out) : vector.store(out);
        }
      }
    }
  }

  // Panels are walked in blocks of their depth, so that a block stays in the second-level cache
  // while all rows use it.
  static constexpr int64_t kDepthBlock = 512;

  // out += left W for some rows and a panel; rows of out are padded to whole vectors and begin
  // with the panel's first column. The panel `next` comes next, or none if -1.
  void add_product(const Blocked<const F>& left, int64_t rows, int64_t panel, StridedRows<S> out,
                   int64_t next = -1) const {
    const int64_t depth = this->depth(), step = panels.step(panel);
    const bool far = panels.bytes(depth) > l2_budget_bytes() && use_software_prefetch(rows);
    const auto add = [&](Term<F>* terms, int count) {
      for_row_groups(rows, [&](int64_t r, int n) {
        Term<F> shifted[kMaxTerms];
        for (int i = 0; i < count; ++i) {
          (shifted[i] = terms[i]).a += r * left.row;
          shifted[i].fetch = terms[i].fetch && r == 0;
        }
        product(n, panels.vectors(panel), shifted, count,
                Tile<S>{nullptr, 0, out[r], out.stride, true});
      });
    };
    Term<F> terms[kMaxTerms];
    if (lying()) {
      for (int s = 0; s < gates; ++s)
        terms[s] = {left.at(0, s * units),
                    left.row,
                    1,
                    units,
                    factors(weight) + gate_of(s) * units * columns + panels.first_unit(panel),
                    columns,
                    left.block};
      return add(terms, gates);
    }
    const F* const begin = packed + panels.before(panel) * depth;
    for (int64_t k = 0, stop; k < depth; k = stop) {
      stop = min(k + kDepthBlock, depth);
      terms[0] = {left.at(0, k), left.row, 1, stop - k, begin + k * step, step, left.block};
      if (far) {
        terms[0].fetch = true;
        if (stop < depth)
          terms[0].after = begin + stop * step;
        else if (next >= 0)
          terms[0].after = packed + panels.before(next) * depth;
      }
      add(terms, 1);
    }
  }
};

}  // namespace rnnkern::RNNKERN_ISA
