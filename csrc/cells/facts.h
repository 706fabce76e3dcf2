// The facts of a cell as values, for code that is no template over cells: shape checks, plans,
// bindings, and through them Python.
#pragma once
#include "limits.h"

namespace rnnkern {

struct CellFacts {
  const char* mode;  // its name in Python; of torch.nn's cells, RNNBase.mode
  int gates, preacts, states, saved, params, masks;
  bool masks_hidden, projects, normalizes,
      normalizes_hidden;  // normalizes: a step needs whole rows
  Input input;
  Recurrent recurrent;
  const char *const *gate_names, *const *state_names, *const *saved_names, *const *param_names,
                                                                               *const *mask_names;
};

template <class Cell>
constexpr CellFacts facts_of(const char* mode) {
  static_assert(check_limits<Cell>());
  return {mode,
          Cell::kGates,
          Cell::kPreacts,
          Cell::kStates,
          Cell::kSaved,
          Cell::kParams,
          Cell::kMasks,
          Cell::kMasksHidden,
          Cell::kProjects,
          Cell::kNormalizesHidden || Cell::kNormalizedState > 0,
          Cell::kNormalizesHidden,
          Cell::kInput,
          Cell::kRecurrent,
          Cell::kGateNames,
          Cell::kStateNames,
          Cell::kSavedNames,
          Cell::kParamNames,
          Cell::kMaskNames};
}

}  // namespace rnnkern
