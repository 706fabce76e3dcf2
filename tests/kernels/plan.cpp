// Unit tests of the plan, without torch: which rule fires for which shape on a machine with a
// budget of 640 KB per L2, and what holds for every shape. And of the blocks that a ragged batch is
// cut into. Built and run by test_plan.py.
#include "../../csrc/cpu/runtime/plan.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/core/layer_params.h"

using namespace rnnkern;

namespace {

int failures = 0;

void check(bool holds, const char* what, const char* name) {
  if (!holds) std::printf("%s: %s\n", name, what), ++failures;
}

constexpr Machine kMachine{&kTunings[1], 640 << 10};
constexpr Machine kQuotaOfTwo{&kTunings[1], 640 << 10, false, 2};

struct LstmCall {
  int64_t steps, batch, input_size, hidden_size, proj_size = 0;
  bool backward = false;
  int threads = 2, directions = 1, element_size = 4;
  bool prepacked = false, int8 = false;
  int64_t heads = 1;

  PlanInput input() const {
    return {steps,      batch,        steps * batch, input_size, hidden_size, proj_size, 4,    4,
            directions, element_size, backward,      threads,    prepacked,   int8,      heads};
  }
};

struct Expected {
  const char* name;
  LstmCall call;
  int threads;
  bool split_units, fused_input, unpacked_weights;
  int64_t wgrad_rows, wgrad_chunk;
  PlanRules rules;
};

constexpr char kAllThreads[] = "work for all threads",
               kQuota[] = "as many threads as the CPU quota",
               kFewRows[] = "few rows: threads by the weights they read",
               kOneThread[] = "one thread", kNoBarrier[] = "rows need no barrier",
               kRecurrent[] = "recurrent weights exceed the L2 budget",
               kTooFewRows[] = "too few rows for the threads", kFewSteps[] = "few steps",
               kNarrow[] = "narrow input", kAllFit[] = "all weights fit the L2 budget",
               kNoProduct[] = "no recurrent product to join",
               kAhead[] = "ahead of the step, in chunks of time", kPacked[] = "packed",
               kPackedBefore[] = "packed before", kInt8[] = "int8 weights",
               kUnpacked[] = "too few passes over the weights to repay packing",
               kOneBlock[] = "one block of rows", kFew[] = "few rows",
               kBlocks[] = "small layer, large batch: blocks of rows";

// The columns: threads, units split, input fused, weights unpacked, wgrad rows and steps.
const Expected kExpected[] = {
    {"large",
     {64, 32, 512, 512},
     2,
     true,
     false,
     false,
     32,
     16,
     {kAllThreads, kRecurrent, kAhead, kPacked, kOneBlock}},
    {"large, many rows",
     {64, 128, 512, 512},
     2,
     false,
     false,
     false,
     128,
     4,
     {kAllThreads, kNoBarrier, kAhead, kPacked, kOneBlock}},
    {"small, large batch",
     {.steps = 50, .batch = 1000, .input_size = 32, .hidden_size = 32, .backward = true},
     2,
     false,
     true,
     false,
     63,
     8,
     {kAllThreads, kNoBarrier, kAllFit, kPacked, kBlocks}},
    {"one step",
     {1, 1, 64, 128},
     1,
     false,
     true,
     true,
     1,
     1,
     {kFewRows, kOneThread, kFewSteps, kUnpacked, kOneBlock}},
    {"one step, prepacked",
     {.steps = 1, .batch = 1, .input_size = 64, .hidden_size = 128, .prepacked = true},
     1,
     false,
     true,
     false,
     1,
     1,
     {kFewRows, kOneThread, kFewSteps, kPackedBefore, kOneBlock}},
    {"int8 weights",
     {.steps = 64,
      .batch = 1,
      .input_size = 64,
      .hidden_size = 128,
      .threads = 1,
      .prepacked = true,
      .int8 = true},
     1,
     false,
     true,
     false,
     1,
     64,
     {kAllThreads, kOneThread, kInt8, kPackedBefore, kOneBlock}},
    {"narrow input",
     {200, 1, 3, 65},
     2,
     true,
     true,
     false,
     1,
     200,
     {kAllThreads, kTooFewRows, kNarrow, kPacked, kOneBlock}},
    {"few rows, many threads",
     {.steps = 1, .batch = 9, .input_size = 512, .hidden_size = 1024, .threads = 8},
     8,
     true,
     true,
     true,
     9,
     1,
     {kAllThreads, kTooFewRows, kFewSteps, kUnpacked, kOneBlock}},
    {"projection",
     {50, 40, 64, 512, 16},
     2,
     false,
     false,
     false,
     40,
     6,
     {kAllThreads, kNoBarrier, kAhead, kPacked, kOneBlock}},
    {"no recurrent product",
     {.steps = 1, .batch = 32, .input_size = 64, .hidden_size = 128, .threads = 1, .heads = 0},
     1,
     false,
     false,
     false,
     32,
     1,
     {kAllThreads, kOneThread, kNoProduct, kPacked, kOneBlock}},
    {"backward of one step",
     {.steps = 1, .batch = 16, .input_size = 64, .hidden_size = 64, .backward = true, .threads = 1},
     1,
     false,
     true,
     true,
     16,
     1,
     {kAllThreads, kOneThread, kFewSteps, kFew, kOneBlock}},
};

void check_expected(const Expected& e) {
  const Plan plan = make_plan(e.call.input(), kMachine);
  check(plan.threads == e.threads, "threads", e.name);
  check(plan.split_units == e.split_units, "split_units", e.name);
  check(plan.fused_input == e.fused_input, "fused_input", e.name);
  check(plan.unpacked_weights == e.unpacked_weights, "unpacked_weights", e.name);
  check(plan.wgrad_rows == e.wgrad_rows, "wgrad_rows", e.name);
  check(plan.wgrad_chunk == e.wgrad_chunk, "wgrad_chunk", e.name);
  check(!std::strcmp(plan.rules.threads, e.rules.threads), plan.rules.threads, e.name);
  check(!std::strcmp(plan.rules.split, e.rules.split), plan.rules.split, e.name);
  check(!std::strcmp(plan.rules.input, e.rules.input), plan.rules.input, e.name);
  check(!std::strcmp(plan.rules.weights, e.rules.weights), plan.rules.weights, e.name);
  check(!std::strcmp(plan.rules.wgrad, e.rules.wgrad), plan.rules.wgrad, e.name);
}

// What every plan must fulfil. The weight gradients' blocks and chunks decide the order of sums, so
// they may not depend on the number of threads.
void check_any(LstmCall call) {
  const Plan one = make_plan(call.input(), kMachine);
  for (const int threads : {1, 2, 3, 8, 64}) {
    call.threads = threads;
    const Plan plan = make_plan(call.input(), kMachine);
    const auto within = [](int64_t x, int64_t most) { return 1 <= x && x <= most; };
    check(within(plan.threads, threads), "threads out of range", "any");
    check(within(plan.row_block, call.batch), "row_block out of range", "any");
    check(within(plan.input_chunk, call.steps), "input_chunk out of range", "any");
    check(within(plan.wgrad_chunk, call.steps), "wgrad_chunk out of range", "any");
    check(within(plan.blocks(call.batch), Plan::kMaxBlocks), "too many blocks", "any");
    check(plan.wgrad_rows == one.wgrad_rows && plan.wgrad_chunk == one.wgrad_chunk,
          "the order of sums depends on the threads", "any");
    check(threads > 1 || !plan.split_units, "one thread splits units", "any");
  }
}

// Blocks have a batch row each, cover the batch, and begin as near to equal numbers of rows as a
// batch row allows.
void check_blocks(std::vector<int64_t> lengths, int64_t blocks) {
  std::sort(lengths.rbegin(), lengths.rend());
  std::vector<int64_t> offsets{0};
  for (int64_t t = 0; t < lengths[0]; ++t)
    offsets.push_back(offsets.back() + std::count_if(lengths.begin(), lengths.end(),
                                                     [&](int64_t length) { return length > t; }));
  const Sequence sequence{lengths[0], int64_t(lengths.size()), offsets.data()};
  int64_t begin = 0, before = 0, largest = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    check(sequence.block_begin(i, blocks) == begin, "a block begins before the last one", "blocks");
    const int64_t end = sequence.block_begin(i + 1, blocks);
    check(begin < end && end <= sequence.batch, "an empty block", "blocks");
    if (begin >= end) return;
    const double wanted = double(sequence.rows()) * double(i) / double(blocks);
    const double off = double(before) - wanted, row = double(lengths[size_t(begin)]);
    check(begin == i || (-row / 2 - 1 <= off && off <= double(lengths[size_t(begin - 1)]) / 2 + 1),
          "blocks of unequal rows", "blocks");
    for (largest = std::max(largest, end - begin); begin < end; ++begin)
      before += lengths[size_t(begin)];
  }
  check(begin == sequence.batch, "batch rows without a block", "blocks");
  check(sequence.largest_block(blocks) == largest, "largest_block", "blocks");
}

// A quota is a number of cores: fewer threads with the same sums.
void check_quota() {
  LstmCall call{100, 32, 128, 256};
  for (const int threads : {1, 2, 8}) {
    call.threads = threads;
    const Plan plan = make_plan(call.input(), kQuotaOfTwo);
    check(plan.threads == std::min(threads, 2), "threads", "quota");
    check(!std::strcmp(plan.rules.threads, threads > 2 ? kQuota : kAllThreads), plan.rules.threads,
          "quota");
  }
}

}  // namespace

int main() {
  for (const Expected& e : kExpected) check_expected(e);
  check_quota();
  std::mt19937 random(0);
  const auto pick = [&](int most) { return std::uniform_int_distribution<int>(1, most)(random); };
  for (int i = 0; i < 2000; ++i) {
    LstmCall call{pick(300), pick(1500), pick(600), pick(900)};
    call.heads = i % 5 ? 1 : 0;
    call.backward = i % 2, call.directions = pick(2), call.element_size = 1 << pick(3);
    check_any(call);
    std::vector<int64_t> lengths(size_t(pick(40)));
    const int steps = pick(60);
    for (int64_t& length : lengths) length = i % 3 ? pick(steps) : 1;
    lengths[0] = steps;
    check_blocks(lengths, pick(int(lengths.size())));
  }
  if (!failures) std::puts("no finding");
  return failures != 0;
}
