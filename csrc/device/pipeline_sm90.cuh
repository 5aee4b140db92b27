// SPDX-License-Identifier: MIT
// What the loading and the computing warps of a block share.
//
// A block has two halves, each with a ring, four computing and four loading warps. They are two workers
// that take pieces of their own, or join for an item of 128 query rows: then each half loads every
// other tile and computes 64 of the rows with all tiles.
//
// Loading warp w brings slice w of every entry of its half; computing warp w is its partner. For wide
// tiles an entry of a shared run is one tile: the computing warps wait for all of it (`entry_full`)
// and release all of it (`entry_empty`). Everything else is streams of slices, each of one pair of
// warps (`slice_full`, `slice_empty`). A private run of a wide tile has its rows' tokens; the four
// streams of a narrow item have the same rows and share the tokens, and the four states are combined
// at the end.
//
// A thread counts the phases of the barriers it waits for in a bit mask, so that stages may be skipped:
// a shared run in entries starts at stage 0, wherever the warps' streams have ended.
#pragma once

#include <cstddef>

#include "combine.cuh"
#include "slice.cuh"

#if defined(PAT_PATH_SM90)

namespace pat {

inline constexpr int kHalves = 2;
inline constexpr int kHalfThreads = kWarps * 32;             // of one role
inline constexpr int kThreads = 2 * kHalves * kHalfThreads;  // [role][half][warp][lane]
inline constexpr int kBlocksPerSm = 1;
inline constexpr int kWorkers = kHalves;           // of a block
inline constexpr int kLoaderArrivals = 33;         // 32 lanes' copies, and lane 0's word about them
inline constexpr int kReaders = kHalves * kWarps;  // of an entry, at most; its barrier counts them

// Lanes of a warp that arrive when it has read something. Behind __syncwarp() one speaks for all, but
// compute-sanitizer's racecheck only follows the lane that arrives: a build for it has all of them do so.
#if defined(PAT_EVERY_LANE_ARRIVES)
inline constexpr int kReleases = 32;
#else
inline constexpr int kReleases = 1;
#endif
__device__ __forceinline__ bool releases(int lane) { return kReleases == 32 || lane == 0; }

inline constexpr int kHalfBytes = 113 * 1024;
inline constexpr int kFit = kHalfBytes / kEntryBytes - 1;  // beside Q
inline constexpr int kStages = kFit < 8 ? kFit : 8;
static_assert(kStages % 2 == 0 && kStages >= 4, "K at even stages, V at odd ones");

/// One of two stretches of an item.
enum Phase : int32_t { kNothing, kSharedRun, kStreams };

/// What the loading warps tell the computing ones about the next item, beside Q.
struct alignas(16) Box {
  int32_t piece, tokens, query_rows, first_entry;  // piece -1: none is left
  int32_t head_offset, tile;
  Phase phases[2];  // in this order
};
static_assert(sizeof(Box) == 32);

/// Barriers and messages of one pair of warps.
struct PairShared {
  uint64_t slice_full[kStages], slice_empty[kStages];
  int32_t slices[kStages];  // words of the slices, see Slice
  uint32_t sent_slice;      // address, of a narrow item
  SentState sent;
};

/// Of one half, behind its Q and its ring. Everything is reached by its 32-bit address: a base in one
/// register and offsets in the instructions.
struct HalfShared {
  PairShared pairs[kWarps];
  uint64_t entry_full[kStages], entry_empty[kStages];
  uint64_t q_full, q_empty;
  Box boxes[2];                 // in turn: one is read until its item is done
  int32_t drawn[kNumTiles][2];  // pieces, in turn
};
inline constexpr int kHalfSharedOffset = (kStages + 1) * kEntryBytes;
static_assert(kHalfSharedOffset + sizeof(HalfShared) <= kHalfBytes);
// Behind both halves: of each loading warp the slots of the slice at hand.
inline constexpr int kSlotsOffset = kHalves * kHalfBytes;
inline constexpr int kSlotsBytes = kSliceTokens * sizeof(int32_t);
inline constexpr int kSharedBytes = kSlotsOffset + kHalves * kWarps * kSlotsBytes;
static_assert(kSharedBytes <= 227 * 1024, "what a block may have");
static_assert(kHalfBytes % 1024 == 0, "WGMMA's swizzle repeats every 1024 bytes");

/// [Q][ring][HalfShared] of one half.
class Half {
 public:
  __device__ Half(uint32_t shared, int half) : base_(shared + half * kHalfBytes) {}

  __device__ uint32_t q() const { return base_; }
  __device__ uint32_t entry(int stage) const { return base_ + (stage + 1) * kEntryBytes; }
  __device__ uint32_t entry_full(int stage) const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, entry_full) + stage * 8;
  }
  __device__ uint32_t entry_empty(int stage) const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, entry_empty) + stage * 8;
  }
  __device__ uint32_t q_full() const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, q_full);
  }
  __device__ uint32_t q_empty() const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, q_empty);
  }
  __device__ uint32_t box(int turn) const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, boxes) + turn * sizeof(Box);
  }
  __device__ uint32_t drawn(int tile, int turn) const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, drawn) + tile * 8 + turn * 4;
  }
  __device__ uint32_t pair(int warp) const {
    return base_ + kHalfSharedOffset + offsetof(HalfShared, pairs) + warp * sizeof(PairShared);
  }

 private:
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
  __device__ uint32_t sent_slice() const { return base_ + offsetof(PairShared, sent_slice); }
  __device__ uint32_t sent() const { return base_ + offsetof(PairShared, sent); }

 private:
  uint32_t base_;
};

/// Named barriers; 0 is __syncthreads().
enum Barrier : int { kLoadersOfBlock = 1, kLoadersOfHalf = 2, kComputersOfHalf = 4 };

static_assert(kNumTiles == 3 && kTiles[0].rows == kFragmentRows && kTiles[1].rows == kBlockRows &&
                  kTiles[2].rows == kHalves * kBlockRows,
              "a narrow tile, one of a half, one of both halves");
static_assert(kTiles[0].tokens == kBlockRows && kTiles[1].tokens == kBlockRows &&
                  kTiles[2].tokens == kBlockRows,
              "the planner counts the tokens of a step");

__device__ __forceinline__ bool is_narrow(int tile) { return tile == 0; }
/// Whether both halves compute the item together.
__device__ __forceinline__ bool is_joint(int tile) { return tile == kNumTiles - 1; }

/// Query row of the item where the fragment of a pair starts.
__device__ __forceinline__ int32_t first_row(int tile, int half, int warp) {
  if (is_narrow(tile)) return 0;
  return ((is_joint(tile) ? half * kWarps : 0) + warp) * kFragmentRows;
}

/// By the computing warps, before a barrier of the whole block: the barriers of each pair, and some of those of
/// its half.
__device__ __forceinline__ void init_barriers(uint32_t shared) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const Half half(shared, warp / kWarps);
  const Pair pair(half, warp % kWarps);
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    ptx::barrier_init(pair.slice_full(s), kLoaderArrivals);
    ptx::barrier_init(pair.slice_empty(s), kReleases);
  }
#pragma unroll 1
  for (int s = warp % kWarps; s < kStages; s += kWarps) {
    ptx::barrier_init(half.entry_full(s), kWarps * kLoaderArrivals);
    ptx::barrier_init(half.entry_empty(s), kReaders * kReleases);
  }
  if (warp % kWarps == kWarps - 1) {
    ptx::barrier_init(half.q_full(), kWarps * kLoaderArrivals);
    ptx::barrier_init(half.q_empty(), kWarps * kReleases);
  }
  ptx::fence_barrier_init();
}

/// One parity bit a stage: of the phase of its barrier that comes next.
class Parities {
 public:
  __device__ explicit Parities(uint32_t bits) : bits_(bits) {}
  __device__ uint32_t of(int stage) const { return bits_ >> stage & 1; }
  __device__ void advance(int stage) { bits_ ^= 1u << stage; }

 private:
  uint32_t bits_;
};

__device__ __forceinline__ int next_stage(int stage) {
  return stage == kStages - 1 ? 0 : stage + 1;
}

}  // namespace pat

#endif
