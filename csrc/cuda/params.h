// The boundary of the CUDA engine: parameter structs of its kernels and the host functions that
// launch them. No torch and no CUDA header is needed to include it.
//
// The stepwise engine takes one kernel per time step and direction; the recurrent products run
// before it, in cuBLAS, so that it is pointwise over (batch row, hidden unit). The persistent
// engine takes many steps in one kernel, with the recurrent weights in registers and shared memory.
// Both give the same results up to rounding.
//
// Types: T is the storage type (double, float, bfloat16, half). A is the accumulation type of
// pre-activations, running states, `saved` and `c_states`: T, or float for the two halves.
//
// Rows: a row is one (time step, batch row) pair. Rows are numbered in time-major order, t * B + b,
// or as packed. A pointer is to the whole tensor; *_offset is the first element of this step's rows
// in it, *_stride the distance of two rows, in elements. All indices are 64-bit.
//
// Projection: the cell's own h is called m; h = W_hr m, R wide, is a product between the kernels.
// Forward, the cell writes m to `h_operand`. Backward, launch_dh_total comes first and the cell
// reads dm = dh W_hr.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace rnnkern::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

enum class DType : int { float64, float32, bfloat16, float16 };

// A tensor by step and batch row: the strides, in elements, may be 0.
template <class V>
struct RowsByStep {
  V* data;  // null: not there
  int64_t t_stride, b_stride;
};

// Resets, for one direction and steps of the same rows: before step t, the states of batch rows
// whose mask is not 0 are replaced. A kernel replaces those that it leaves for the next step;
// launch_reset does it before the first step, and with a projection for h.
struct ResetParams {
  int64_t steps;                   // T
  RowsByStep<const uint8_t> mask;  // null: no resets
  RowsByStep<const void> h, c;     // T (R), (H): what the rows get; null: zeros
};

// What cells may ask for that are not built in (csrc/cells/cell.h).
struct CellOperands {
  int64_t heads;       // of W_hh; 1 if it is dense
  const void* params;  // T (kParams, H)
  const void* masks;   // T, (kMasks, H) of a row
  int64_t masks_offset, masks_stride;
};

struct StepForwardParams {
  int64_t batch, units;  // rows of this step, H
  int64_t row;           // number of the first of them
  int64_t t;             // number of the step; read with resets alone

  const void* input;  // A: W_ih x, gates in torch's order; may be the same memory as `saved`
  int64_t input_offset, input_stride;
  const void* hidden;             // A (batch, gates * H): W_hh h; null where h is zero, or without
                                  // W_hh. With heads (heads, batch, gates * H / heads)
  const void *bias_ih, *bias_hh;  // T (gates * H), or null
  void *h, *c;                    // A (batch, H), (batch, C): the states, before and after; or
                                  // null. C: H for each state but h, one after the other
  void* h_operand;                // T (batch, H): h for the next product, null where h serves
  void* y;                        // T; null with a projection, as h is
  int64_t y_offset, y_stride;
  void *saved, *c_states;  // A (rows, kSaved, H), (rows, C); null where not wanted
  ResetParams resets;
  CellOperands cell;
};

struct StepBackwardParams {
  int64_t batch, units, width;   // width: R, of h; units unless it is projected
  int64_t row, chunk_row;        // number of the first row, overall and within the chunk
  int64_t prev_batch, prev_row;  // rows that had a step before this one; the others began here,
                                 // from h0 and c0
  int64_t t;                     // number of the step; read with resets alone

  const void* y;  // T
  int64_t y_offset, prev_y_offset, y_stride;
  const void *h0, *c0;           // T (B, R), (B, C), or null for zeros
  const void *saved, *c_states;  // A
  const void* dy;                // T, or null for zeros
  int64_t dy_offset, dy_stride;
  void* dh_recurrent;     // A (batch, R): W_hh^T dgates of the step after
  void *dh, *dc;          // A (batch, R), (batch, C): derivative by the states, after and before;
                          // dc or null
  void *flow_h, *flow_c;  // A (rows, R), (rows, C): dL/dh_t and dL/dc_t; null where not wanted

  // Of the chunk's rows, T, as operands of the products with the weights.
  void* dgates;  // (kPreacts + kParams, H) each
  void* h_prev;  // R: the h that each row began with; null where not wanted

  // Only with a projection.
  void* dh_total;  // R, of the chunk's rows, T: dL/dh_t
  void* m;         // H, of the chunk's rows, T: what was projected; null where not wanted
  const void* dm;  // A (batch, H): W_hr^T dL/dh_t

  // Of rows that are reset before the next step, the kernel takes dh, dh_recurrent and dc for 0,
  // and adds them to the gradients of the states that the rows got there.
  ResetParams resets;
  RowsByStep<void> dreset_h, dreset_c;  // A; null where not wanted

  CellOperands cell;
  // Only with heads: once more the derivatives by W_hh h, as W_hh has its rows.
  void* head_dgates;   // T (heads, chunk_rows, gates * H / heads)
  int64_t chunk_rows;  // that it has memory for
};

// All steps of a persistent launch have the same batch rows; *_step is the distance of the rows of
// two consecutive steps, negative against time.
struct PersistentForwardParams {
  StepForwardParams step;  // the first; `hidden` is not read
  int64_t steps;
  int64_t row_step;
  const void* w_hh;  // T (gates * H, H)
  void* exchange;    // memory that PersistentPlan asks for, or null
  // Set by the launch: of a group of blocks, and the first batch row.
  int64_t exchange_bytes, first_row;
};

struct PersistentBackwardParams {
  StepBackwardParams step;  // the latest in time, which comes first
  int64_t steps;
  int64_t row_step, y_step, dy_step;
  // The step before the last one may have other rows than `step` says: their number, and the
  // distance to them in rows and in elements of y.
  int64_t last_prev_batch, last_prev_row, last_prev_y;
  const void* w_hh;
  void* exchange;  // these as in PersistentForwardParams
  int64_t exchange_bytes, first_row;
};

// The order of a cell's gates (csrc/cells/cell.h).
struct GateLayout {
  static constexpr int kMax = 4;
  int gates, preacts, input_preact, hidden_preact;
  int input_gate[kMax], hidden_gate[kMax];
};

// The stepwise kernels of a cell that is not built in, from a library of its own (added_cell.h);
// core/cuda_cells.h has them by the cell's number.
struct AddedKernels {
  GateLayout layout;
  const char* (*forward)(DType, const StepForwardParams&, Stream);
  const char* (*backward)(DType, const StepBackwardParams&, Stream);
};

// Each puts one kernel on the stream and returns null, or CUDA's description of the error.
const char* launch_forward(int cell, DType dtype, const StepForwardParams& step, Stream stream);
const char* launch_backward(int cell, DType dtype, const StepBackwardParams& step, Stream stream);

// With a projection, before launch_backward: writes dL/dh_t to dh_total and zeros to dh.
const char* launch_dh_total(DType dtype, const StepBackwardParams& step, Stream stream);

// Before step t: where `resets` says so, rows of `state` (batch, width) become those of `from`, or
// zeros. `state` is in A if `accumulated`, else T.
const char* launch_reset(DType dtype, bool accumulated, const ResetParams& resets,
                         const RowsByStep<const void>& from, int64_t t, int64_t batch,
                         int64_t width, void* state, Stream stream);

// Does in memory what launch_backward does with dh, dh_recurrent and dc of rows that are reset
// before step.t + 1, and nothing else: for the first step, with t = -1.
const char* launch_end_gradients(DType dtype, const StepBackwardParams& step, Stream stream);

// out = a + b over `count` contiguous elements: out in T, a and b in A if `accumulated`, else T.
const char* launch_add(DType dtype, bool accumulated, int64_t count, const void* a, const void* b,
                       void* out, Stream stream);

// What shares the recurrent weights of a layer: one block, a cluster of blocks, or blocks anywhere
// on the GPU.
enum class Group : int { block, cluster, grid };
constexpr const char* kSchedules[] = {"block", "clusters", "grid"};  // by group

// The grid of a persistent launch; no blocks: none is possible.
struct PersistentPlan {
  Group group{};
  int blocks = 0;  // of a group: they share the weights and exchange h or dh in each step
  int groups = 0;  // they share the batch
  int rows = 0;    // of the batch, to a group
  int64_t exchange_bytes = 0;  // of global memory that a direction needs
};

// The grid for the current device, for one direction, with resets or without, or for two of the
// same size at once.
PersistentPlan persistent_plan(int cell, DType dtype, int64_t units, int64_t batch, bool backward,
                               int directions, bool resets);

// By the group of that plan, for the `directions` (1 or 2) elements of `params`.
const char* launch_persistent(int cell, DType dtype, Group group,
                              const PersistentForwardParams* params, int directions, Stream stream);
// Leaves W_hh^T dgates of the last step in `dh_recurrent`.
const char* launch_persistent(int cell, DType dtype, Group group,
                              const PersistentBackwardParams* params, int directions,
                              Stream stream);

}  // namespace rnnkern::cuda
