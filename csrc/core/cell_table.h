// The cells as JSON, a list by CellId: what the bindings export of the cells' headers, and
// rnnkern/cell_spec.py reads.
#pragma once
#include <string>

#include "cell_facts.h"

namespace rnnkern {

inline std::string json_list(const char* const* names, int count) {
  std::string list;
  for (int i = 0; i < count; ++i) list += std::string(i ? ", \"" : "\"") + names[i] + '"';
  return "[" + list + "]";
}

inline const char* name_of(Recurrent recurrent) {
  static constexpr const char* kNames[] = {"dense", "heads", "none"};
  return kNames[int(recurrent)];
}

inline const char* name_of(Input input) { return input == Input::given ? "given" : "dense"; }

inline std::string cell_table() {
  std::string table;
  for (int64_t id = 0; const CellFacts* const facts = cell_facts(id); ++id)
    table += std::string(id ? ", " : "") + "{\"mode\": \"" + facts->mode +
             "\", \"gates\": " + json_list(facts->gate_names, facts->gates) +
             ", \"saved\": " + json_list(facts->saved_names, facts->saved) +
             ", \"states\": " + json_list(facts->state_names, facts->states) +
             ", \"params\": " + json_list(facts->param_names, facts->params) +
             ", \"masks\": " + json_list(facts->mask_names, facts->masks) + ", \"input\": \"" +
             name_of(facts->input) + "\", \"recurrent\": \"" + name_of(facts->recurrent) +
             "\", \"normalizes_hidden\": " + (facts->normalizes_hidden ? "true" : "false") +
             ", \"masks_hidden\": " + (facts->masks_hidden ? "true" : "false") +
             ", \"projects\": " + (facts->projects ? "true" : "false") + "}";
  return "[" + table + "]";
}

}  // namespace rnnkern
