// Prepacked weights: a layer's weights as the engine multiplies by them, packed once and read by
// any number of calls and threads. Opaque to bindings, which own the memory and check it by the
// header:
//
//   header | direction 0: W_ih panels | W_hh panels | bias | W_hr panels | direction 1: ... | masks
//
// The masks of a cell that takes some are those of all steps and rows, (kMasks, H).
// Panels are those of one instruction-set level: memory is not to be taken to another machine.
#pragma once
#include <cstdint>

#include "types.h"

namespace rnnkern {

// What the weights are rounded to; states, inputs, biases and sums keep their type.
enum class WeightFormat : int32_t {
  same,      // the layer's own type: no rounding
  bfloat16,  // float32 layers: 8 bits of mantissa
  int8,      // float32 layers: a scale per gate and unit; inputs and h are quantised in each step
};

struct alignas(64) PrepackedHeader {
  static constexpr int64_t kMagic = 0x72'6e'6e'6b'65'72'6e'31;  // "rnnkern1"
  static constexpr int kAlignment = 64;

  int64_t magic, bytes;  // bytes: of everything, with the header
  char level[24];        // that packed them
  int32_t cell, directions, element_size;
  WeightFormat format;
  int32_t tag;                                        // of the bindings: the dtype of the tensors
  int64_t input_size, hidden_size, proj_size, heads;  // heads: as LayerParams has them
  int64_t masks_at;                                   // bytes from here to them
};

}  // namespace rnnkern
