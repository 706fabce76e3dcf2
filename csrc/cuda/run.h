// Several time steps of one direction in one kernel, with the recurrent weights on the chip.
//
// All steps of a run have the same batch rows. The results are those of the steps one by one.
#pragma once
#include "step.h"

namespace rnnkern::cuda {

struct PersistentForwardParams {
  StepForwardParams step;  // the first; of `hidden` nothing is read
  int64_t steps;
  int64_t row_step;  // from one step's rows to those of the next
  const void* w_hh;  // T (gates * H, H)
};

struct PersistentBackwardParams {
  StepBackwardParams step;  // the first that is walked, which is the latest in time
  int64_t steps;
  int64_t row_step, y_step, dy_step;
  // Of the last step, for which they need not follow from `step`: rows that had a step before, and
  // how far before its rows and its elements of y those are.
  int64_t last_prev_batch, last_prev_row, last_prev_y;
  const void* w_hh;
};

// How a layer's recurrent weights lie on the chip; no blocks: they do not.
struct PersistentPlan {
  int blocks = 0;    // that hold the weights together and exchange h each step
  int clusters = 0;  // of so many blocks each, that the batch is shared by
  int rows = 0;      // of the batch, to a cluster
};

// How the current device would take so many runs at once: one, or two that have the same sizes.
PersistentPlan persistent_plan(int cell, DType storage, int64_t units, int64_t batch, bool backward,
                               int directions);

const char* launch_persistent(int cell, DType storage, const PersistentForwardParams* params,
                              int count, Stream stream);
// `dh_recurrent` holds W_hh^T dsum of the last step afterwards.
const char* launch_persistent(int cell, DType storage, const PersistentBackwardParams* params,
                              int count, Stream stream);

// The same for one storage type.
struct PersistentKernels {
  PersistentPlan (*persistent_plan)(int cell, int64_t units, int64_t batch, bool backward,
                                    int directions);
  const char* (*forward)(int cell, const PersistentForwardParams* params, int count, Stream stream);
  const char* (*backward)(int cell, const PersistentBackwardParams* params, int count,
                          Stream stream);
};

}  // namespace rnnkern::cuda
