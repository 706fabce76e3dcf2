// Drives the CPU engine with random layers on buffers of exactly the sizes that layer_params.h
// states, so that a sanitizer sees every access. Asserts that results do not depend on the number
// of threads. run.sh builds it and runs it at every level that the CPU has.
//
//   engine [layers at each level] [folder]
//
// With a folder, the results of a level go into the file <folder>/<level>: for each array the bytes
// of an element, the bytes of all, and these. Every level has the same layers.
#include "../../csrc/cpu/engine.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/runtime/stream.h"
#include "../../csrc/cpu/runtime/thread_pool.h"

using namespace rnnkern;

namespace {

std::mt19937 random_engine(0);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_engine); }

template <class T>
std::vector<T> normal(int64_t count) {
  std::normal_distribution<Acc<T>> distribution(0, Acc<T>(0.5));
  std::vector<T> values(count);
  for (T& v : values) {
    const Acc<T> x = distribution(random_engine);
    if constexpr (kVnniFactor<T> > 1)
      v = {uint16_t(std::bit_cast<uint32_t>(x) >> 16)};
    else
      v = x;
  }
  return values;
}

template <class T>
std::string bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// Memory that ends where the weights end, so that a sanitizer sees what reads past them.
struct AlignedBytes {
  explicit AlignedBytes(size_t bytes)
      : data(std::aligned_alloc(PrepackedHeader::kAlignment, (bytes + 63) / 64 * 64)) {}
  ~AlignedBytes() { std::free(data); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  void* data;
};

std::FILE* results = nullptr;

void record(const std::string& array, int64_t element_size) {
  if (!results) return;
  const int64_t sizes[] = {element_size, int64_t(array.size())};
  std::fwrite(sizes, sizeof sizes, 1, results);
  std::fwrite(array.data(), array.size(), 1, results);
}

[[noreturn]] void finding(const char* what) {
  std::printf("%s: %s\n", engine().name, what);
  std::exit(1);
}

// The layer on prepacked weights, all at once and as a stream in two parts: the results of `f`,
// which has run, where the weights keep their type; with bfloat16 and int8 weights any, but the
// same.
template <class T>
void run_prepacked(const ForwardParams<T>& f, int threads) {
  const int64_t rows = f.sequence.rows(), B = f.sequence.batch, R = f.h_size();
  const std::vector<T> wanted(f.y.data, f.y.data + rows * f.directions * R);
  const int formats = std::is_same_v<T, float> ? 3 : 1;
  for (int format = 0; format < formats; ++format) {
    const auto as = WeightFormat(format);
    const AlignedBytes memory(prepacked_bytes<T>(f, as));
    prepack<T>(f, as, 0, memory.data);
    const auto* const weights = static_cast<const PrepackedHeader*>(memory.data);
    std::vector<T> y(wanted.size()), h_n(f.directions * B * R);
    std::vector<Acc<T>> c_n(f.directions * B * f.hidden_size);
    ForwardParams<T> p = f;
    p.prepacked = weights;
    for (Weights<T>& w : p.weights) w = {};
    p.y.data = y.data(), p.saved = nullptr, p.c_states = nullptr;
    p.h_n = h_n.data(), p.c_n = f.c_n ? c_n.data() : nullptr;
    forward(p, kOwnThreads, threads);
    if (format == 0 && bytes(y) != bytes(wanted)) finding("prepacked weights change the results");
    if (f.sequence.offsets || f.directions > 1 || f.h0 || f.resets.data) continue;
    // bfloat16 rounds h between runs.
    const int64_t T_ = f.sequence.steps, part = sizeof(T) == 2 ? T_ : pick(0, int(T_) - 1);
    std::vector<T> streamed(y.size());
    const auto stream = Stream::create({weights}, B, threads);
    if (part) stream->run(kOwnThreads, f.x.data, part, streamed.data());
    if (part < T_)
      stream->run(kOwnThreads, f.x.data + part * B * f.input_size, T_ - part,
                  streamed.data() + part * B * R);
    if (bytes(streamed) != bytes(y)) finding("a stream changes the results");
    stream->reset(B - 1);
  }
}

template <class T>
void run_case() {
  using S = Acc<T>;
  const int even = kVnniFactor<T>;  // what sizes are multiples of
  const auto cell = CellId(pick(0, kCellCount - 1));
  const CellFacts& facts = *cell_facts(cell);
  const int64_t G = facts.gates, V = facts.saved;
  const bool has_c = facts.states > 1, projects = facts.projects;
  int64_t T_ = pick(1, 9), I = even * pick(1, 40), D = pick(1, 2);
  int64_t H = even * (pick(0, 5) ? pick(1, 70) : 64 * pick(1, 3));  // above 64 in blocks of columns
  int64_t B = pick(0, 9) ? pick(1, 20) : pick(140, 300);            // many rows: blocks of rows
  // Now and then a single step with weights that exceed the cache.
  if (!pick(0, 14)) T_ = D = 1, H = even * pick(400, 600), B = pick(9, 40);
  const int64_t P = projects && even == 1 && pick(0, 1) ? pick(0, int(H) - 1) : 0, R = P ? P : H;
  const bool packed = pick(0, 1), bias = pick(0, 1), state = pick(0, 1);
  // What params.h lets be null besides: each alone, and all of the weights' gradients together.
  const bool dy_given = pick(0, 3), dh_given = pick(0, 3), dc_given = pick(0, 3);
  const bool dx_wanted = pick(0, 3), states_wanted = pick(0, 3), grads_wanted = pick(0, 3);
  const bool flow_wanted = pick(0, 1), inference = pick(0, 3) == 0;
  std::vector<int64_t> offsets{0};
  for (int64_t t = 0, active = B; t < T_; ++t) {
    if (t) active = pick(1, int(active));
    offsets.push_back(offsets.back() + active);
  }
  const int64_t rows = packed ? offsets.back() : T_ * B;
  // Resets, of a mask by step or by row, to zeros, or to states of a layer, a row or a step.
  const bool resets = !packed && D == 1 && pick(0, 1), mask_by_row = pick(0, 1);
  const int density = pick(0, 3), form = pick(0, 3);
  const int64_t reset_b = form > 1, reset_t = form > 2 ? B : 0;  // strides, in rows of a state
  std::vector<uint8_t> mask(rows);
  for (uint8_t& m : mask) m = pick(0, 3) < density;

  const auto x = normal<T>(rows * I), h0 = normal<T>(D * B * R), c0 = normal<S>(D * B * H);
  const auto reset_h = normal<T>(((T_ - 1) * reset_t + (B - 1) * reset_b + 1) * R);
  const auto reset_c = normal<S>(((T_ - 1) * reset_t + (B - 1) * reset_b + 1) * H);
  const auto dy = normal<T>(rows * D * R);
  const auto dh_n = normal<S>(D * B * R), dc_n = normal<S>(D * B * H);
  std::vector<std::vector<T>> weights;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t size : {G * H * I, G * H * R, G * H, G * H, P * H})
      weights.push_back(normal<T>(size));

  const auto run = [&](int threads) {
    std::vector<T> y(rows * D * R), h_n(D * B * R), saved(D * rows * V * H);
    std::vector<S> c_n(D * B * H), cells(D * rows * H), dx(rows * I), dh_0(D * B * R),
        dc_0(D * B * H), dreset_h((reset_t ? T_ : 1) * B * R), dreset_c(dreset_h.size() / R * H),
        flow_h(D * rows * R), flow_c(D * rows * H);
    std::vector<std::vector<S>> grads;
    for (const auto& w : weights) grads.emplace_back(w.size());
    LayerParams<T> layer{};
    layer.cell = cell;
    layer.sequence = {T_, B, packed ? offsets.data() : nullptr};
    layer.input_size = I, layer.hidden_size = H, layer.proj_size = P, layer.directions = int(D);
    layer.x = {x.data(), B * I, I};
    for (int64_t d = 0; d < D; ++d) {
      const auto* w = &weights[5 * d];
      layer.weights[d] = {w[0].data(),
                          w[1].data(),
                          bias ? w[2].data() : nullptr,
                          bias ? w[3].data() : nullptr,
                          P ? w[4].data() : nullptr,
                          nullptr};
    }
    layer.h0 = state ? h0.data() : nullptr;
    layer.c0 = state && has_c ? c0.data() : nullptr;
    if (resets) {
      layer.resets = {mask.data(), mask_by_row ? 1 : B, mask_by_row ? T_ : 1};
      if (form) layer.reset_h = {reset_h.data(), reset_t * R, reset_b * R};
      if (form && has_c) layer.reset_c = {reset_c.data(), reset_t * H, reset_b * H};
    }
    ForwardParams<T> f{};
    static_cast<LayerParams<T>&>(f) = layer;
    f.y = {y.data(), B * D * R, D * R};
    f.h_n = h_n.data(), f.c_n = has_c ? c_n.data() : nullptr;
    f.saved = V ? saved.data() : nullptr, f.c_states = has_c ? cells.data() : nullptr;
    forward(f, kOwnThreads, threads);
    if (inference) {  // the same results with nothing saved
      const auto with_saved = std::pair(bytes(y), bytes(h_n));
      f.saved = nullptr, f.c_states = nullptr;
      forward(f, kOwnThreads, threads);
      if (std::pair(bytes(y), bytes(h_n)) != with_saved) {
        std::printf("%s: saving changes the results\n", engine().name);
        std::exit(1);
      }
      f.saved = V ? saved.data() : nullptr, f.c_states = has_c ? cells.data() : nullptr;
    }
    run_prepacked(f, threads);
    BackwardParams<T> b{};
    static_cast<LayerParams<T>&>(b) = layer;
    b.y = {y.data(), B * D * R, D * R};
    b.saved = f.saved, b.c_states = f.c_states;
    if (dy_given) b.dy = {dy.data(), B * D * R, D * R};
    b.dh_n = dh_given ? dh_n.data() : nullptr;
    b.dc_n = has_c && dc_given ? dc_n.data() : nullptr;
    if (dx_wanted) b.dx = {dx.data(), B * I, I};
    b.dh_0 = states_wanted ? dh_0.data() : nullptr;
    b.dc_0 = has_c && states_wanted ? dc_0.data() : nullptr;
    for (int64_t d = 0; grads_wanted && d < D; ++d) {
      auto* g = &grads[5 * d];
      b.grads[d] = {g[0].data(),
                    g[1].data(),
                    bias ? g[2].data() : nullptr,
                    bias ? g[3].data() : nullptr,
                    P ? g[4].data() : nullptr,
                    nullptr};
    }
    if (resets && form && states_wanted) {
      b.dreset_h = {dreset_h.data(), reset_t * R, R};
      if (has_c) b.dreset_c = {dreset_c.data(), reset_t * H, H};
    }
    b.flow_h = flow_wanted ? flow_h.data() : nullptr;
    b.flow_c = has_c && flow_wanted ? flow_c.data() : nullptr;
    backward(b, kOwnThreads, threads);
    std::vector<std::string> all{bytes(y), bytes(h_n), bytes(saved)};  // of T, the others of S
    for (const auto* found : {&c_n, &dx, &dh_0, &dc_0, &dreset_h, &dreset_c, &flow_h, &flow_c})
      all.push_back(bytes(*found));
    for (const auto& grad : grads) all.push_back(bytes(grad));
    return all;
  };

  const auto one = run(1);
  for (size_t i = 0; i < one.size(); ++i) record(one[i], i < 3 ? sizeof(T) : sizeof(S));
  for (int threads : {2, 3})
    if (run(threads) != one) {
      std::printf(
          "%s, %zu bytes: %d threads differ: cell %d T %ld B %ld I %ld H %ld P %ld D %ld packed "
          "%d resets %d\n",
          engine().name, sizeof(T), threads, int(cell), T_, B, I, H, P, D, packed, resets);
      std::exit(1);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  int count;
  const Engine* const* engines = available_engines(&count);
  for (int i = 0; i < count; ++i) {
    select_engine(engines[i]->name);
    random_engine.seed(0);
    if (argc > 2)
      results = std::fopen((std::string(argv[2]) + "/" + engines[i]->name).c_str(), "wb");
    for (int k = 0; k < cases; ++k)
      if (engine().bf16.forward)  // which is all that such a level adds to another
        run_case<bfloat16>();
      else
        k % 2 ? run_case<float>() : run_case<double>();
    if (results) std::fclose(results);
    std::printf("%s: %d layers, no finding\n", engines[i]->name, cases);
  }
}
