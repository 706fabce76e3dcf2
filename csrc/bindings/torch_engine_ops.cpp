// What the engine says of itself, as operators: its levels, its cells, its limit, its plans.
// clang-format off
#include "call.h"  // before torch's headers, which report errors by it
// clang-format on
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <tuple>
#include <vector>

#include "../core/cell_table.h"
#include "../cpu/engine.h"
#include "../cpu/runtime/plan_resets.h"

namespace {

using namespace rnnkern;

std::string info() {
  int count;
  const Engine* const* engines = available_engines(&count);
  std::string levels;
  for (int i = 0; i < count; ++i)
    levels += std::string(i ? ", " : "") + "\"" + engines[i]->name + "\"";
  return std::string("{\"isa\": \"") + engine().name + "\", \"available\": [" + levels +
         "], \"vector_bytes\": " + std::to_string(engine().vector_bytes) +
         ", \"threads\": " + std::to_string(torch::stable::get_num_threads()) + "}";
}

// The machine's limit: float32 fused multiply-adds per second on `threads` threads, in GFLOP/s.
double peak(int64_t threads) {
  const Engine& level = engine();
  const auto time_once = [&] {
    std::vector<double> work(threads, 0.);
    const auto start = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work[i] = level.peak_fma_loop(1'000'000);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double sum = 0;
    for (double w : work) sum += w;
    return sum / seconds.count() * 1e-9;
  };
  double best = 0;
  for (int i = 0; i < 5; ++i) best = std::max(best, time_once());
  return best;
}

// How a call with resets would run: "mask" or "episodes", and the rule.
std::tuple<std::string, std::string> plan_resets_op(int64_t steps, int64_t batch,
                                                    int64_t hidden_size, int64_t episodes) {
  const ResetsPlan plan = plan_resets(steps, batch, hidden_size, episodes);
  return {plan.mask ? "mask" : "episodes", plan.rule};
}

// How a call would be cut, as JSON.
std::string plan_op(int64_t cell, int64_t steps, int64_t batch, int64_t input_size,
                    int64_t hidden_size, int64_t proj_size, int64_t directions,
                    int64_t element_size, bool backward, int64_t threads, int64_t heads) {
  const CellFacts* const facts = cell_facts(cell);
  STD_TORCH_CHECK(facts, "rnnkern: no cell ", cell);
  const bool as_they_are = supports<bfloat16>(CellId(cell), input_size, hidden_size, proj_size);
  if (element_size == 2 && !as_they_are) element_size = sizeof(float);
  PlanInput in{steps,     batch,        steps * batch,  input_size,      hidden_size,
               proj_size, facts->gates, facts->preacts, int(directions), int(element_size),
               backward,  int(threads)};
  in.heads = facts->recurrent == Recurrent::none ? 0 : heads;
  in.given_sums = facts->input == Input::given, in.whole_rows = facts->normalizes;
  const Plan plan = make_plan(in);
  const auto text = [](const char* s) { return std::string("\"") + s + '"'; };
  const PlanRules& rules = plan.rules;
  return "{\"threads\": " + std::to_string(plan.threads) + ", \"split\": \"" +
         (plan.split_units ? "units" : "rows") +
         "\", \"fused_input\": " + (plan.fused_input ? "true" : "false") +
         ", \"unpacked_weights\": " + (plan.unpacked_weights ? "true" : "false") +
         ", \"row_block\": " + std::to_string(plan.row_block) +
         ", \"input_chunk\": " + std::to_string(plan.input_chunk) +
         ", \"wgrad_rows\": " + std::to_string(plan.wgrad_rows) +
         ", \"wgrad_chunk\": " + std::to_string(plan.wgrad_chunk) +
         ", \"rule\": {\"threads\": " + text(rules.threads) + ", \"split\": " + text(rules.split) +
         ", \"input\": " + text(rules.input) + ", \"weights\": " + text(rules.weights) +
         ", \"wgrad\": " + text(rules.wgrad) + "}}";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnnkern, CompositeExplicitAutograd, m) {
  m.impl("info", TORCH_BOX(&info));
  m.impl("cells", TORCH_BOX(&cell_table));
  m.impl("peak", TORCH_BOX(&peak));
  m.impl("plan", TORCH_BOX(&plan_op));
  m.impl("plan_resets", TORCH_BOX(&plan_resets_op));
}
