// Which extensions of AArch64 this CPU has; its vectors (NEON) are part of every one.
#pragma once
#if defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace rnnkern {

#if defined(__APPLE__)
inline bool has_arm_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return !sysctlbyname(name, &value, &size, nullptr, 0) && value;
}
#endif

// SDOT: products of int8.
inline bool has_arm_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotprod;
#elif defined(__APPLE__)
  return has_arm_feature("hw.optional.arm.FEAT_DotProd");
#else
  return false;
#endif
}

// BFDOT: products of bfloat16.
inline bool has_arm_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
  return has_arm_feature("hw.optional.arm.FEAT_BF16");
#else
  return false;
#endif
}

}  // namespace rnnkern

#endif
