// int8 products of the level `neon`: with SDOT and without it the integers of a plain loop, scaled.
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cpu/gemm/gemm_int8.h"

namespace {

using namespace rnnkern;
using namespace rnnkern::RNNKERN_ISA;

constexpr int kRows = 5, kNR = 4, kColumns = kNR * Vec<float>::kLanes;
constexpr int64_t kLanes = 37;  // of k

std::mt19937 random_engine(0);

// The extremes often: four of their products, and then sums, are what could overflow.
std::vector<int8_t> random_bytes(int64_t count) {
  std::vector<int8_t> values(count);
  for (int8_t& v : values) {
    const int x = std::uniform_int_distribution<int>(-250, 250)(random_engine);
    v = int8_t(x < -127 ? -127 : x > 127 ? 127 : x);
  }
  return values;
}

template <class Dot>
int wrong_sums(const std::vector<int8_t>& a, const std::vector<int8_t>& b) {
  std::vector<int32_t> rows(kRows * kLanes), panel(kLanes * kColumns), sums(kColumns);
  std::memcpy(rows.data(), a.data(), a.size());
  std::memcpy(panel.data(), b.data(), b.size());
  std::vector<float> ones(rows.size(), 1.f), c(kRows * kColumns);
  gemm_int8_rows<Dot>(kRows, kNR, {rows.data(), ones.data(), kLanes},
                      {panel.data(), ones.data(), sums.data()}, 0, kLanes,
                      {nullptr, 0, c.data(), kColumns});
  int wrong = 0;
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t column = 0; column < kColumns; ++column) {
      int32_t exact = 0;
      for (int64_t k = 0; k < kLanes; ++k)
        for (int64_t i = 0; i < kInt8K; ++i)
          exact += a[(r * kLanes + k) * kInt8K + i] * b[(k * kColumns + column) * kInt8K + i];
      wrong += c[r * kColumns + column] != float(exact);
    }
  return wrong;
}

}  // namespace

int main() {
  const auto a = random_bytes(kRows * kLanes * kInt8K),
             b = random_bytes(kColumns * kLanes * kInt8K);
  const int without = wrong_sums<NoVnni>(a, b);
  const int with = this_machine().has_vnni ? wrong_sums<Vnni>(a, b) : 0;
  std::printf("int8: %d sums differ without SDOT, %d with it%s\n", without, with,
              this_machine().has_vnni ? "" : " (which this CPU lacks)");
  return without + with > 0;
}
