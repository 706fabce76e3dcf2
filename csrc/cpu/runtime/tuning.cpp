#include "tuning.h"

#include "cpu_quota.h"

#if defined(__linux__)
#include <unistd.h>
#endif

#include "arm_features.h"

namespace rnnkern {
namespace {

const Tuning& tuning_of_this_cpu() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f")) return kTunings[0];
#endif
  return kTunings[1];
}

bool has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__)
  return has_arm_dotprod();
#else
  return false;
#endif
}

int64_t l2_bytes() {
  long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 1 << 20;
}

}  // namespace

const Machine& this_machine() {
  static const Machine machine{&tuning_of_this_cpu(), l2_bytes() / 2, has_vnni(), cpu_quota()};
  return machine;
}

int64_t l2_budget_bytes() { return this_machine().l2_budget_bytes; }

bool use_software_prefetch(int64_t rows, bool prepacked) {
  const Tuning& tuning = *this_machine().tuning;
  return rows > (prepacked ? tuning.max_rows_hardware_prefetch_prepacked
                           : tuning.max_rows_hardware_prefetch);
}

}  // namespace rnnkern
