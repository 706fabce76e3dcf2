// The right operand of the backward pass's products: a weight matrix, whose rows are multiplied by
// the gradients of the sums they made.
#pragma once
#include "pack.h"
#include "team.h"

namespace rnnkern::RNNKERN_ISA {

// `gates` blocks of `units` rows. Packed, or as it lies if the call is too short to repay packing;
// its rows must then fill whole vectors.
template <class T>
struct RightOperand {
  Panels<T> panels;  // of its columns
  const T* weight;
  T* packed;
  int64_t units;
  int gates;
  int (*gate_of)(int s);  // the weight's block for the s-th block of the left operand
  bool direct;

  int64_t depth() const { return gates * units; }
  bool lying() const { return direct && panels.units % Vec<T>::kLanes == 0; }

  // Row k of a packed panel is one unit of one gate.
  void pack(Team team) const {
    const int64_t columns = panels.units, count = lying() ? 0 : panels.count();
    for (int64_t panel = team.begin(count); panel < team.end(count); ++panel)
      pack_rows(
          panels, panel, depth(),
          [&](int64_t k) {
            return weight + (gate_of(int(k / units)) * units + k % units) * columns;
          },
          packed + panels.before(panel) * depth());
  }

  // Panels are walked in blocks of their depth, so that a block stays in the second-level cache
  // while all rows use it.
  static constexpr int64_t kDepthBlock = 512;

  // out += left W for some rows and a panel; rows of out are padded to whole vectors and begin
  // with the panel's first column.
  void add_product(RowsOf<const T> left, int64_t rows, int64_t panel, RowsOf<T> out) const {
    const int64_t depth = this->depth(), columns = panels.units, step = panels.step(panel);
    const auto add = [&](Term<T>* terms, int count) {
      for_row_groups(rows, [&](int64_t r, int n) {
        Term<T> shifted[kMaxTerms];
        for (int i = 0; i < count; ++i) (shifted[i] = terms[i]).a += r * left.stride;
        product(n, panels.vectors(panel), shifted, count,
                Tile<T>{out[r], out.stride, out[r], out.stride});
      });
    };
    Term<T> terms[kMaxTerms];
    if (lying()) {
      for (int s = 0; s < gates; ++s)
        terms[s] = {left.data + s * units,
                    left.stride,
                    1,
                    units,
                    weight + gate_of(s) * units * columns + panels.first_unit(panel),
                    columns};
      return add(terms, gates);
    }
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      terms[0] = {left.data + k,
                  left.stride,
                  1,
                  least(kDepthBlock, depth - k),
                  packed + panels.before(panel) * depth + k * step,
                  step};
      add(terms, 1);
    }
  }
};

}  // namespace rnnkern::RNNKERN_ISA
