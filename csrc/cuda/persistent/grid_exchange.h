// The exchange of blocks anywhere on the GPU, all of which run at once: through global memory, that
// is through the L2. No barrier of the grid and no fence: each 16 bytes say themselves which step
// they are for, and the receiver reads them until they do.
//
//   forward, T of two bytes; a warp's 32 values of h are 16 words, in 6 vectors of 16 bytes:
//
//     vector     0             1             …   5
//     words      0  1  2  i    3  4  5  i        15  –  –  i        i: number of the step
//
//   backward; a lane's four sums of a tile, for the block that owns the units, in one vector:
//
//     s0 s1 s2 s3              the lowest bit of s0 is the round's
//
// 16 bytes are written and read as one: .b128, which PTX promises is one access. There is memory
// for two steps, as in the cluster. Step i reads buffer i % 2 and fills the other; that was read by
// every block before it sent what this block has received. A vector of the round before last lies
// where one is awaited, or 0 if none has come yet: so one bit tells rounds apart backward.
//
//   i          1  2  3  4  5  6
//   buffer     1  0  1  0  1  0
//   bit        1  1  0  0  1  1
//
// The first float of a vector loses half a unit of its last place to that bit. What is infinite
// there may become NaN, never finite.
#pragma once
#include "block_exchange.h"

namespace rnnkern::cuda {

// Words of a warp's 32 values of h, and the vectors that bring them.
template <class T>
constexpr int kHWords = kWarpSize * int(sizeof(T)) / 4;
template <class T>
constexpr int kHVectors = (kHWords<T> + 2) / 3;

// Those of a block.
template <class T, class Config>
constexpr int kBlockHVectors = Config::kBlockElems / kWarpSize * kHVectors<T>;

// Bytes for a group, for both steps.
template <class T, class Config>
constexpr int64_t grid_h_bytes(int blocks) {
  return int64_t(2) * blocks * kBlockHVectors<T, Config> * int64_t(sizeof(U32x4));
}
template <class Config>
constexpr int64_t grid_dh_bytes(int blocks) {
  return int64_t(2) * blocks * blocks * Config::kBlockElems * int64_t(sizeof(float));
}

// Of the sums that are sent for step i.
RNNKERN_DEVICE uint32_t round_bit(int64_t i) { return uint32_t((i - 1) / 2 + 1) & 1u; }

template <class T, class Config>
struct GridExchange {
  static constexpr int kHBuffers = 1, kDhBuffers = 1, kBarriers = 0;
  static constexpr int kMaxSenders = Config::kWarps;  // their sums, added up already
  static constexpr int kInFlight = 8;                 // vectors that a thread loads at once

  U32x4* memory;  // of this group
  int blocks, thread, lane;

  RNNKERN_DEVICE_MEMBER GridExchange(uint64_t* /*barriers*/, void* of_group, int /*sent*/)
      : memory(static_cast<U32x4*>(of_group)),
        blocks(blocks_in_group()),
        thread(thread_index()),
        lane(thread % kWarpSize) {}

  RNNKERN_DEVICE_MEMBER void init() const { sync_block(); }

  RNNKERN_DEVICE_MEMBER U32x4* h_vectors(int64_t i) const {
    return memory + buffer_of(i) * blocks * kBlockHVectors<T, Config>;
  }

  RNNKERN_DEVICE_MEMBER void send_h(T* /*h*/, int64_t i, int first, const T* staged) const {
    if (lane >= kHVectors<T>) return;
    U32x4 vector = {};
    RNNKERN_UNROLL
    for (int w = 0; w < 3; ++w)
      if (const int word = lane * 3 + w; word < kHWords<T>)
        memcpy(&vector.reg[w], reinterpret_cast<const char*>(staged) + word * 4, 4);
    vector.reg[3] = uint32_t(i);
    store_relaxed(h_vectors(i) + first / kWarpSize * kHVectors<T> + lane, vector);
  }

  // h of all units for step i > 0, to shared memory.
  RNNKERN_DEVICE_MEMBER void receive_h(T* h, int64_t i) const {
    constexpr int kOfBlock = kBlockHVectors<T, Config>;
    constexpr int kMost = (Config::kMaxBlocks * kOfBlock + Config::kThreads - 1) / Config::kThreads;
    const U32x4* const from = h_vectors(i);
    const int count = blocks * kOfBlock;
    receive<kMost>(
        ~0u, uint32_t(i), 3, [&](int j) { return from + j * Config::kThreads + thread; },
        [&](int j) { return j * Config::kThreads + thread < count; },
        [&](int j, const U32x4& vector) {
          const int at = j * Config::kThreads + thread;
          const int first = at % kHVectors<T> * 3;
          char* const to = reinterpret_cast<char*>(h + at / kHVectors<T> * kWarpSize) + first * 4;
          RNNKERN_UNROLL
          for (int w = 0; w < 3; ++w)
            if (first + w < kHWords<T>) memcpy(to + w * 4, &vector.reg[w], 4);
        });
    sync_block();
  }

  // Those for a block's tile, by sender and lane.
  RNNKERN_DEVICE_MEMBER U32x4* dh_vectors(int64_t i, int block, int tile) const {
    const int at = (buffer_of(i) * blocks + block) * Config::kBlockTiles + tile;
    return memory + int64_t(at) * blocks * kWarpSize + lane;
  }

  RNNKERN_DEVICE_MEMBER void send_dh(float* /*sums*/, int64_t i, int block, int tile,
                                     U32x4 value) const {
    value.reg[0] = (value.reg[0] & ~1u) | round_bit(i);
    store_relaxed(dh_vectors(i, block, tile) + block_rank_in_group() * kWarpSize, value);
  }

  // Each warp adds up those of every kWarps-th sender, in order.
  RNNKERN_HD static int senders(int /*blocks*/) { return kMaxSenders; }
  RNNKERN_DEVICE_MEMBER void receive_dh(float* sums, int64_t i) const {
    constexpr int kMost = (Config::kMaxBlocks + Config::kWarps - 1) / Config::kWarps;
    const int warp = thread / kWarpSize;
    RNNKERN_UNROLL
    for (int tile = 0; tile < Config::kBlockTiles; ++tile) {
      const U32x4* const from = dh_vectors(i, block_rank_in_group(), tile);
      float sum[4] = {};
      receive<kMost>(
          1u, round_bit(i), 0,
          [&](int j) { return from + (j * Config::kWarps + warp) * kWarpSize; },
          [&](int j) { return j * Config::kWarps + warp < blocks; },
          [&](int, const U32x4& vector) {
            float value[4];
            memcpy(value, vector.reg, sizeof(value));
            RNNKERN_UNROLL
            for (int k = 0; k < 4; ++k) sum[k] += value[k];
          });
      *dh_vector<Config>(sums, warp, tile) = as_u32x4(sum);
    }
    sync_block();
  }

  RNNKERN_DEVICE_MEMBER void finish() const {}

 private:
  // take(j, vector) for the vectors at(j) that are there, j < Most, each once the bits of `mask` in
  // its word `tag` are `awaited`. All of a few are asked for before the first is waited for.
  template <int Most, class At, class There, class Take>
  RNNKERN_DEVICE_MEMBER static void receive(uint32_t mask, uint32_t awaited, int tag, At&& at,
                                            There&& there, Take&& take) {
    RNNKERN_UNROLL
    for (int first = 0; first < Most; first += kInFlight) {
      U32x4 vectors[kInFlight];
      RNNKERN_UNROLL
      for (int j = 0; j < kInFlight; ++j)
        if (first + j < Most && there(first + j)) vectors[j] = load_relaxed(at(first + j));
      RNNKERN_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        if (first + j >= Most || !there(first + j)) continue;
        while ((vectors[j].reg[tag] & mask) != awaited) {
          pause_polling(&at(first + j)->reg[tag], mask, awaited);
          vectors[j] = load_relaxed(at(first + j));
        }
        take(first + j, vectors[j]);
      }
    }
  }
};

}  // namespace rnnkern::cuda
