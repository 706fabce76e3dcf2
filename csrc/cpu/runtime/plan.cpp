#include "plan.h"

#include <algorithm>

#include "plan_resets.h"

namespace rnnkern {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Choice {
  T value;
  const char* rule;

  T with(const char*& to) const {
    to = rule;
    return value;
  }
};

// Each function that returns a choice decides one part of the plan. Its first rule that fires wins.
class Planner {
 public:
  Planner(const PlanInput& in, const Machine& machine)
      : in_(in),
        tuning_(*machine.tuning),
        l2_(machine.l2_budget_bytes),
        quota_(machine.cpu_quota) {
    const int64_t H = in.hidden_size, P = in.proj_size;
    const int64_t input = in.given_sums ? 0 : in.gates * H * in.input_size;
    const int64_t columns = in.heads ? (P ? P : H) / in.heads : 0;  // of W_hh
    const int64_t recurrent = in.gates * H * columns + P * H;
    recurrent_ = recurrent * in.element_size;
    weights_ = input * in.element_size + recurrent_;
    fmas_ = double(in.rows) * in.directions * double(input + recurrent) * (in.backward ? 2 : 1) +
            double(in.rows) * in.directions * in.preacts * double(H) * tuning_.fmas_per_gate;
  }

  Plan plan() {
    Plan plan{};
    PlanRules& rules = plan.rules;
    plan.threads = threads().with(rules.threads);
    team_ = plan.team(in_.directions);
    rows_per_thread_ = in_.batch / team_;
    plan.split_units = splits_units().with(rules.split);
    shares_ = plan.split_units ? team_ : 1;
    rows_ = plan.split_units ? in_.batch : std::max<int64_t>(rows_per_thread_, 1);
    plan.fused_input = fuses_input().with(rules.input);
    plan.unpacked_weights =
        (in_.backward ? unpacked_backward() : unpacked_forward(plan.fused_input))
            .with(rules.weights);
    plan.row_block = plan.split_units ? in_.batch : row_block();
    plan.input_chunk = input_chunk(std::min(plan.row_block, rows_));
    plan.wgrad_rows = ceil_div(in_.batch, wgrad_blocks().with(rules.wgrad));
    plan.wgrad_chunk = wgrad_chunk(plan.wgrad_rows);
    return plan;
  }

 private:
  Choice<int> threads() const {
    const bool few = in_.rows <= tuning_.few_rows;
    const double worth = few ? tuning_.fmas_per_thread_few_rows : tuning_.fmas_per_thread;
    const bool limited = quota_ > 0 && quota_ < in_.threads;
    const int allowed = limited ? quota_ : in_.threads;
    const int64_t rows = in_.whole_rows ? in_.batch * in_.directions : allowed;
    const int most = int(std::clamp<int64_t>(rows, 1, allowed));
    const int threads = int(std::clamp<double>(fmas_ / worth, 1, most));
    if (threads == most && most < allowed)
      return {threads, "a thread per row: rows are normalised"};
    if (threads == most)
      return {threads, limited ? "as many threads as the CPU quota" : "work for all threads"};
    if (few) return {threads, "few rows: threads by the weights they read"};
    return {threads, "threads by multiply-adds"};
  }

  Choice<bool> splits_units() const {
    if (team_ == 1) return {false, "one thread"};
    if (in_.whole_rows) return {false, "rows are normalised"};
    if (rows_per_thread_ < tuning_.min_rows_per_thread)
      return {true, "too few rows for the threads"};
    if (recurrent_ > l2_ && rows_per_thread_ < tuning_.max_rows_split_units)
      return {true, "recurrent weights exceed the L2 budget"};
    return {false, "rows need no barrier"};
  }

  Choice<bool> fuses_input() const {
    if (in_.int8) return {true, "int8 weights"};
    if (in_.given_sums) return {true, "the input's sums are given"};
    if (!in_.heads) return {false, "no recurrent product to join"};
    if (in_.steps <= tuning_.fused_max_steps && in_.batch >= in_.steps) return {true, "few steps"};
    if (in_.input_size <= tuning_.fused_max_inputs) return {true, "narrow input"};
    if (rows_ >= tuning_.fused_min_rows && weights_ / shares_ <= l2_)
      return {true, "all weights fit the L2 budget"};
    return {false, "ahead of the step, in chunks of time"};
  }

  Choice<bool> unpacked_backward() const {
    if (in_.rows <= tuning_.unpacked_max_rows_backward) return {true, "few rows"};
    return {false, "packed"};
  }

  // Unpacked weights are read once per tile: of rows, and for the input ahead of the step of steps
  // and rows. Packing costs some such passes, the more, the farther the packed copy is.
  Choice<bool> unpacked_forward(bool fused_input) const {
    if (in_.prepacked) return {false, "packed before"};
    const int64_t tiles = in_.steps * passes(rows_);
    const int64_t input_tiles = fused_input ? tiles : passes(in_.steps * rows_);
    if (tiles * recurrent_ + input_tiles * (weights_ - recurrent_) <= max_passes() * weights_)
      return {true, "too few passes over the weights to repay packing"};
    return {false, "packed"};
  }

  int64_t max_passes() const {
    if (in_l2()) return tuning_.unpacked_max_passes_l2;
    const bool in_memory = weights_ >= tuning_.memory_bytes * shares_;
    return in_memory ? tuning_.unpacked_max_passes_memory : tuning_.unpacked_max_passes_l3;
  }
  // Passes over unpacked weights for so many rows: one per 4 rows (kUnpackedMR). Above 8 rows of
  // float, weights outside the L2 are transposed once per 36 rows (kMC), which costs two passes.
  int64_t passes(int64_t rows) const {
    if (in_l2() || rows <= 8 || in_.element_size == 2) return ceil_div(rows, 4);
    return 2 * ceil_div(rows, 36);
  }
  bool in_l2() const { return weights_ <= l2_ * shares_; }

  // Threads take blocks as they are free: on a machine with other work, threads differ. Weights
  // that would leave the L2 with each block are read by one block per thread.
  int64_t row_block() const {
    const int64_t rows = in_.element_size == 2 ? tuning_.row_block_bf16 : tuning_.row_block;
    const int64_t turns = recurrent_ > l2_ / 4 ? 1 : in_.batch / (rows * team_) + 1;
    return ceil_div(in_.batch, turns * team_);
  }

  int64_t input_chunk(int64_t block) const {
    const int64_t preacts = in_.gates * in_.hidden_size / shares_;
    const int64_t row_bytes = std::max<int64_t>(preacts * in_.element_size, 1);
    const bool resident = recurrent_ / shares_ <= l2_;
    const int64_t rows = std::max(tuning_.input_chunk_bytes / row_bytes,
                                  resident ? int64_t(1) : tuning_.input_chunk_min_rows);
    return std::clamp<int64_t>(rows / std::max<int64_t>(block, 1), 1, in_.steps);
  }

  // A power of two, which threads split evenly.
  Choice<int64_t> wgrad_blocks() const {
    int64_t blocks = 1;
    if (weights_ <= l2_)
      while (blocks < Plan::kMaxBlocks && in_.batch >= 2 * blocks * tuning_.wgrad_min_block_rows &&
             2 * blocks * weights_ <= tuning_.wgrad_max_block_bytes)
        blocks *= 2;
    return {blocks, blocks > 1 ? "small layer, large batch: blocks of rows" : "one block of rows"};
  }

  int64_t wgrad_chunk(int64_t rows) const {
    const bool memory = weights_ > tuning_.memory_bytes || rows < in_.batch;
    const int64_t wanted = memory ? tuning_.wgrad_chunk_rows_memory : tuning_.wgrad_chunk_rows;
    return std::clamp<int64_t>(wanted / std::max<int64_t>(rows, 1), 1, in_.steps);
  }

  const PlanInput& in_;
  const Tuning& tuning_;
  const int64_t l2_;
  const int quota_;
  int64_t recurrent_, weights_;  // bytes: read at every step; and all
  double fmas_;
  int team_;                 // threads of one direction
  int64_t rows_per_thread_;  // if they split the rows
  int64_t shares_, rows_;    // parts of the weights, and a thread's rows
};

}  // namespace

ResetsPlan plan_resets(int64_t steps, int64_t batch, int64_t hidden_size, int64_t episodes) {
  // One measurement's numbers, those of Tuning's generic row.
  constexpr int64_t kEpisodesPerRow = 4, kRows = 2, kUnitsOfRow = 64 << 10;
  constexpr int64_t kRowsLarge = 4, kUnitsLarge = 512;
  const bool long_rows = batch <= kRows && steps * hidden_size >= kUnitsOfRow;
  const bool large = batch <= kRowsLarge && hidden_size >= kUnitsLarge;
  if (episodes < kEpisodesPerRow * batch) return {true, "few episodes"};
  if (long_rows) return {false, "few long rows: episodes run side by side"};
  if (large) return {false, "few rows, large weights: episodes run side by side"};
  return {true, "rows enough"};
}

Plan make_plan(const PlanInput& in, const Machine& machine) { return Planner(in, machine).plan(); }

}  // namespace rnnkern
