// One time step of one direction: what it reads and writes, and the functions that start it.
//
// The matrix products are done before; what is left is pointwise over (batch row, hidden unit).
// Tensors keep the storage type T (double, float, bfloat16, half); sums, running states, `saved`
// and `cells` have the accumulation type A, which is T, or float for the two halves.
//
// A "row" is one (step, batch row) pair; rows are numbered in time-major order, t * B + b, or as
// packed. A pointer is to the whole tensor; *_offset is where this step's rows begin in it and
// *_row how far apart they are, in elements. All indices are 64-bit.
//
// With a projection the cell's own h is called m, and h = W_hr m, R wide, is a product between the
// kernels: forward, the cell leaves m in `h_operand`; backward, launch_dh_total comes first, and
// the cell is given dm = dh W_hr.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace rnnkern::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

enum class DType : int { float64, float32, bfloat16, float16 };

struct StepForwardParams {
  int64_t batch, units;  // rows of this step, H
  int64_t row;           // number of the first of them

  const void* input;  // A: W_ih x, gates in torch's order; may be the same memory as `saved`
  int64_t input_offset, input_row;
  const void* hidden;             // A (batch, gates * H): W_hh h; null where h is zero
  const void *bias_ih, *bias_hh;  // T (gates * H), or null
  void *h, *c;                    // A (batch, H): the states, before and after; or null
  void* h_operand;                // T (batch, H): h for the next product, null where h serves
  void* y;                        // T; null with a projection, as h is
  int64_t y_offset, y_row;
  void *saved, *c_states;  // A (rows, kSaved, H), (rows, H); null where not wanted
};

struct StepBackwardParams {
  int64_t batch, units, width;   // width: R, of h; units unless it is projected
  int64_t row, chunk_row;        // number of the first row, overall and within the chunk
  int64_t prev_batch, prev_row;  // rows that had a step before this one; the others
                                 // began here, from h0 and c0

  const void* y;  // T
  int64_t y_offset, prev_y_offset, y_row;
  const void *h0, *c0;           // T (B, R), (B, H), or null for zeros
  const void *saved, *c_states;  // A
  const void* dy;                // T, or null for zeros
  int64_t dy_offset, dy_row;
  void* dh_recurrent;     // A (batch, R): W_hh^T dgates of the step after
  void *dh, *dc;          // A (batch, R), (batch, H): derivative by the states, after and before;
                          // dc or null
  void *flow_h, *flow_c;  // A (rows, R), (rows, H): dL/dh_t and dL/dc_t; null where not wanted

  // Of the chunk's rows, T, as operands of the products with the weights.
  void* dgates;  // (kPreacts, H) each
  void* h_prev;  // R: the h that each row began with; null where not wanted

  // Only with a projection.
  void* dh_total;  // R, of the chunk's rows, T: dL/dh_t
  void* m;         // H, of the chunk's rows, T: what was projected; null where not wanted
  const void* dm;  // A (batch, H): W_hr^T dL/dh_t
};

// Each puts one kernel on the stream and returns null, or CUDA's word for what went wrong.
const char* launch_forward(int cell, DType storage, const StepForwardParams& step, Stream stream);
const char* launch_backward(int cell, DType storage, const StepBackwardParams& step, Stream stream);

// With a projection, before launch_backward: dL/dh_t, of which dh holds nothing afterwards.
const char* launch_dh_total(DType storage, const StepBackwardParams& step, Stream stream);

// out = a + b over `count` contiguous elements: out in T, a and b in A if `accumulated`, else T.
const char* launch_add(DType storage, bool accumulated, int64_t count, const void* a, const void* b,
                       void* out, Stream stream);

}  // namespace rnnkern::cuda
