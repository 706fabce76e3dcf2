// Which cells the engines take. A cell beyond a limit does not compile, and the message says why.
#pragma once
#include "cell.h"

namespace rnnkern {

// The vectors of a register tile: one for each pre-activation of a unit that products make.
constexpr int kMaxPreacts = 4;

template <class Names>
constexpr int count_of(const Names&) {
  return -1;  // a pointer: not known
}
template <class Name, int count>
constexpr int count_of(Name (&)[count]) {
  return count;
}
// Whether there is a name for each.
template <class Names>
constexpr bool names_all(const Names& names, int count) {
  return count_of(names) == count || (count_of(names) < 0 && count == 0);
}

template <class Cell>
constexpr bool check_limits() {
  constexpr int gates = Cell::kGates, preacts = Cell::kPreacts;
  constexpr int input = Cell::kInputPreact, hidden = Cell::kHiddenPreact;
  static_assert(gates >= 1 && gates <= kMaxPreacts, "a cell has 1 to 4 gates");
  static_assert(preacts >= gates && (preacts <= kMaxPreacts || Cell::kInput == Input::given),
                "a cell has at least a pre-activation for each gate, and at most 4");
  static_assert(input >= 0 && input + gates <= preacts,
                "kInputPreact + kGates must not exceed kPreacts");
  static_assert(hidden >= 0 && hidden + gates <= preacts,
                "kHiddenPreact + kGates must not exceed kPreacts");
  static_assert((input < hidden ? hidden : input) + gates == preacts &&
                    (input == 0 || hidden == 0) &&
                    (input < hidden ? hidden - input : input - hidden) <= gates,
                "each pre-activation takes W_ih x, W_hh h or both");
  static_assert(Cell::kRecurrent != Recurrent::none || preacts == gates,
                "without a W_hh a cell has one pre-activation for each gate");
  static_assert(
      Cell::kInput == Input::dense || Cell::kRecurrent != Recurrent::none || Cell::kParams > 0,
      "a cell whose input sums are given has a W_hh or learned values per unit");
  static_assert(Cell::kInput == Input::dense || !Cell::kProjects,
                "a cell that projects h has a W_ih");
  constexpr bool normalizes = Cell::kNormalizesHidden || Cell::kNormalizedState > 0;
  static_assert(
      !normalizes || (Cell::kInput == Input::given && Cell::kRecurrent == Recurrent::dense),
      "a cell that normalises W_hh h or a state has given sums and a dense W_hh");
  static_assert(!Cell::kNormalizesHidden || (input == 0 && hidden == gates),
                "a cell that normalises W_hh h has pre-activations of its own for it");
  static_assert(!Cell::kNormalizesHidden || Cell::kSaved > gates,
                "a cell that normalises W_hh h saves kGates + 1 values more than its own");
  static_assert(Cell::kNormalizedState >= 0 && Cell::kNormalizedState < Cell::kStates,
                "kNormalizedState is a state other than h, or 0");
  static_assert(Cell::kNormalizedState == 0 || Cell::kParams > 0,
                "a cell that normalises a state has a gain for it");
  static_assert(Cell::kStates >= 1, "a cell has at least one state, h");
  static_assert(Cell::kSaved >= 0, "kSaved is the number of saved values, 0 or more");
  static_assert(Cell::kParams >= 0, "kParams is the number of learned values per unit, 0 or more");
  static_assert(Cell::kMasks >= 0, "kMasks is the number of masks per unit and step, 0 or more");
  static_assert(!Cell::kMasksHidden || (Cell::kMasks > 0 && Cell::kRecurrent != Recurrent::none),
                "a cell that masks h before the recurrent product has a mask and a W_hh");
  static_assert(!Cell::kProjects || (Cell::kStates == 2 && Cell::kParams + Cell::kMasks == 0),
                "a cell that projects h has two states, no learned values per unit and no masks");
  static_assert(!Cell::kProjects || Cell::kRecurrent == Recurrent::dense,
                "a cell that projects h has a dense W_hh");
  static_assert(names_all(Cell::kGateNames, gates), "kGateNames must name each gate");
  static_assert(names_all(Cell::kStateNames, Cell::kStates), "kStateNames must name each state");
  static_assert(names_all(Cell::kSavedNames, Cell::kSaved),
                "kSavedNames must name each saved value");
  static_assert(names_all(Cell::kParamNames, Cell::kParams),
                "kParamNames must name each learned value");
  static_assert(names_all(Cell::kMaskNames, Cell::kMasks), "kMaskNames must name each mask");
  return true;
}

template <class Cell>
constexpr bool check_cuda_limits() {
  static_assert(Cell::kInput == Input::dense, "on CUDA W_ih is dense");
  static_assert(!Cell::kMasksHidden, "on CUDA W_hh multiplies h as it is");
  return check_limits<Cell>();
}

}  // namespace rnnkern
