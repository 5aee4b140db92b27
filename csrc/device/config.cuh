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

#if !defined(PAT_PATH_SM90) && !defined(PAT_PATH_SM80)
#error "define PAT_PATH_SM80 or PAT_PATH_SM90"
#endif

inline constexpr int kWarps = kItemWarps;  // that share an entry of the ring

inline constexpr int kRowChunks = kHeadDim / 8;       // 16-byte chunks of one token of K or V
inline constexpr int kRowsPerLoad = 32 / kRowChunks;  // tokens one warp-wide cp.async brings
inline constexpr int kDepthSteps = kHeadDim / 16;     // MMA steps along d
inline constexpr int kOutBlocks = kHeadDim / 8;       // n8 blocks of the output

// Rows lie in *panels* of 64 elements: 128 bytes a row, its 16-byte chunk c stored at c ^ (row & 7).
// This is the 128-byte swizzle of WGMMA, and free of bank conflicts for ldmatrix.
inline constexpr int kPanelChunks = 8;
inline constexpr int kPanelRowBytes = 128;
inline constexpr int kPanels = kHeadDim / 64;
inline constexpr int kBlockRows = 64;  // query rows of one WGMMA; tokens of a ring entry
inline constexpr int kPanelBytes = kBlockRows * kPanelRowBytes;
inline constexpr int kEntryBytes = kPanels * kPanelBytes;  // one tile of K or of V, or 64 rows of Q
inline constexpr int kSliceTokens = 16;                    // tokens of an entry one warp loads
inline constexpr int kSliceBytes = kSliceTokens * kPanelRowBytes;  // of it, in every panel
static_assert(kWarps * kSliceTokens == kBlockRows, "the warps of a block fill an entry");
static_assert(kPanelBytes % 1024 == 0, "WGMMA's swizzle repeats every 1024 bytes");

/// One tile shape of the sm_80 path: the query rows of a wide one are fragments of 16, each owned by one
/// warp; those of the narrow one are all four warps'.
template <int kTile_>
struct TileConfig {
  static constexpr int kTile = kTile_;
  static constexpr int kRows = kTiles[kTile].rows;
  static constexpr bool kWide = kRows > kFragmentRows;
  static constexpr int kRowBlocks = kWide ? kRows / kBlockRows : 1;
  static constexpr int kTokens = kBlockRows;  // of the shared run, a step

  static_assert(kTokens == kTiles[kTile].tokens, "the planner counts the tokens of a step");
  static_assert(kWide ? kRows % kBlockRows == 0 : kRows == kFragmentRows, "whole MMA tiles");
  static_assert(kRowBlocks <= 2, "two blocks of rows at most");
};

/// Shared-memory offset of a 16-byte chunk of a row within an entry.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return (chunk / kPanelChunks) * kPanelBytes + row * kPanelRowBytes +
         ((chunk % kPanelChunks ^ (row & 7)) << 4);
}

/// From a lane's address of (row, chunk) to that of (row + down, chunk + right). Compile-time steps
/// leave one XOR for every other `right` and an immediate: `down` is a multiple of 8, `right` even
/// and `chunk` below 2.
__device__ __forceinline__ uint32_t stepped(uint32_t address, int down, int right) {
  return (address ^ ((right % kPanelChunks) << 4)) + right / kPanelChunks * kPanelBytes +
         down * kPanelRowBytes;
}

}  // namespace pat
