#include "runs.h"

namespace rnnkern::cuda {
extern const Runs runs_float16 = runs_of<__half>();
}
