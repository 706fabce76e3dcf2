#include "runs.h"

namespace rnnkern::cuda {
extern const Runs runs_float32 = runs_of<float>();
}
