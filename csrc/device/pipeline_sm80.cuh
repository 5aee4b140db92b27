// SPDX-License-Identifier: MIT
// The ring of a block whose warps both load and compute.
//
//   ring step    0    1    2    3    4   ...      an entry is 64 tokens of K or of V, a slice of 16 a
//   contents     K0   V0   K1   V1   K2  ...      warp; kStages entries, kStages - 1 in flight
//
// Every thread counts its own copies: the group of a step has arrived once all but the newest
// kStages - 2 groups have. What another thread has copied is there after a barrier.
#pragma once

#include "combine.cuh"
#include "copy.cuh"

#if defined(PAT_PATH_SM80)

namespace pat {

inline constexpr int kThreads = kWarps * 32;
inline constexpr int kBlocksPerSm = 2;  // 2 x (80 + 1) KiB of the 164 of an A100
inline constexpr int kWorkers = 1;      // of a block
inline constexpr int kSharedBytes = 80 * 1024;

// [Q of the widest tile][entry 0]...[entry kStages - 1], whatever the tile: a warp may go on to the
// next tile before the others, it overwrites nothing but its own slices.
inline constexpr int kQBytes = kTiles[kNumTiles - 1].rows / kBlockRows * kEntryBytes;
inline constexpr int kStages = (kSharedBytes - kQBytes) / kEntryBytes;
static_assert(kStages >= 3, "two entries in flight while one is computed");

/// Slots of one slice: those of the rows that a lane copies, side by side.
using StagedSlots = int32_t[kSliceTokens];

/// What a warp keeps in shared memory about its stream.
struct alignas(16) Mailbox {
  StagedSlots slots;        // of the slice that is brought next
  int32_t slices[kStages];  // words of the slices in flight, written with their K
  SentState sent;           // of a narrow item
};

struct BlockShared {
  Mailbox mailboxes[kWarps];
  int32_t drawn;  // piece
};

}  // namespace pat

#endif
