// Picks the instruction set, and starts a call: plan, then the engine of that instruction set.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../engine.h"
#include "arm_features.h"

namespace rnnkern {

namespace baseline {
extern const Engine engine;
}
namespace baseline_bf16 {
extern const KernelTable<bfloat16> engine;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Engine engine;
}
namespace avx512 {
extern const Engine engine;
}
namespace avx512_bf16 {
extern const KernelTable<bfloat16> engine;
}
namespace avx512_amx {
extern const KernelTable<bfloat16> engine;
}
#elif defined(__aarch64__)
namespace neon {
extern const Engine engine;
}
namespace neon_bf16 {
extern const KernelTable<bfloat16> engine;
}
#endif

namespace {

Engine with_bf16(Engine engine, const char* name, const KernelTable<bfloat16>& bf16) {
  engine.name = name;
  engine.bf16 = bf16;
  return engine;
}

#if defined(__x86_64__)
// AMX tiles enlarge a thread's state so much that Linux requires a request for them.
bool may_use_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Levels {
  const Engine* engines[6];
  int count = 0;
  const Engine* chosen;

  Levels() {
    // First, so that it is never the fastest: it emulates the instructions, for tests.
    static const Engine emulated =
        with_bf16(baseline::engine, "baseline_bf16", baseline_bf16::engine);
    engines[count++] = &emulated;
    engines[count++] = &baseline::engine;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      engines[count++] = &avx2::engine;
    if (count == 3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      static const Engine pairs = with_bf16(avx512::engine, "avx512_bf16", avx512_bf16::engine);
      static const Engine matrices = with_bf16(avx512::engine, "avx512_amx", avx512_amx::engine);
      const bool has_pairs = __builtin_cpu_supports("avx512bf16");
      // On Intel, vdpbf16ps has half the throughput of FMA.
      const bool slow = __builtin_cpu_is("intel");
      if (has_pairs && slow) engines[count++] = &pairs;
      engines[count++] = &avx512::engine;
      if (has_pairs && !slow) engines[count++] = &pairs;
      if (has_pairs && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
          may_use_amx())
        engines[count++] = &matrices;
    }
#elif defined(__aarch64__)
    static const Engine pairs = with_bf16(neon::engine, "neon_bf16", neon_bf16::engine);
    engines[count++] = &neon::engine;
    if (has_arm_bf16()) engines[count++] = &pairs;
#endif
    chosen = engines[count - 1];
    const char* name = std::getenv("RNNKERN_CPU");
    if (name && *name && !select(name)) throw std::invalid_argument(refusal(name));
  }

  std::string refusal(const char* name) const {
    std::string text = std::string("RNNKERN_CPU=") + name + " is no level of this CPU: it has ";
    for (int i = 0; i < count; ++i) text += std::string(i ? ", " : "") + engines[i]->name;
    return text;
  }

  bool select(const char* name) {
    for (int i = 0; i < count; ++i)
      if (!std::strcmp(engines[i]->name, name)) {
        chosen = engines[i];
        return true;
      }
    return false;
  }
};

Levels& levels() {
  static Levels instance;
  return instance;
}

template <class T>
PlanInput plan_input(const LayerParams<T>& p, bool backward, int threads) {
  PlanInput in{};
  in.steps = p.sequence.steps, in.batch = p.sequence.batch, in.rows = p.sequence.rows();
  in.input_size = p.input_size, in.hidden_size = p.hidden_size, in.proj_size = p.proj_size;
  in.directions = p.directions, in.element_size = sizeof(T);
  in.backward = backward, in.threads = threads;
  in.prepacked = p.prepacked, in.int8 = p.weight_format() == WeightFormat::int8;
  const CellFacts& facts = *cell_facts(p.cell);
  in.gates = facts.gates, in.preacts = facts.preacts, in.heads = p.heads;
  in.given_sums = facts.input == Input::given, in.whole_rows = facts.normalizes;
  return in;
}

template <class T>
ForwardParams<T> of_layer(const LayerParams<T>& layer) {
  ForwardParams<T> p{};
  static_cast<LayerParams<T>&>(p) = layer;
  return p;
}

}  // namespace

const Engine* const* available_engines(int* count) {
  *count = levels().count;
  return levels().engines;
}

const Engine& engine() { return *levels().chosen; }

bool select_engine(const char* name) { return levels().select(name); }

template <class T>
size_t prepacked_bytes(const LayerParams<T>& layer, WeightFormat format) {
  PrepackedHeader header{};
  header.format = format;
  ForwardParams<T> p = of_layer(layer);
  p.prepacked = &header;
  return engine_of(p.cell).template of<T>().prepack(p, nullptr);
}

template <class T>
void prepack(const LayerParams<T>& layer, WeightFormat format, int tag, void* memory) {
  auto* const header = new (memory) PrepackedHeader{};
  header->magic = PrepackedHeader::kMagic;
  std::strncpy(header->level, engine_of(layer.cell).name, sizeof header->level - 1);
  header->cell = int32_t(layer.cell), header->directions = layer.directions;
  header->element_size = sizeof(T), header->format = format, header->tag = tag;
  header->input_size = layer.input_size, header->hidden_size = layer.hidden_size;
  header->proj_size = layer.proj_size, header->heads = layer.heads;
  ForwardParams<T> p = of_layer(layer);
  p.prepacked = header;
  header->bytes = int64_t(engine_of(p.cell).template of<T>().prepack(p, header));
}

const char* prepacked_refusal(const void* memory, size_t bytes) {
  const auto* const header = static_cast<const PrepackedHeader*>(memory);
  if (bytes < sizeof *header || header->magic != PrepackedHeader::kMagic)
    return "no prepacked weights";
  if (size_t(header->bytes) > bytes) return "prepacked weights were cut";
  if (reinterpret_cast<uintptr_t>(memory) % PrepackedHeader::kAlignment)
    return "prepacked weights are not aligned to 64 bytes";
  if (!cell_facts(header->cell)) return "the weights are of a cell that this process does not have";
  if (std::strcmp(header->level, engine_of(CellId(header->cell)).name) != 0)
    return "the weights were packed at another instruction-set level";
  return nullptr;
}

template <class T>
Plan plan_forward(const ForwardParams<T>& p, int threads) {
  return make_plan(plan_input(p, false, threads));
}

template <class T>
void forward(const ForwardParams<T>& p, const ParallelFor& parallel, int threads) {
  const Plan plan = plan_forward(p, threads);
  engine_of(p.cell).template of<T>().forward(p, plan, parallel, Workspace::of_this_thread());
}

template <class T>
void backward(const BackwardParams<T>& p, const ParallelFor& parallel, int threads) {
  const Plan plan = make_plan(plan_input(p, true, threads));
  engine_of(p.cell).template of<T>().backward(p, plan, parallel, Workspace::of_this_thread());
}

template size_t prepacked_bytes(const LayerParams<float>&, WeightFormat);
template size_t prepacked_bytes(const LayerParams<double>&, WeightFormat);
template size_t prepacked_bytes(const LayerParams<bfloat16>&, WeightFormat);
template void prepack(const LayerParams<float>&, WeightFormat, int, void*);
template void prepack(const LayerParams<double>&, WeightFormat, int, void*);
template void prepack(const LayerParams<bfloat16>&, WeightFormat, int, void*);
template Plan plan_forward(const ForwardParams<float>&, int);
template Plan plan_forward(const ForwardParams<double>&, int);
template Plan plan_forward(const ForwardParams<bfloat16>&, int);
template void forward(const ForwardParams<float>&, const ParallelFor&, int);
template void forward(const ForwardParams<double>&, const ParallelFor&, int);
template void forward(const ForwardParams<bfloat16>&, const ParallelFor&, int);
template void backward(const BackwardParams<float>&, const ParallelFor&, int);
template void backward(const BackwardParams<double>&, const ParallelFor&, int);
template void backward(const BackwardParams<bfloat16>&, const ParallelFor&, int);

}  // namespace rnnkern
