// Prints the CPU quota that the control groups below a folder grant, without torch. Built and run
// by test_plan.py.
#include "../../csrc/cpu/runtime/cpu_quota.h"

#include <cstdio>

int main(int count, char** folders) {
  for (int i = 1; i < count; ++i) std::printf("%d\n", rnnkern::cpu_quota(folders[i]));
}
