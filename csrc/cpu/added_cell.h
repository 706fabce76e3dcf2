// The library of one cell that is not built in: the engine's templates for it, at the level that
// the library is compiled for. rnnkern/own_cell.py writes the source file that includes this header
// and the cell's, and ends with the macro.
#pragma once
#define RNNKERN_GEMM_OF_ENGINE
#include "engine.h"
#include "rnn/backward.h"
#include "rnn/forward.h"
#include "rnn/prepack.h"

namespace rnnkern::RNNKERN_ISA {

template <class Cell, class T>
constexpr KernelTable<T> kernels_of() {
  return {run_forward<Cell, T>, run_backward<Cell, T>, prepack<Cell, T>, nullptr};
}

}  // namespace rnnkern::RNNKERN_ISA

#define RNNKERN_STRING_OF(x) #x
#define RNNKERN_STRING(x) RNNKERN_STRING_OF(x)

// Defines `int rnnkern_add_cell()`, which adds the cell and returns its number.
#define RNNKERN_ADDED_CELL(Cell, mode)                                    \
  extern "C" RNNKERN_API int rnnkern_add_cell() {                         \
    using namespace rnnkern;                                              \
    static const AddedCell cell{facts_of<Cell>(mode),                     \
                                {RNNKERN_STRING(RNNKERN_ISA),             \
                                 RNNKERN_ISA::kBytes,                     \
                                 RNNKERN_ISA::kernels_of<Cell, float>(),  \
                                 RNNKERN_ISA::kernels_of<Cell, double>(), \
                                 {},                                      \
                                 nullptr}};                               \
    static const int id = add_cell(cell);                                 \
    return id;                                                            \
  }
