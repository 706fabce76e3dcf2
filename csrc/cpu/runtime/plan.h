// How a call is cut: over how many threads, by what, and in which blocks of rows and chunks of
// time. Results do not depend on the number of threads, bit for bit; only speed does.
#pragma once
#include <cstdint>

namespace rnnkern {

// Bytes of packed weights that one core's second-level cache can keep while rows stream through:
// half of it.
int64_t l2_budget_bytes();

// Whether to fetch ahead the weights that so many rows go through in order: by themselves some
// processors do it better while these are few.
bool use_software_prefetch(int64_t rows);

struct Plan {
  int threads;
  bool split_units;       // threads split the hidden units and meet after each step; else the rows
  bool fused_input;       // x W_ih inside the step; else ahead of it, in chunks of time
  bool unpacked_weights;  // weights are read as they lie, not packed
  int64_t row_block;      // rows that go through all of time together
  int64_t input_chunk;    // steps of x W_ih at a time
  int64_t wgrad_chunk;    // steps of gate gradients between two weight gradient products
  int64_t wgrad_rows;     // batch rows whose weight gradients are summed by themselves

  // Parts of the batch that go backward by themselves. Depends on the shape alone.
  static constexpr int kMaxBlocks = 16;
  int blocks(int64_t batch) const {
    return batch > wgrad_rows ? int((batch + wgrad_rows - 1) / wgrad_rows) : 1;
  }

  // Threads that work on one direction: two share an even number half and half.
  int team(int directions) const {
    return directions == 2 && threads % 2 == 0 ? threads / 2 : threads;
  }
};

struct PlanInput {
  int64_t steps, batch, rows;
  int64_t input_size, hidden_size, proj_size;
  int gates, sums, directions;
  int element_size;
  bool backward;
  int threads;  // as many as we may have
};

Plan make_plan(const PlanInput& in);

}  // namespace rnnkern
