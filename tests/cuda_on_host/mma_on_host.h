// mma_sync of csrc/cuda/mma.h on the simulated chip: the last lane to arrive computes for its warp.
#pragma once
#include "machine.h"

namespace rnnkern::cuda {
namespace on_host {

// acc += a b of all lanes, laid out as csrc/cuda/mma.h draws it.
template <class T>
void mma_of_warp(Warp& warp) {
  using Row [[gnu::vector_size(32)]] = float;
  constexpr int P = 4 / int(sizeof(T));  // elements of a register
  const auto element = [](uint32_t reg, int i) {
    if constexpr (sizeof(T) == 4) {
      reg &= 0xffffe000u;  // of a float the matrix units take 11 significant bits
      float value;
      memcpy(&value, &reg, sizeof value);
      return value;
    } else {
      const auto bits = uint16_t(reg >> 16 * i);
      T value;
      memcpy(&value, &bits, sizeof value);
      return static_cast<float>(value);
    }
  };
  float a[16][8 * P];
  Row b[8 * P], acc[16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4 * P; ++i)
      a[g + i / P % 2 * 8][q * P + i / P / 2 * 4 * P + i % P] =
          element(warp.a[lane].reg[i / P], i % P);
    for (int i = 0; i < 2 * P; ++i)
      b[q * P + i / P * 4 * P + i % P][g] = element(warp.b[lane].reg[i / P], i % P);
    for (int i = 0; i < 4; ++i) acc[g + i / 2 * 8][2 * q + i % 2] = warp.acc[lane][i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8 * P; ++k) acc[row] += a[row][k] * b[k];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      warp.acc[lane][i] = acc[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

}  // namespace on_host

template <class T>
inline void mma_sync(float (&acc)[4], const U32x4& a, const U32x2& b) {
  on_host::Warp& warp = on_host::warp();
  const int lane = thread_index() % 32;
  warp.a[lane] = a;
  warp.b[lane] = b;
  memcpy(warp.acc[lane], acc, sizeof acc);
  if (warp.product.arrived == 31) on_host::mma_of_warp<T>(warp);
  on_host::arrive_and_wait(warp.product, on_host::kMma);
  memcpy(acc, warp.acc[lane], sizeof acc);
}

}  // namespace rnnkern::cuda
