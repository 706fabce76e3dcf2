// Calls a cell's functions with what the cell asks for: learned values, masks, both or neither.
#pragma once
#include "cell.h"

namespace rnnkern {

template <class Cell, class V>
RNNKERN_HD void call_forward(const V* preact, const V* prev, const V* params, const V* masks,
                             V* next, V* saved) {
  if constexpr (Cell::kParams > 0 && Cell::kMasks > 0)
    Cell::forward(preact, prev, params, masks, next, saved);
  else if constexpr (Cell::kParams > 0)
    Cell::forward(preact, prev, params, next, saved);
  else if constexpr (Cell::kMasks > 0)
    Cell::forward(preact, prev, masks, next, saved);
  else
    Cell::forward(preact, prev, next, saved);
}

template <class Cell, class V>
RNNKERN_HD void call_backward(const V* saved, const V* prev, const V* params, const V* masks,
                              const V* next, V* dnext, V* dprev, V* dgates, V* dparams) {
  if constexpr (Cell::kParams > 0 && Cell::kMasks > 0)
    Cell::backward(saved, prev, params, masks, next, dnext, dprev, dgates, dparams);
  else if constexpr (Cell::kParams > 0)
    Cell::backward(saved, prev, params, next, dnext, dprev, dgates, dparams);
  else if constexpr (Cell::kMasks > 0)
    Cell::backward(saved, prev, masks, next, dnext, dprev, dgates);
  else
    Cell::backward(saved, prev, next, dnext, dprev, dgates);
}

}  // namespace rnnkern
