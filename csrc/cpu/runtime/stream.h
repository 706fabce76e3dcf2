// A stream: a stack of layers on prepacked weights that keeps its states from step to step.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../../core/prepacked.h"
#include "team.h"

namespace rnnkern {

// Not for several threads at once. The weights stay where they are and outlive the stream; any
// number of streams may share them. A step allocates nothing and, with one thread, starts none.
class RNNKERN_API Stream {
 public:
  struct Sizes {
    int64_t layers, batch, input_size, hidden_size, width;  // width: of h
    int element_size;
    int64_t c_width;  // of c; 0 without
  };

  // `layers` from the input up, of one direction each. Throws std::invalid_argument where they do
  // not fit together or cannot be used by this process.
  static std::unique_ptr<Stream> create(const std::vector<const PrepackedHeader*>& layers,
                                        int64_t batch, int threads);
  virtual ~Stream() = default;

  // x (steps, batch, input_size) -> y (steps, batch, width), of the layers' type, contiguous. On
  // the caller's threads: two pools would get in each other's way.
  virtual void run(const ParallelFor& parallel, const void* x, int64_t steps, void* y) = 0;
  // The states, to read and to write between runs: h (layers, batch, width) of the layers' type and
  // c (layers, batch, c_width) of its sums' type; null without c.
  virtual void* h() = 0;
  virtual void* c() = 0;
  // Zeros the states of one batch row.
  virtual void reset(int64_t row) = 0;

  const Sizes& sizes() const { return sizes_; }

 protected:
  explicit Stream(const Sizes& sizes) : sizes_(sizes) {}
  const Sizes sizes_;
};

}  // namespace rnnkern
