#include "plan.h"

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace rnnkern {
namespace {

int64_t second_level_cache() {
  long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 1 << 20;
}

// Multiply-adds below which a second thread costs more than it brings (some 20 microseconds); with
// few rows they wait for the weights, 20 GB/s a core from the last-level cache.
constexpr double kWorthAThread = 5e5, kWorthAThreadFewRows = 1.5e5;
constexpr int64_t kFewRows = 16;

}  // namespace

int64_t l2_budget_bytes() {
  static const int64_t bytes = second_level_cache() / 2;
  return bytes;
}

bool use_software_prefetch([[maybe_unused]] int64_t rows) {
#if defined(__x86_64__)
  // Measured on a Zen 5.
  static const bool by_itself = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
  return rows > 4 || !by_itself;
#else
  return true;
#endif
}

Plan make_plan(const PlanInput& in) {
  const int64_t kept = l2_budget_bytes();
  const int64_t I = in.input_size, H = in.hidden_size, G = in.gates, P = in.proj_size;
  const int64_t each_step = G * H * (P ? P : H) + P * H;  // weights that every step reads
  const double work =
      double(in.rows) * in.directions * (G * H * I + each_step) * (in.backward ? 2 : 1) +
      double(in.rows) * in.directions * in.sums * H * 20;  // the gate functions
  Plan plan{};
  const double worth = in.rows <= kFewRows ? kWorthAThreadFewRows : kWorthAThread;
  plan.threads = int(std::clamp<double>(work / worth, 1, in.threads));

  const int team = plan.team(in.directions);
  const int64_t recurrent = each_step * in.element_size;
  const int64_t weights = G * H * I * in.element_size + recurrent;
  // Rows need no barrier; units keep each core's slice of the weights in its own cache, and are
  // the only way to share few rows.
  const int64_t rows_each = in.batch / team;
  plan.split_units = team > 1 && (rows_each < 3 || (recurrent > kept && rows_each < 64));

  const int64_t split = plan.split_units ? team : 1;
  const int64_t rows_here = plan.split_units ? in.batch : std::max<int64_t>(rows_each, 1);
  // A few rows over a few steps are one tile of the input's product, ahead of them.
  plan.fused_input = (in.steps <= 3 && in.batch >= in.steps) || I <= 4 ||
                     (rows_here >= 6 && weights / split <= kept);
  // Forward, weights as they lie are read once per tile of rows, of the input once per tile of
  // steps and rows where its product comes ahead. Packing costs some such readings: the more, the
  // farther away the packed copy stands. Backward, they cost nothing but cache misses on every
  // further tile.
  // Of weights that are not near, more than a few rows share a reading that costs as much as two.
  const bool near = weights <= kept * split;
  const auto readings_of = [&](int64_t rows) {
    return near || rows <= 8 || in.element_size == 2 ? (rows + 3) / 4 : 2 * ((rows + 35) / 36);
  };
  const int64_t tiles = in.steps * readings_of(rows_here);
  const int64_t input_tiles = plan.fused_input ? tiles : readings_of(in.steps * rows_here);
  const int64_t readings = near ? 2 : weights < (4 << 20) * split ? 4 : 6;
  plan.unpacked_weights =
      in.backward ? in.rows <= 16
                  : tiles * recurrent + input_tiles * (weights - recurrent) <= readings * weights;
  // Rows are taken in blocks by whoever is free: on a machine with other work, threads differ.
  // Matrix registers want more of them at a time.
  const int64_t rows_at_a_time = in.element_size == 2 ? 48 : 24;
  const int64_t turns = recurrent > kept / 4 ? 1 : in.batch / (rows_at_a_time * team) + 1;
  plan.row_block = plan.split_units ? in.batch : (in.batch + turns * team - 1) / (turns * team);
  const int64_t block = std::min(plan.row_block, rows_here);
  const int64_t row_bytes = std::max<int64_t>(G * H / split * in.element_size, 1);
  // A chunk stays in the cache beside resident weights; others are read again for each chunk, which
  // then has rows enough to repay it.
  const int64_t chunk_rows =
      std::max((256 << 10) / row_bytes, recurrent / split > kept ? int64_t(128) : int64_t(1));
  plan.input_chunk = std::clamp<int64_t>(chunk_rows / std::max<int64_t>(block, 1), 1, in.steps);
  // Enough rows for the weight gradients to be a deep product; twice as many where they come from
  // memory each time.
  // A power of two splits evenly. Each block costs a gradient of all weights.
  constexpr int64_t kLeastRows = 60, kGradients = 4 << 20;
  int64_t blocks = 1;
  if (weights <= kept)
    while (blocks < Plan::kMaxBlocks && in.batch >= 2 * blocks * kLeastRows &&
           2 * blocks * weights <= kGradients)
      blocks *= 2;
  plan.wgrad_rows = (in.batch + blocks - 1) / blocks;
  const int64_t wanted = weights > (4 << 20) || plan.wgrad_rows < in.batch ? 512 : 256;
  plan.wgrad_chunk =
      std::clamp<int64_t>(wanted / std::max<int64_t>(plan.wgrad_rows, 1), 1, in.steps);
  return plan;
}

}  // namespace rnnkern
