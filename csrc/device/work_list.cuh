// SPDX-License-Identifier: MIT
// In which order a block takes the tiles, and which pieces of them its workers get.
#pragma once

#include "item.cuh"

namespace pat {

/// The pieces of one tile, as a worker (what computes one piece at a time: a block, or a half of one) gets
/// them: heaviest first, by a counter in memory. Which worker gets a piece never changes its result.
struct TileWork {
  int32_t tile;
  int32_t pieces;
  // A block's first pieces of the tile it starts with are known without the counter, which saves a
  // small batch its latency: of worker w, first + w beside. -1: this is not that tile.
  int32_t first, beside;
  int32_t drawn_from;  // the piece that the counter stands for when it is zero
};

/// The `i`-th tile of this block. `block_workers`: workers of a block; all of them join for a piece of the
/// widest tile.
///
/// Wide tiles are bound by tensor cores, narrow ones by memory. Where the wide ones fill the GPU, half
/// the blocks start with the narrow ones, so that the two overlap; a few wide pieces go first, so that
/// none of them is left to the end.
/// NOTE: the widest tile never comes after the one of 64 rows: on Hopper the halves of a block, which
/// part for that one, could not tell each other's barrier phases any more.
__device__ __forceinline__ TileWork tile_work(const DecodeParams& params, const Tables& tables,
                                              int i, int block_workers) {
  static_assert(kNumTiles == 3, "the two orders");
  const auto pieces = [&](int tile) {
    return tables.header(kHeaderItemCount + tile) * params.num_kv_heads;
  };
  const int32_t narrow = pieces(0), middle = pieces(1), widest = pieces(2);
  const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  const bool overlap = middle + widest >= blocks * block_workers / 4 * 3;
  const int32_t wide_blocks = overlap ? blocks / 2 : blocks;  // that take wide tiles first
  const bool is_wide_first = block < wide_blocks;
  const int first_wide = widest > 0 ? 2 : middle > 0 ? 1 : 0;
  const int first_narrow = narrow > 0 ? 0 : first_wide;

  const int tile = is_wide_first ? kNumTiles - 1 - i : (kNumTiles - i) % kNumTiles;
  const int32_t starting =
      (tile == first_wide ? wide_blocks : 0) + (tile == first_narrow ? blocks - wide_blocks : 0);
  const bool starts = tile == (is_wide_first ? first_wide : first_narrow);
  const int32_t before = is_wide_first || first_wide == first_narrow ? 0 : wide_blocks;
  return {.tile = tile,
          .pieces = tile == 0   ? narrow
                    : tile == 1 ? middle
                                : widest,
          .first = starts ? block - before : -1,
          .beside = starting,  // few pieces go to as many SMs
          .drawn_from = starting * (tile == kNumTiles - 1 ? 1 : block_workers)};
}

/// The next piece, by one thread of a worker.
__device__ __forceinline__ int32_t draw_piece(const DecodeParams& params, int tile,
                                              int32_t drawn_from) {
  return drawn_from + atomicAdd(params.counters + tile, 1);
}

}  // namespace pat
