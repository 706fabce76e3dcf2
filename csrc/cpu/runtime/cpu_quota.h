// The processor time that Linux control groups grant, as a container's CPU limit.
#pragma once
#include <string>

#include "../../core/types.h"

namespace rnnkern {

// As cores, a part of one counting as one; 0 without a limit. The strictest limit counts, of this
// process's group and of all above it, in versions 1 and 2 of the control groups. `root` stands
// before every path that is read.
int cpu_quota(const std::string& root = "");

}  // namespace rnnkern
