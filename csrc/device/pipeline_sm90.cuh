// SPDX-License-Identifier: MIT
// What the loading and the computing warps of a block share.
//
// A block has two halves, each with a ring, four computing and four loading warps. They are two workers
// that take items of 16 or 64 query rows of their own, or join for an item of 128: then each half loads
// every other tile and computes 64 of the rows with all tiles.
//
// Loading warp w brings slice w of every entry of its half; computing warp w is its partner. In a shared
// run an entry is one tile: the computing warps wait for all of it (`entry_full`) and each of them
// releases every slice. In private runs a slice belongs to one computing warp: it waits for
// `slice_full` and releases it with the weight of all.
//
// A thread counts the phases of the barriers it waits for in a bit mask, so that stages may be skipped:
// every wide item starts at stage 0, wherever the warps' private runs have ended.
#pragma once

#include <cstddef>

#include "slice.cuh"

#if defined(PAT_PATH_SM90)

namespace pat {

inline constexpr int kHalves = 2;
inline constexpr int kHalfThreads = kWarps * 32;             // of one role
inline constexpr int kThreads = 2 * kHalves * kHalfThreads;  // [role][half][warp][lane]
inline constexpr int kBlocksPerSm = 1;
inline constexpr int kWorkers = kHalves;           // of a block
inline constexpr int kLoaderArrivals = 33;         // 32 lanes' copies, and lane 0's word about them
inline constexpr int kReaders = kHalves * kWarps;  // weight with which a slice is released

inline constexpr int kHalfBytes = 113 * 1024;
inline constexpr int kBarrierBytes = 1024;
inline constexpr int kFit = (kHalfBytes - kBarrierBytes) / kEntryBytes - 1;
inline constexpr int kStages = kFit < 8 ? kFit : 8;
static_assert(kStages % 2 == 0 && kStages >= 4, "K at even stages, V at odd ones");

/// What a loading warp tells its partner about the next item, beside Q. piece -1: no item is left.
struct alignas(16) Box {
  int32_t piece, tokens, query_rows, first_entry;
  int32_t head_offset, is_chain;
  // Every other chain starts with its private runs: shared runs come from L2, private ones from
  // device memory, and both should be busy all the time.
  int32_t private_first, unused;
};

/// Barriers and messages of one pair of warps.
struct PairShared {
  uint64_t slice_full[kStages], slice_empty[kStages];
  uint64_t q_full, q_empty;
  Box box;
  int32_t slices[kStages];  // words of the slices, see Slice
};

/// Of one half, behind its Q and its ring. Everything is reached by its 32-bit address: a base in one
/// register and offsets in the instructions.
struct HalfShared {
  PairShared pairs[kWarps];
  uint64_t entry_full[kStages];
  uint64_t q_full;
  int32_t drawn;
};
static_assert(sizeof(HalfShared) <= kBarrierBytes);
inline constexpr int kSharedBytes = kHalves * kHalfBytes;
static_assert(kSharedBytes <= 227 * 1024, "what a block may have");
static_assert(kHalfBytes % 1024 == 0, "WGMMA's swizzle repeats every 1024 bytes");

/// [Q][ring][HalfShared] of one half.
class Half {
 public:
  __device__ Half(uint32_t shared, int half) : base_(shared + half * kHalfBytes) {}

  __device__ uint32_t q() const { return base_; }
  __device__ uint32_t entry(int stage) const { return base_ + (stage + 1) * kEntryBytes; }
  __device__ uint32_t entry_full(int stage) const {
    return base_ + kOffset + offsetof(HalfShared, entry_full) + stage * 8;
  }
  __device__ uint32_t q_full() const { return base_ + kOffset + offsetof(HalfShared, q_full); }
  __device__ uint32_t drawn() const { return base_ + kOffset + offsetof(HalfShared, drawn); }
  __device__ uint32_t pair(int warp) const {
    return base_ + kOffset + offsetof(HalfShared, pairs) + warp * sizeof(PairShared);
  }

 private:
  static constexpr uint32_t kOffset = kHalfBytes - kBarrierBytes;
  uint32_t base_;
};

/// One pair of a half.
class Pair {
 public:
  __device__ Pair(const Half& half, int warp) : base_(half.pair(warp)) {}

  __device__ uint32_t slice_full(int stage) const {
    return base_ + offsetof(PairShared, slice_full) + stage * 8;
  }
  __device__ uint32_t slice_empty(int stage) const {
    return base_ + offsetof(PairShared, slice_empty) + stage * 8;
  }
  __device__ uint32_t slice(int stage) const {
    return base_ + offsetof(PairShared, slices) + stage * 4;
  }
  __device__ uint32_t q_full() const { return base_ + offsetof(PairShared, q_full); }
  __device__ uint32_t q_empty() const { return base_ + offsetof(PairShared, q_empty); }
  __device__ uint32_t box() const { return base_ + offsetof(PairShared, box); }

 private:
  uint32_t base_;
};

/// Query row of the item where the fragment of a pair starts.
template <typename Config>
__device__ __forceinline__ int32_t first_row(int half, int warp) {
  if constexpr (!Config::kWide) return 0;
  return ((Config::kRowBlocks == 2 ? half * kWarps : 0) + warp) * kFragmentRows;
}

/// By one thread, before a barrier of the whole block.
__device__ __forceinline__ void init_barriers(uint32_t shared) {
  for (int h = 0; h < kHalves; ++h) {
    const Half half(shared, h);
    for (int w = 0; w < kWarps; ++w) {
      const Pair pair(half, w);
      for (int s = 0; s < kStages; ++s) {
        ptx::barrier_init(pair.slice_full(s), kLoaderArrivals);
        ptx::barrier_init(pair.slice_empty(s), kReaders);
      }
      ptx::barrier_init(pair.q_full(), kLoaderArrivals);
      ptx::barrier_init(pair.q_empty(), kWarps);
    }
    for (int s = 0; s < kStages; ++s) {
      ptx::barrier_init(half.entry_full(s), kWarps * kLoaderArrivals);
    }
    ptx::barrier_init(half.q_full(), kWarps * kLoaderArrivals);
  }
}

/// Position in the ring, with the parity of the phase that comes next of each stage's barrier.
class RingPosition {
 public:
  __device__ int stage() const { return stage_; }
  __device__ uint32_t parity() const { return parities_ >> stage_ & 1; }
  __device__ void advance() {
    parities_ ^= 1u << stage_;
    stage_ = stage_ == kStages - 1 ? 0 : stage_ + 1;
  }
  __device__ void restart() { stage_ = 0; }
  __device__ void go_to(int stage) { stage_ = stage; }

 private:
  int stage_ = 0;
  uint32_t parities_ = 0;
};

}  // namespace pat

#endif
