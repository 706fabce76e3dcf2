// Packing weights once for many forward passes.
#pragma once
#include <cstdlib>

#include "forward.h"

namespace rnnkern::RNNKERN_ISA {

// Packs the weights of all directions behind the header, where a ForwardCall then finds them; with
// a null header only counts. Returns the bytes.
template <class Cell, class T>
size_t prepack(const ForwardParams<T>& p, PrepackedHeader* to) {
  using Shared = typename ForwardDirection<Cell, T>::Shared;
  const Plan plan{};
  Arena packed = prepacked_weights(to), counted(nullptr), unused(nullptr);
  if (Cell::kRecurrent == Recurrent::heads && to) Shared(p, plan, unused, counted, 0);
  const struct Block {
    void* data;
    ~Block() { std::free(data); }
  } block{counted.used() ? allocate_block(counted.used()) : nullptr};
  for (int d = 0; d < p.directions; ++d) {
    Arena scratch(block.data);
    Shared shared(p, plan, packed, scratch, d);
    if (!to) continue;
    shared.weights.pack(0, gate_layout<Cell, T>(p.hidden_size).count());
    if constexpr (ForwardDirection<Cell, T>::kProjects)
      if (p.proj_size) shared.projection.pack(Team{0, 1, nullptr});
  }
  StepMasks<Acc<T>, Cell::kMasks>::prepack(p, to, packed);
  return sizeof(PrepackedHeader) + packed.used();
}

}  // namespace rnnkern::RNNKERN_ISA
