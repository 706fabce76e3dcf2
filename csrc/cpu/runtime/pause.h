// A moment's rest for the core inside a loop that spins.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnkern {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace rnnkern
