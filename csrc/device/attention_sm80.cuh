// SPDX-License-Identifier: MIT
// One work item computed by the block.
//
//   shared run   (wide) the slices of an entry are one tile of 64 tokens for all rows of the item; one
//                barrier of the block a ring step: after it the entry of this step is complete for
//                all warps, and the entry of the previous step is free
//   streams      the slices of an entry have nothing to do with each other: each warp goes through
//                its own and waits for nobody. Those of a wide item are the steps of the warp's
//                fragments; the first are loaded during the last tiles of the shared run.
//
// A narrow item has only the second phase. Its four streams have the same rows and share the tokens of the
// shared run and of the steps; the four states are combined at the end.
#pragma once

#include "block_tile_sm80.cuh"
#include "copy.cuh"
#include "fragment.cuh"
#include "output.cuh"
#include "pipeline_sm80.cuh"
#include "stream_sm80.cuh"
#include "work_list.cuh"

#if defined(PAT_PATH_SM80)

namespace pat {

template <typename Config>
class ItemAttention {
 public:
  __device__ ItemAttention(const DecodeParams& params, const Tables& tables, uint32_t shared,
                           BlockShared& block)
      : params_(params),
        tables_(tables),
        shared_(shared),
        // Opaque: what one tile computes from it is not kept for the others.
        warp_(ptx::opaque(threadIdx.x / 32)),
        lane_(threadIdx.x % 32),
        block_(block),
        mailbox_(block.mailboxes[warp_]) {}

  /// Computes one piece, a pair of item and KV head, and writes its outputs or partials. Returns
  /// what `draw` gave, which is called when the last slice was issued: late enough not to hoard
  /// pieces that idle units could take, early enough to hide its latency.
  template <typename Draw>
  __device__ int32_t run(int32_t piece, const Draw& draw) {
    const Item item = load_piece<Config>(params_, tables_, piece);
    const int32_t kv_head = params_.num_kv_heads.remainder(piece);
    // This lane's 16-byte chunk of every row of K and V.
    column_ = (kv_head * kHeadDim + lane_ % kRowChunks * 8) * sizeof(Element);
    Stream<Config> stream(params_, tables_, item, piece, mailbox_.slots, warp_, lane_);
    int32_t next = -1;  // not drawn yet
    // One ring step of the stream: K of a slice, then V of it.
    auto issue = [&](int32_t stage, bool is_v) __attribute__((always_inline)) {
      if (!stream.over()) {
        load_slice(stage, is_v, Slice::valid(stream.slice()));
      } else if (next < 0) {
        next = draw();
      }
      if (!is_v) {
        if (lane_ == 0) mailbox_.slices[stage] = stream.slice();
      } else {
        stream.advance();
      }
      ptx::cp_async_commit();  // also when empty: the waits below count groups
    };

    // Each warp brings the rows it owns, in the group of the ring's first entry.
    if (Config::kWide || warp_ == 0) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
        QueryRows(params_, tables_, item, first_row(b), kv_head).issue(params_, q(b));
      }
    }
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) issue(step, step % 2 == 1);
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) rows_[b].clear();

    stage_ = 0;
    // Into the entry that the previous step used, kStages - 1 steps ahead of this one.
    auto issue_ahead = [&](bool is_even_step) __attribute__((always_inline)) {
      issue(stage_ == 0 ? kStages - 1 : stage_ - 1, is_even_step == (kStages % 2 == 0));
    };

    if constexpr (Config::kWide) {
      BlockTile<Config> tile(shared_, warp_, lane_);
      for (int32_t left = item.tokens(); left > 0; left -= kBlockRows) {
        await_entry();
        issue_ahead(true);
        tile.scores(entry(stage_), left, rows_, params_.scale_log2);
        to_next_stage();
        await_entry();
        issue_ahead(false);
        tile.accumulate(entry(stage_), rows_);
        to_next_stage();
      }
      __syncthreads();  // slices are private from here on: nobody reads another's any more
      // NOTE: items are read again, from L1, rather than kept in registers through the loop.
      if (load_piece<Config>(params_, tables_, piece).first_fragment < 0) {
#pragma unroll
        for (int b = 0; b < Config::kRowBlocks; ++b) finish(rows_[b], piece, b);
        ptx::cp_async_wait<0>();
        return next < 0 ? draw() : next;
      }
    }

    if (!Config::kWide) await_entry();  // Q, which came with warp 0's first slice
    QueryFragment q_rows;
    Fragment fragment(q_rows, lane_);
#pragma unroll 1
    for (int32_t b = 0; b < Config::kRowBlocks; ++b) {
      await_slice();
      load_query(q_rows, q(b));
      while (true) {
        const int32_t slice = mailbox_.slices[stage_];
        if (slice == Slice::kEnd || Slice::block(slice) != b) break;
        issue_ahead(true);
        fragment.scores(slice_address(stage_), slice, rows_[0], params_.scale_log2, [] {});
        to_next_stage();
        await_slice();
        issue_ahead(false);
        fragment.accumulate(slice_address(stage_), rows_[0], [] {});
        to_next_stage();
        await_slice();
      }
      finish(rows_[0], piece, b);
      if constexpr (Config::kRowBlocks > 1) rows_[0] = rows_[1];
    }
    ptx::cp_async_wait<0>();
    __syncwarp();  // the next item's loads overwrite what slower lanes may still read
    return next < 0 ? draw() : next;
  }

 private:
  static_assert(Config::kRowBlocks <= 2, "the second block takes the place of the first");

  /// The item's query row where this warp's rows of a block start.
  __device__ int32_t first_row(int block) const {
    return Config::kWide ? block * kBlockRows + warp_ * kFragmentRows : 0;
  }

  /// The warp's rows of a block.
  __device__ uint32_t q(int block) const {
    return shared_ + block * kEntryBytes + (Config::kWide ? warp_ * kSliceBytes : 0);
  }
  __device__ uint32_t entry(int32_t stage) const { return shared_ + kQBytes + stage * kEntryBytes; }
  __device__ uint32_t slice_address(int32_t stage) const {
    return entry(stage) + warp_ * kSliceBytes;
  }
  __device__ void to_next_stage() { stage_ = stage_ == kStages - 1 ? 0 : stage_ + 1; }

  /// The slice of this step has arrived for the warp; that of the previous step is free.
  __device__ void await_slice() const {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();
  }

  /// The entry of this step has arrived for the whole block; the previous step's entry is free.
  __device__ void await_entry() const {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
  }

  /// This warp's slice of one ring entry. `valid` tokens of it exist; the rest become zeros.
  __device__ __forceinline__ void load_slice(int32_t stage, bool is_v, int32_t valid) const {
    const char* from = static_cast<const char*>(is_v ? params_.v_cache : params_.k_cache) + column_;
    const uint32_t slot_stride = is_v ? params_.v_slot_stride : params_.k_slot_stride;
    const int lane = ptx::opaque(lane_);
    const uint32_t to = slice_address(stage) + copied_first(lane);
    const int4* slots = reinterpret_cast<const int4*>(mailbox_.slots + copied_row(lane, 0));
#pragma unroll
    for (int four = 0; four < kCopyPasses; four += 4) {
      const int4 v = slots[four / 4];
      const int32_t slot[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::cp_async_16(copied_to(to, four + i), ptx::multiply_add(slot[i], slot_stride, from),
                         copied_row(lane, four + i) < valid);
      }
    }
  }

  /// The 64 rows of Q take what the warps send of a narrow item, once all of them have read its 16.
  struct Room {
    const ItemAttention& item;
    __device__ uint32_t slice(int warp) const { return item.shared_ + warp * kSliceBytes; }
    __device__ uint32_t state(int warp) const {
      return ptx::shared_address(&item.block_.mailboxes[warp].sent);
    }
    __device__ void release() const { sync(); }
    __device__ void sync() const { __syncthreads(); }
  };

  __device__ __forceinline__ void finish(RowBlock& rows, int32_t piece, int block) const {
    const Item item = load_piece<Config>(params_, tables_, piece);
    const int32_t rows_left = item.query_rows - first_row(block);
    const bool exists = lane_ < min(rows_left, kFragmentRows);
    const FinishedRow mine(
        QueryRow(tables_, item.first_entry, item.head_offset, exists ? first_row(block) + lane_ : 0,
                 params_.num_kv_heads.remainder(piece), params_.group_size),
        params_.live_lens);
    if constexpr (Config::kWide) {
      write_rows(params_, rows, mine, rows_left);
    } else {
      __syncthreads();  // all warps have read Q
      combine_and_write(params_, rows, mine, rows_left, warp_, Room{*this});
    }
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const uint32_t shared_;
  const int warp_, lane_;
  BlockShared& block_;
  Mailbox& mailbox_;
  uint32_t column_;  // bytes
  int32_t stage_;
  RowBlock rows_[Config::kRowBlocks];
};

/// Computes pieces of one tile shape until none is left.
template <typename Config>
__device__ __forceinline__ void drain(const DecodeParams& params, const Tables& tables,
                                      const TileWork& work, uint32_t shared, BlockShared& block) {
  const bool leader = threadIdx.x == 0;
  const auto draw = [&] { return leader ? draw_piece(params, work) : 0; };
  const auto share = [&](int32_t value) {  // the leader's
    if (leader) block.drawn = value;
    __syncthreads();
    const int32_t piece = block.drawn;
    __syncthreads();
    return piece;
  };
  ItemAttention<Config> attention(params, tables, shared, block);
  int32_t piece = work.first < 0 ? share(draw()) : work.first;
  while (piece < work.pieces) piece = share(attention.run(piece, draw));
}

/// Computes pieces until none is left.
__device__ __forceinline__ void drain_all(const DecodeParams& params, const Tables& tables,
                                          uint32_t shared, BlockShared& block) {
#pragma unroll 1
  for (int i = 0; i < kNumTiles; ++i) {
    const TileWork work = tile_work(params, tables, i, 0, kWorkers);
    if (work.first < 0 && work.drawn_from >= work.pieces) continue;
    switch (work.tile) {
      case 0:
        drain<TileConfig<0>>(params, tables, work, shared, block);
        break;
      case 1:
        drain<TileConfig<1>>(params, tables, work, shared, block);
        break;
      case 2:
        drain<TileConfig<2>>(params, tables, work, shared, block);
        break;
    }
  }
}

}  // namespace pat

#endif
