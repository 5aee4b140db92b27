// SPDX-License-Identifier: MIT
// In which order a block takes the tiles, and which pieces of them its workers get. No CUDA in here: the
// tests run it on the host.
#pragma once

#include <cstdint>

#include "../plan_layout.h"
#include "divisor.h"

namespace pat {

/// A worker, what computes one piece at a time: a block, or a half of one.
struct Worker {
  int32_t block, blocks;  // of the grid
  int32_t index, count;   // of the block's workers; all of them join for a piece of the widest tile
};

/// The pieces of one tile, as a worker gets them: heaviest first. Which worker gets a piece never changes its
/// result.
struct TileWork {
  int32_t tile;
  int32_t pieces;
  // A worker's first piece of all is known without a counter in memory, which saves a small batch
  // its latency; -1: it is not of this tile, or there is none.
  int32_t first;
  int32_t drawn_from;  // the piece that the counter stands for when it is zero
};

/// The `i`-th tile of a worker; `pieces`: of each tile.
///
/// Wide tiles are bound by tensor cores, narrow ones by memory. Where the wide ones fill the GPU, half
/// the blocks start with the narrow ones, so that the two overlap; a few wide pieces go first, so that
/// none of them is left to the end.
///
/// First pieces go round the blocks that begin with wide tiles: one of the widest to a block, then those of
/// the middle tile and the narrow ones to the workers that are left, one worker of every block before the
/// second of any, so that few pieces go to as many SMs.
/// NOTE: the widest tile never comes after the one of 64 rows: on Hopper the halves of a block, which
/// part for that one, could not tell each other's barrier phases any more.
PAT_HOST_DEVICE constexpr TileWork tile_work(const int32_t (&pieces)[kNumTiles],
                                             const Worker& worker, int i) {
  static_assert(kNumTiles == 3, "the two orders");
  const auto least = [](int32_t a, int32_t b) { return a < b ? a : b; };
  const int32_t narrow = pieces[0], middle = pieces[1], widest = pieces[2];
  const bool overlap = middle + widest >= worker.blocks * worker.count / 4 * 3;
  const int32_t wide_blocks = overlap ? worker.blocks / 2 : worker.blocks;  // wide tiles first
  const int32_t narrow_blocks = worker.blocks - wide_blocks;
  const bool is_wide_first = worker.block < wide_blocks;
  const int tile = is_wide_first ? kNumTiles - 1 - i : (kNumTiles - i) % kNumTiles;

  const int32_t of_widest = least(widest, wide_blocks);
  const int32_t left = wide_blocks - of_widest;  // blocks
  const int32_t of_middle = least(middle, left * worker.count);
  const int32_t of_narrow =
      least(narrow, worker.blocks * worker.count - of_widest * worker.count - of_middle);
  if (tile == kNumTiles - 1) {
    return {tile, widest, worker.block < of_widest ? worker.block : -1, of_widest};
  }
  // Among the workers that get none of the widest tile.
  const bool has_widest = is_wide_first && worker.block < of_widest;
  const int32_t place = worker.block - of_widest + worker.index * left;
  if (tile == 1) {
    const bool gets = is_wide_first && !has_widest && place < of_middle;
    return {tile, middle, gets ? place : -1, of_middle};
  }
  int32_t first = is_wide_first ? narrow_blocks * worker.count + place - of_middle
                                : worker.block - wide_blocks + worker.index * narrow_blocks;
  if (has_widest || (is_wide_first && place < of_middle) || first >= of_narrow) first = -1;
  return {tile, narrow, first, of_narrow};
}

}  // namespace pat
