// How a call with resets runs: with the mask in the kernels, or cut into episodes that are the
// sequences of a packed batch. Both have the same bits. A mask costs next to nothing; episodes cost
// copies, but those of one row run side by side.
#pragma once
#include <cstdint>

#include "../../core/types.h"

namespace rnnkern {

struct ResetsPlan {
  bool mask;
  const char* rule;  // that fired
};

// `episodes`: their number in the whole batch.
RNNKERN_API ResetsPlan plan_resets(int64_t steps, int64_t batch, int64_t hidden_size,
                                   int64_t episodes);

}  // namespace rnnkern
