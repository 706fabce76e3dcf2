// The table of cells as JSON, a list by CellId: what the bindings export of the cells' headers.
#pragma once
#include <string>

#include "registry.h"

namespace rnnkern {

// torch.nn's name of a cell (RNNBase.mode).
inline const char* mode_name(CellId id) {
  switch (id) {
    case CellId::lstm: return "LSTM";
    case CellId::gru: return "GRU";
    case CellId::rnn_tanh: return "RNN_TANH";
    case CellId::rnn_relu: return "RNN_RELU";
  }
  return "";
}

inline std::string json_list(const char* const* names, int count) {
  std::string list;
  for (int i = 0; i < count; ++i) list += std::string(i ? ", \"" : "\"") + names[i] + '"';
  return "[" + list + "]";
}

inline std::string cell_table() {
  static constexpr const char* kStateNames[] = {"h", "c"};
  std::string table;
  for (int id = 0; id < kCellCount; ++id)
    visit_cell(CellId(id), [&](auto cell) {
      table += std::string(id ? ", " : "") + "{\"mode\": \"" + mode_name(CellId(id)) +
               "\", \"gates\": " + json_list(cell.kGateNames, cell.kGates) +
               ", \"saved\": " + json_list(cell.kSavedNames, cell.kSaved) +
               ", \"states\": " + json_list(kStateNames, cell.kStates) +
               ", \"projects\": " + (cell.kProjects ? "true" : "false") + "}";
    });
  return "[" + table + "]";
}

}  // namespace rnnkern
