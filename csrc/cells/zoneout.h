// Zoneout (Krueger et al. 2017) around any cell: where its mask is 1, a unit keeps a state from the
// step before, and where it is 0, it takes the cell's new one.
//   s' = mask s + (1 - mask) new, for each state s
// The new states are the cell's own: LSTM's new h comes from its new c, not from the mix. In
// evaluation the masks are their expectations, the rates.
#pragma once
#include "call.h"

namespace rnnkern {

// The names of what backward needs: the cell's, and "new h" of each state from kFirst on.
template <class Cell, int kFirst>
struct ZoneoutNames {
  static constexpr int kNew = Cell::kStates - kFirst, kLength = 32;
  char texts[kNew][kLength] = {};
  const char* names[Cell::kSaved + kNew] = {};

  constexpr ZoneoutNames() {
    for (int i = 0; i < Cell::kSaved; ++i) names[i] = Cell::kSavedNames[i];
    for (int i = 0; i < kNew; ++i) {
      char* to = texts[i];
      for (const char* from = "new "; *from;) *to++ = *from++;
      for (const char* from = Cell::kStateNames[kFirst + i]; *from && to < texts[i] + kLength - 1;)
        *to++ = *from++;
      names[Cell::kSaved + i] = texts[i];
    }
  }
};

template <class Cell>
struct Zoneout : Cell {
  static_assert(Cell::kMasks == 0, "zoneout is around a cell without masks of its own");
  static_assert(Cell::kNormalizedState == 0 && !Cell::kNormalizesHidden,
                "zoneout is around a cell without layer normalisation");
  // A cell that may project h does not look at it in backward.
  static constexpr int kFirst = Cell::kProjects ? 1 : 0;
  static constexpr bool kProjects = false;
  static constexpr int kMasks = Cell::kStates, kSaved = Cell::kSaved + Cell::kStates - kFirst;
  static constexpr auto& kMaskNames = Cell::kStateNames;
  static constexpr ZoneoutNames<Cell, kFirst> kNames{};
  static constexpr auto& kSavedNames = kNames.names;

  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* params, const V* masks,
                                 V* next, V* saved) {
    V fresh[Cell::kStates];
    call_forward<Cell, V>(preact, prev, params, nullptr, fresh, saved);
    for (int k = 0; k < Cell::kStates; ++k)
      next[k] = masks[k] * prev[k] + (V(1) - masks[k]) * fresh[k];
    for (int k = kFirst; k < Cell::kStates; ++k) saved[Cell::kSaved + k - kFirst] = fresh[k];
  }

  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* params, const V* masks,
                                  const V*, V* dnext, V* dprev, V* dgates, V* dparams) {
    V fresh[Cell::kStates], dfresh[Cell::kStates];
    for (int k = 0; k < Cell::kStates; ++k) {
      fresh[k] = k < kFirst ? V(0) : saved[Cell::kSaved + k - kFirst];
      dfresh[k] = (V(1) - masks[k]) * dnext[k];
    }
    call_backward<Cell, V>(saved, prev, params, nullptr, fresh, dfresh, dprev, dgates, dparams);
    for (int k = 0; k < Cell::kStates; ++k) dprev[k] = dprev[k] + masks[k] * dnext[k];
  }

  // The same without learned values.
  template <class V>
  RNNKERN_HD static void forward(const V* preact, const V* prev, const V* masks, V* next,
                                 V* saved) {
    forward<V>(preact, prev, nullptr, masks, next, saved);
  }
  template <class V>
  RNNKERN_HD static void backward(const V* saved, const V* prev, const V* masks, const V* next,
                                  V* dnext, V* dprev, V* dgates) {
    backward<V>(saved, prev, nullptr, masks, next, dnext, dprev, dgates, nullptr);
  }
};

}  // namespace rnnkern
