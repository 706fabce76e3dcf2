// Errors of torch that cross its C shim: they keep torch's words. Included before torch's own
// stable headers, whose inline functions then report by it too.
//
// The shim answers with a code. From torch 2.13 on it also hands out the message, through a
// function that is younger than the version we build for: a weak symbol, null in an older torch.
#pragma once
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <stdexcept>
#include <string>

// What torch says when the memory of this library's device is at an end.
#ifndef RNNKERN_OUT_OF_MEMORY
#define RNNKERN_OUT_OF_MEMORY "DefaultCPUAllocator: can't allocate memory"
#endif

extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

namespace rnnkern {

// Whether a call to the shim does little besides allocating.
inline bool allocates(const char* call) {
  for (const char* name : {"empty", "aten::new_zeros", "aten::contiguous", "aten::clone",
                           "aten::to", "aten::_to_copy", "aten::reshape"})
    if (std::strstr(call, name)) return true;
  return false;
}

[[noreturn]] inline void throw_torch_error(const char* call) {
  if (torch_exception_get_what_without_backtrace) {
    const std::string words = torch_exception_get_what_without_backtrace();
    if (words == "std::bad_alloc") throw std::runtime_error(RNNKERN_OUT_OF_MEMORY);
    throw std::runtime_error(words);
  }
  std::string words = std::string("rnnkern: torch failed in ") + call + "; see stderr";
  if (allocates(call)) words = RNNKERN_OUT_OF_MEMORY ". " + words;
  throw std::runtime_error(words);
}

}  // namespace rnnkern

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) rnnkern::throw_torch_error(#call);
