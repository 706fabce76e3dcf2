// The facts of any cell by its number: built in, or added by a library of a user's cell.
#pragma once
#include "../cells/registry.h"
#include "types.h"

namespace rnnkern {

// Of a cell that was added; null for a number that no cell has.
RNNKERN_API const CellFacts* added_cell_facts(int64_t id);

// Null for a number that no cell has.
inline const CellFacts* cell_facts(int64_t id) {
  return id >= 0 && id < kCellCount ? &kCellFacts[id] : added_cell_facts(id);
}
inline const CellFacts* cell_facts(CellId id) { return cell_facts(int64_t(id)); }

}  // namespace rnnkern
