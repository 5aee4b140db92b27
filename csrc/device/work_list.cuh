// SPDX-License-Identifier: MIT
// The pieces of work of this launch: those that a worker knows, and those it draws.
#pragma once

#include "item.cuh"
#include "work_order.h"

namespace pat {

/// The `i`-th tile of a worker of this block.
__device__ __forceinline__ TileWork tile_work(const DecodeParams& params, const Tables& tables,
                                              int i, int worker, int block_workers) {
  // A graph may be replayed with a plan of more rows than its q has: the merge kernel says so.
  const bool fits = tables.header(kHeaderRows) <= params.rows_padded;
  int32_t pieces[kNumTiles];
#pragma unroll
  for (int tile = 0; tile < kNumTiles; ++tile) {
    const int32_t items = tables.header(kHeaderItemCount + tile);
    pieces[tile] = fits ? items * params.num_kv_heads.value() : 0;
  }
  const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  return tile_work(pieces, Worker{block, blocks, worker, block_workers}, i);
}

/// The next piece, by one thread of a worker. None is left where all of the tile were first pieces.
__device__ __forceinline__ int32_t draw_piece(const DecodeParams& params, const TileWork& work) {
  return work.drawn_from + atomicAdd(params.counters + work.tile, 1);
}

}  // namespace pat
