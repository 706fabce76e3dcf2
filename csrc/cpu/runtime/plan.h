// The plan of a call: how many threads, what they split, and in which blocks of rows and chunks of
// time. Results do not depend on the number of threads, bit for bit; only speed does.
#pragma once
#include <cstdint>

#include "../../core/types.h"
#include "tuning.h"

namespace rnnkern {

// For each decision, the rule of plan.cpp that fired.
struct PlanRules {
  const char *threads, *split, *input, *weights, *wgrad;
};

struct Plan {
  int threads;
  bool split_units;       // threads split the hidden units and meet after each step; else the rows
  bool fused_input;       // x W_ih inside the step; else ahead of it, in chunks of time
  bool unpacked_weights;  // weights are read in their own layout
  int64_t row_block;      // batch rows that go through all of time together
  int64_t input_chunk;    // steps of x W_ih at a time
  int64_t wgrad_chunk;    // steps of gate gradients between two weight gradient GEMMs
  int64_t wgrad_rows;     // batch rows whose weight gradients are summed by themselves, on average
  PlanRules rules;

  // Blocks of the batch that go backward by themselves. Depends on the shape alone.
  static constexpr int kMaxBlocks = 16;
  int blocks(int64_t batch) const {
    return batch > wgrad_rows ? int((batch + wgrad_rows - 1) / wgrad_rows) : 1;
  }

  // Blocks that go forward by themselves. In a ragged batch they differ in batch rows.
  int64_t row_blocks(int64_t batch) const { return (batch + row_block - 1) / row_block; }

  // Threads of one direction: two directions share an even number of threads half and half.
  int team(int directions) const {
    return directions == 2 && threads % 2 == 0 ? threads / 2 : threads;
  }
};

struct PlanInput {
  int64_t steps, batch, rows;
  int64_t input_size, hidden_size, proj_size;
  int gates, preacts, directions;
  int element_size;
  bool backward;
  int threads;                           // at most
  bool prepacked = false, int8 = false;  // what the weights are
  int64_t heads = 1;                     // blocks of W_hh: 1 if it is dense, 0 if there is none
  bool given_sums = false;               // there is no W_ih
  bool whole_rows = false;               // a step needs all units of a row
};

RNNKERN_API Plan make_plan(const PlanInput& in, const Machine& machine = this_machine());

}  // namespace rnnkern
