// SPDX-License-Identifier: MIT
// Compile-time facts of one module and of each of its tiles; everything assumed is asserted here.
#pragma once

#include "plan_layout.h"
#include "ptx.cuh"

namespace pat {

#if defined(PAT_DTYPE_BF16)
using Element = __nv_bfloat16;
#elif defined(PAT_DTYPE_FP16)
using Element = __half;
#else
#error "define PAT_DTYPE_BF16 or PAT_DTYPE_FP16"
#endif

inline constexpr int kHeadDim = PAT_HEAD_DIM;
static_assert(kHeadDim == 64 || kHeadDim == 128, "head dimensions the swizzle is made for");

// Two thread blocks share an SM. 2 x (112 + 1) KiB of 228 on Hopper, 2 x (80 + 1) of 164 on A100.
#if defined(PAT_PATH_SM90)
inline constexpr int kSharedBytes = 112 * 1024;
#elif defined(PAT_PATH_SM80)
inline constexpr int kSharedBytes = 80 * 1024;
#else
#error "define PAT_PATH_SM80 or PAT_PATH_SM90"
#endif

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kBlocksPerSm = 2;

inline constexpr int kRowBytes = kHeadDim * 2;        // one token of K or V of one head
inline constexpr int kRowChunks = kRowBytes / 16;     // 16-byte chunks of it
inline constexpr int kRowsPerLoad = 32 / kRowChunks;  // tokens one warp-wide cp.async brings
inline constexpr int kDepthSteps = kHeadDim / 16;     // MMA steps along d
inline constexpr int kOutBlocks = kHeadDim / 8;       // n8 blocks of the output

/// One tile shape. A *unit* is the group of warps that computes one work item: 1, 2 or 4 warps of
/// the block, so that many small items or one large one run in the same block.
template <int kTile_>
struct TileConfig {
  static constexpr int kTile = kTile_;
  static constexpr int kRows = kTiles[kTile].rows;
  static constexpr int kTokens = kTiles[kTile].tokens;
  static constexpr int kUnitWarps = kRows >= 64 ? 4 : kRows / 16;
  static constexpr int kUnitThreads = kUnitWarps * 32;
  static constexpr int kUnits = kWarps / kUnitWarps;            // units of a block
  static constexpr int kRowBlocks = kRows / (16 * kUnitWarps);  // m16 blocks of one warp
  static constexpr int kWarpTokens = kTokens / kUnitWarps;      // tokens one warp loads of a tile
  static constexpr int kScoreBlocks = kTokens / 8;              // n8 blocks of the scores

  // With two m16 blocks a warp has no registers left for Q: it is read from shared memory.
  static constexpr bool kSharedQ = kRowBlocks > 1;
  static constexpr int kQBytes = kSharedQ ? kRows * kRowBytes : 0;
  static constexpr int kEntryBytes = kTokens * kRowBytes;  // a ring entry: one tile of K or of V
  static constexpr int kSliceBytes = kSharedBytes / kUnits;
  static constexpr int kFit = (kSliceBytes - kQBytes) / kEntryBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;

  static_assert(kRows == kUnitWarps * kRowBlocks * 16, "a unit covers the tile's query rows");
  static_assert(kWarpTokens == 32 || kWarpTokens == 16, "a lane holds the slot of one token");
  static_assert(kTokens % 16 == 0, "tiles are whole MMA fragments");
  static_assert(kStages >= 2, "K and V must both be in flight");
};

}  // namespace pat
