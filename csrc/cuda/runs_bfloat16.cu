#include "runs.h"

namespace rnnkern::cuda {
extern const Runs runs_bfloat16 = runs_of<__nv_bfloat16>();
}
