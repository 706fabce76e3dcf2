// Matrix registers (Intel's AMX): one instruction multiplies up to 16 rows of 16 pairs of bfloat16
// by 16 vectors of a panel, in the time of a dozen multiply-adds of one vector.
//
// Levels compiled with RNNKERN_AMX have them; where the instructions are not there, in plain code,
// for tests: the same sums in the same order.
#pragma once
#include "simd.h"

namespace rnnkern::RNNKERN_ISA {

#if defined(RNNKERN_AMX)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif

constexpr int kAmxRows = 16;
constexpr int kAmxK = 16;  // factors

// What they multiply of a depth, and a depth that is filled up for them.
constexpr int64_t amx_whole_k(int64_t depth) { return depth / kAmxK * kAmxK; }
constexpr int64_t amx_padded_k(int64_t depth) { return amx_whole_k(depth + kAmxK - 1); }

#if defined(RNNKERN_AMX)

// Registers 0 to 6 are sums or left operands of as many rows as set; 7 is a block of a panel.
constexpr int kTileB = 7;

#if defined(__AMX_BF16__)
class AmxTiles {
 public:
  // While one lives, this thread may use the registers; in the end they are as never used, so that
  // the system need not save them.
  AmxTiles() { configured_rows() = 0; }
  ~AmxTiles() {
    if (configured_rows()) asm volatile("tilerelease");
  }
  AmxTiles(const AmxTiles&) = delete;

  // Costs as much as a dozen products, if it changes anything.
  static void configure(int rows) {
    if (rows == configured_rows()) return;
    configured_rows() = rows;
    struct {
      uint8_t palette = 1, unused[15] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = uint8_t(i == kTileB ? kAmxK : rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  template <int kRegister>
  RNNKERN_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
  }
  // Rows of sums or of factors, with a stride in bytes.
  template <int kRegister>
  RNNKERN_INLINE static void load(const void* data, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(kRegister)
                 : "memory");
  }
  template <int kRegister>
  RNNKERN_INLINE static void store(float* data, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(kRegister)
                 : "memory");
  }
  // sums += left panel
  template <int kSums, int kLeft>
  RNNKERN_INLINE static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kTileB));
  }

 private:
  static int& configured_rows() {
    static thread_local int rows;
    return rows;
  }
};
#else
class AmxTiles {
  static constexpr int kLanes = Vec<float>::kLanes;

 public:
  static void configure(int rows) { of_this_thread().rows = rows; }
  template <int kRegister>
  static void zero() {
    std::memset(of_this_thread().sums[kRegister], 0, sizeof of_this_thread().sums[kRegister]);
  }
  template <int kRegister>
  static void load(const float* data, int64_t stride) {
    for (int r = 0; r < of_this_thread().rows; ++r)
      std::memcpy(of_this_thread().sums[kRegister][r],
                  reinterpret_cast<const char*>(data) + r * stride, kBytes);
  }
  template <int kRegister>
  static void load(const bf16x2* data, int64_t stride) {
    constexpr bool kPanel = kRegister == kTileB;
    for (int r = 0; r < (kPanel ? kAmxK : of_this_thread().rows); ++r)
      std::memcpy(of_this_thread().factors[kRegister][r],
                  reinterpret_cast<const char*>(data) + r * stride,
                  kPanel ? kBytes : kAmxK * sizeof(bf16x2));
  }
  template <int kRegister>
  static void store(float* data, int64_t stride) {
    for (int r = 0; r < of_this_thread().rows; ++r)
      std::memcpy(reinterpret_cast<char*>(data) + r * stride, of_this_thread().sums[kRegister][r],
                  kBytes);
  }
  template <int kSums, int kLeft>
  static void multiply() {
    File& file = of_this_thread();
    for (int r = 0; r < file.rows; ++r)
      for (int c = 0; c < kLanes; ++c) {
        float first = 0, second = 0;
        for (int k = 0; k < kAmxK; ++k) {
          const bf16x2 a = file.factors[kLeft][r][k], b = file.factors[kTileB][k][c];
          first += value(a.first) * value(b.first);
          second += value(a.second) * value(b.second);
        }
        file.sums[kSums][r][c] += first + second;
      }
  }

 private:
  struct File {
    int rows;
    float sums[kTileB][kAmxRows][kLanes];
    bf16x2 factors[kTileB + 1][kAmxRows][kAmxK];
  };
  static File& of_this_thread() {
    static thread_local File file;
    return file;
  }
};
#endif

#else
class AmxTiles {};
#endif

}  // namespace rnnkern::RNNKERN_ISA
