// Dropout on h before the recurrent product, around any cell (Gal & Ghahramani 2016): W_hh
// multiplies mask h, with a mask for each unit and row that is the same in all steps. The engine
// multiplies; the cell's own equations see h as it is.
#pragma once
#include "call.h"

namespace rnnkern {

template <class Cell>
struct VariationalDropout : Cell {
  static_assert(Cell::kMasks == 0, "variational dropout is around a cell without masks of its own");
  static constexpr bool kProjects = false, kMasksHidden = true;
  static constexpr int kMasks = 1;
  static constexpr const char* kMaskNames[] = {"h"};

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, const V*, V* next,
                                 V* saved) {
    call_forward<Cell, V>(preact, prev, params, nullptr, next, saved);
  }
  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* params, const V*,
                                  const V* next, V* dnext, V* dprev, V* dgates, V* dparams) {
    call_backward<Cell, V>(saved, prev, params, nullptr, next, dnext, dprev, dgates, dparams);
  }

  // The same without learned values.
  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V*, V* next, V* saved) {
    forward<V>(preact, prev, nullptr, nullptr, next, saved);
  }
  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V*, const V* next, V* dnext,
                                  V* dprev, V* dgates) {
    backward<V>(saved, prev, nullptr, nullptr, next, dnext, dprev, dgates, nullptr);
  }
};

}  // namespace rnnkern
