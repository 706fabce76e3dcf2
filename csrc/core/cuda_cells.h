// The CUDA kernels of cells that are not built in, by the cell's number. The engine keeps them for
// the CUDA operators and knows no more of them.
#pragma once
#include "types.h"

namespace rnnkern {

namespace cuda {
struct AddedKernels;  // cuda/params.h
}

// Null for a cell without.
RNNKERN_API const cuda::AddedKernels* added_kernels(int64_t cell);

// For rnnkern/own_cell_cuda.py: gives a cell its kernels, which live as long as the process.
extern "C" RNNKERN_API void rnnkern_set_kernels(int cell, const cuda::AddedKernels* kernels);

}  // namespace rnnkern
