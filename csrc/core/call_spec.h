// What a call of a layer says besides its tensors: one object from Python (rnnkern/call_spec.py has
// the same fields in the same order) to the engine's parameters. A new field is added in these two
// files; the operators' schemas and their arguments follow from here.
#pragma once
#include <cstdint>
#include <tuple>

namespace rnnkern {

struct CallSpec {
  int64_t cell;        // a CellId
  int64_t directions;  // 1 or 2: the second runs from the last step to the first
  bool bias;
  bool projection;   // whether h is projected (LSTM)
  bool batch_first;  // padded data only

  using Types = std::tuple<int64_t, int64_t, bool, bool, bool>;
#define RNNKERN_CALL_SPEC_SCHEMA \
  "int cell, int directions, bool bias, bool projection, bool batch_first"

  // f(field) for each, in order.
  template <class F>
  void each(F&& f) {
    f(cell), f(directions), f(bias), f(projection), f(batch_first);
  }
};

}  // namespace rnnkern
