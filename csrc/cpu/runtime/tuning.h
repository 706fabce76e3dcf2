// Tuning constants, one row per micro-architecture, and what this machine is.
//
// A row lists what its measurements changed; the members' initialisers are the first machine's
// values. docs/performance/experiments.md has the measurements.
#pragma once
#include <cstdint>

#include "../../core/types.h"

namespace rnnkern {

struct Tuning {
  const char* micro_architecture;

  // Threads. A second thread costs some 20 us: 5e5 multiply-adds of one core. Few rows wait for
  // their weights instead, which come at 20 GB/s per core from the last-level cache.
  double fmas_per_thread = 5e5;
  double fmas_per_thread_few_rows = 1.5e5;
  int64_t few_rows = 16;
  int fmas_per_gate = 20;  // what one gate function costs

  // Split. Rows need no barrier. Units keep each core's slice of the weights in its own L2.
  int64_t min_rows_per_thread = 3;    // with fewer, only units are left to share
  int64_t max_rows_split_units = 64;  // from here a slice of weights is read often enough anyway

  // Input GEMM inside the step. Ahead of it, few rows over few steps are one register tile.
  int64_t fused_max_steps = 3;
  int64_t fused_max_inputs = 4;
  int64_t fused_min_rows = 6;  // a whole tile of AVX-512

  // Unpacked weights: passes over all weights that cost as much as packing them, by where the
  // packed copy is: L2, L3 or memory.
  int64_t unpacked_max_passes_l2 = 2, unpacked_max_passes_l3 = 4, unpacked_max_passes_memory = 6;
  int64_t memory_bytes = 4 << 20;           // weights from here count as in memory
  int64_t unpacked_max_rows_backward = 16;  // unpacked rows cost only cache misses per tile

  // Blocks of rows, which threads take as they are free. AMX wants twice as many.
  int64_t row_block = 24, row_block_bf16 = 48;

  // Chunks of the input GEMM: they stay in the L2 beside the recurrent weights. Where these do not
  // fit it, they are read again for each chunk, which then has rows enough to repay it.
  int64_t input_chunk_bytes = 256 << 10;
  int64_t input_chunk_min_rows = 128;

  // Weight gradients: rows of one GEMM, twice as many where the gradients come from memory. Blocks
  // of rows cost a gradient of all weights each.
  int64_t wgrad_chunk_rows = 256, wgrad_chunk_rows_memory = 512;
  int64_t wgrad_min_block_rows = 60;
  int64_t wgrad_max_block_bytes = 4 << 20;

  // Rows up to which the hardware prefetcher follows the weights better by itself.
  int64_t max_rows_hardware_prefetch = 0;
  int64_t max_rows_hardware_prefetch_prepacked = 4;
};

// The last row is for every other processor: measured on Ice Lake, Emerald Rapids and Granite
// Rapids.
constexpr Tuning kTunings[] = {
    {.micro_architecture = "zen-avx512", .max_rows_hardware_prefetch = 4},  // on a Zen 5
    {.micro_architecture = "generic"},
};

struct Machine {
  const Tuning* tuning;
  int64_t l2_budget_bytes;  // half of a core's L2: packed weights that stay while rows stream by
  bool has_vnni = false;    // int8 products of AVX-512 and NEON, which no level requires
  int cpu_quota = 0;        // cpu_quota.h: processor time as cores, 0 without a limit
};

RNNKERN_API const Machine& this_machine();

// Of this machine. Not inline: engine.cpp is compiled for several instruction sets.
RNNKERN_API int64_t l2_budget_bytes();

// Whether to prefetch weights by software, for a GEMM of so many rows. Prepacked weights lie still:
// the caches hold those that fit.
RNNKERN_API bool use_software_prefetch(int64_t rows, bool prepacked = false);

}  // namespace rnnkern
