// AMX tiles: one tdpbf16ps multiplies up to 16 rows of 16 bf16 pairs by 16 vectors of a panel, in
// the time of a dozen vector FMAs.
//
//   tmm0..6   C (accumulators) or A: `rows` rows of 64 bytes
//   tmm7      B: kAmxK rows of 64 bytes, a kAmxK x 16 block of a packed panel
//
// Levels compiled with RNNKERN_AMX have them. Without the instructions, plain code emulates them
// for tests: the same sums in the same order.
#pragma once
#include "vec.h"

namespace rnnkern::RNNKERN_ISA {

#if defined(RNNKERN_AMX)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif

constexpr int kAmxRows = 16;
constexpr int kAmxK = 16;  // packed elements: 32 bf16

// k rounded down, and up, to whole tiles.
constexpr int64_t amx_whole_k(int64_t depth) { return depth / kAmxK * kAmxK; }
constexpr int64_t amx_padded_k(int64_t depth) { return amx_whole_k(depth + kAmxK - 1); }

#if defined(RNNKERN_AMX)

constexpr int kTileB = 7;

#if defined(__AMX_BF16__)
class AmxTiles {
 public:
  // RAII: this thread may use the tiles while one exists. The destructor releases them, so that the
  // kernel need not save them on a context switch.
  AmxTiles() { configured_rows() = 0; }
  ~AmxTiles() {
    if (configured_rows()) asm volatile("tilerelease");
  }
  AmxTiles(const AmxTiles&) = delete;

  // A change costs as much as a dozen tdpbf16ps.
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
  template <int kTile>
  RNNKERN_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Loads rows with a stride in bytes.
  template <int kTile>
  RNNKERN_INLINE static void load(const void* data, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  RNNKERN_INLINE static void store(float* data, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(kTile) : "memory");
  }
  // C += A B, with B in kTileB
  template <int kC, int kA>
  RNNKERN_INLINE static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kTileB));
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
  template <int kTile>
  static void zero() {
    std::memset(of_this_thread().c[kTile], 0, sizeof of_this_thread().c[kTile]);
  }
  template <int kTile>
  static void load(const float* data, int64_t stride) {
    for (int r = 0; r < of_this_thread().rows; ++r)
      std::memcpy(of_this_thread().c[kTile][r], reinterpret_cast<const char*>(data) + r * stride,
                  kBytes);
  }
  template <int kTile>
  static void load(const bf16x2* data, int64_t stride) {
    constexpr bool kPanel = kTile == kTileB;
    for (int r = 0; r < (kPanel ? kAmxK : of_this_thread().rows); ++r)
      std::memcpy(of_this_thread().ab[kTile][r], reinterpret_cast<const char*>(data) + r * stride,
                  kPanel ? kBytes : kAmxK * sizeof(bf16x2));
  }
  template <int kTile>
  static void store(float* data, int64_t stride) {
    for (int r = 0; r < of_this_thread().rows; ++r)
      std::memcpy(reinterpret_cast<char*>(data) + r * stride, of_this_thread().c[kTile][r], kBytes);
  }
  template <int kC, int kA>
  static void multiply() {
    File& file = of_this_thread();
    for (int r = 0; r < file.rows; ++r)
      for (int c = 0; c < kLanes; ++c) {
        float first = 0, second = 0;
        for (int k = 0; k < kAmxK; ++k) {
          const bf16x2 a = file.ab[kA][r][k], b = file.ab[kTileB][k][c];
          first += to_acc(a.first) * to_acc(b.first);
          second += to_acc(a.second) * to_acc(b.second);
        }
        file.c[kC][r][c] += first + second;
      }
  }

 private:
  struct File {
    int rows;
    float c[kTileB][kAmxRows][kLanes];
    bf16x2 ab[kTileB + 1][kAmxRows][kAmxK];
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
