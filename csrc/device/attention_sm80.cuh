// SPDX-License-Identifier: MIT
// One work item computed by one unit: a warp (narrow tile) or the block (wide tiles).
//
//   ring step    0    1    2    3    4   ...      a ring entry is 64 tokens of K or of V, a slice of
//   contents     K0   V0   K1   V1   K2  ...      16 tokens a warp; kStages entries, kStages - 1 in
//                                                 flight
//   shared run   (wide) the slices of an entry are one tile of 64 tokens for all rows of the item;
//                one barrier of the block a ring step: after it the entry of this step is complete
//                for all warps, and the entry of the previous step is free
//   private      the slices of an entry have nothing to do with each other: each warp goes through
//   runs         the steps of its fragments, for its 16 rows, and waits for nobody. The stream does
//                not stop in between: the first private slices are loaded during the last tiles of
//                the shared run.
//
// A narrow item has only the second phase; the run its rows share comes first in its stream.
// Shared memory: [Q (wide)][entry 0]...[entry kStages - 1].
#pragma once

#include "block_tile.cuh"
#include "fragment.cuh"

namespace pat {

/// Slice words of the entries in flight, one row a warp.
using Mailbox = int32_t[kWarps][kMaxStages];

template <typename Config>
class ItemAttention {
 public:
  __device__ ItemAttention(const DecodeParams& params, const Tables& tables, uint32_t shared,
                           Mailbox& mailbox)
      : params_(params),
        tables_(tables),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        mailbox_(mailbox[threadIdx.x / 32]) {}

  /// Computes one piece, a pair of item and KV head, and writes its outputs or partials. Returns
  /// what `draw` gave, which is called when the last slice was issued: late enough not to hoard
  /// pieces that idle units could take, early enough to hide its latency.
  template <typename Draw>
  __device__ int32_t run(int32_t piece, const Draw& draw) {
    const Item item = load(piece);
    const int32_t kv_head = piece % params_.num_kv_heads;
    // Column of this lane's 16-byte chunk in every row of K and V.
    column_ = kv_head * kHeadDim + lane_ % kRowChunks * 8;
    Stream<Config> stream(params_, tables_, item, warp_, lane_);
    bool drawn = false;
    int32_t next = 0;
    // One ring step of the stream: K of a slice, then V of it.
    auto issue = [&](int32_t stage, bool is_v) __attribute__((always_inline)) {
      if (!stream.over()) {
        load_slice(stage, is_v, stream.slot(), Slice::valid(stream.slice()));
      } else if (!drawn) {
        next = draw();
        drawn = true;
      }
      if (!is_v) {
        if (lane_ == 0) mailbox_[stage] = stream.slice();
      } else {
        stream.advance();
      }
      ptx::cp_async_commit();  // also when empty: the waits below count groups
    };

    Fragment fragment(lane_);
    overflowed_ = 0;
    load_q(item, kv_head, fragment);
#pragma unroll
    for (int step = 0; step < Config::kStages - 1; ++step) issue(step, step % 2 == 1);
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) rows_[b].clear();

    stage_ = 0;
    // Entry to fill in a step: the one the previous step used.
    auto issue_previous = [&](bool even_step) __attribute__((always_inline)) {
      const int32_t previous = stage_ == 0 ? Config::kStages - 1 : stage_ - 1;
      // kStages - 1 steps ahead of this one.
      issue(previous, even_step == (Config::kStages % 2 == 0));
    };

    if constexpr (Config::kWide) {
      BlockTile<Config> tile(shared_, warp_, lane_);
      for (int32_t left = item.tokens(); left > 0; left -= kBlockRows) {
        await_entry();
        issue_previous(true);
        tile.scores(entry(stage_));
        to_next_stage();
        await_entry();
        issue_previous(false);
        tile.accumulate(entry(stage_), left, rows_, params_.scale_log2);
        to_next_stage();
      }
      __syncthreads();  // slices are private from here on: nobody reads another's any more
      if (item.first_fragment < 0) {
#pragma unroll
        for (int b = 0; b < Config::kRowBlocks; ++b) write(rows_[b], piece, b);
        ptx::cp_async_wait<0>();
        return drawn ? next : draw();
      }
    }

#pragma unroll 1
    for (int32_t b = 0; b < Config::kRowBlocks; ++b) {
      if constexpr (Config::kWide) {
        if (b == 0) {
          ptx::cp_async_wait<Config::kStages - 2>();  // Q has long arrived unless no tile was shared
          __syncwarp();
        }
        fragment.load_q(shared_ + b * kEntryBytes + warp_ * kSliceBytes);
      }
      while (true) {
        ptx::cp_async_wait<Config::kStages - 2>();
        __syncwarp();
        const int32_t slice = mailbox_[stage_];
        if (slice == Slice::kEnd || Slice::block(slice) != b) break;
        issue_previous(true);
        fragment.scores(slice_address(stage_), slice, rows_[0], params_.scale_log2);
        to_next_stage();
        ptx::cp_async_wait<Config::kStages - 2>();
        __syncwarp();
        issue_previous(false);
        fragment.accumulate(slice_address(stage_), rows_[0]);
        to_next_stage();
      }
      write(rows_[0], piece, b);
      if constexpr (Config::kRowBlocks > 1) rows_[0] = rows_[1];
    }
    ptx::cp_async_wait<0>();
    __syncwarp();  // the next item's loads overwrite what slower lanes may still read
    return drawn ? next : draw();
  }

 private:
  static_assert(Config::kRowBlocks <= 2, "the second block takes the place of the first");
  static constexpr int kWarpRows = kFragmentRows * Config::kRowBlocks;

  __device__ Item load(int32_t piece) const {
    const int32_t first = tables_.header(kHeaderItemBegin + Config::kTile);
    return load_item(tables_, params_.live_lens, first + piece / params_.num_kv_heads);
  }

  __device__ uint32_t entry(int32_t stage) const {
    return shared_ + Config::kQBytes + stage * kEntryBytes;
  }
  __device__ uint32_t slice_address(int32_t stage) const {
    return entry(stage) + warp_ * kSliceBytes;
  }
  __device__ void to_next_stage() { stage_ = stage_ == Config::kStages - 1 ? 0 : stage_ + 1; }

  /// The entry of this step has arrived for the whole block; the previous step's entry is free.
  __device__ void await_entry() const {
    ptx::cp_async_wait<Config::kStages - 2>();
    ptx::fence_proxy_async();  // WGMMA reads what cp.async wrote
    __syncthreads();
  }

  /// This warp's slice of one ring entry. `valid` tokens of it exist; the rest become zeros.
  __device__ __forceinline__ void load_slice(int32_t stage, bool is_v, int32_t slot,
                                             int32_t valid) const {
    const void* cache = is_v ? params_.v_cache : params_.k_cache;
    const int64_t slot_stride = is_v ? params_.v_slot_stride : params_.k_slot_stride;
    const int lane = ptx::opaque(lane_);
    const int first = lane / kRowChunks;
    const uint32_t lane_address = slice_address(stage) + swizzled(first, lane % kRowChunks);
#pragma unroll
    for (int pass = 0; pass < kSliceTokens / kRowsPerLoad; ++pass) {
      // Rows advance by 2 or 4, so the swizzle's row bits advance by XOR: `first` is below them.
      const int down = pass * kRowsPerLoad;
      const uint32_t address = (lane_address ^ ((down & 7) << 4)) + down * kPanelRowBytes;
      const int32_t from = __shfl_sync(0xffffffffu, slot, down + first);
      ptx::cp_async_16(address, static_cast<const Element*>(cache) + from * slot_stride + column_,
                       first + down < valid);
    }
  }

  /// Row in the item of row `in_warp` (0..kWarpRows - 1) of this warp.
  __device__ int row_of_warp(int in_warp) const {
    if constexpr (!Config::kWide) return in_warp;
    return in_warp / kFragmentRows * kBlockRows + warp_ * kFragmentRows + in_warp % kFragmentRows;
  }

  /// Lane l's query row of this warp's 16 or 32; lanes beyond the item repeat its first row.
  __device__ __forceinline__ QueryRow my_query_row(const Item& item, int32_t kv_head) const {
    const int r = row_of_warp(lane_);
    const bool valid = lane_ < kWarpRows && r < item.query_rows;
    return QueryRow(tables_, item, valid ? r : 0, kv_head, params_.group_size);
  }

  __device__ __forceinline__ void load_q(const Item& item, int32_t kv_head, Fragment& fragment) {
    const QueryRow mine = my_query_row(item, kv_head);
    const int64_t my_offset = mine.row * params_.q_row_stride + mine.head * kHeadDim;
    const Element* q = static_cast<const Element*>(params_.q);
    if constexpr (Config::kWide) {
      // Each warp brings the rows it owns, in the group of the ring's first entry.
      const int chunk = lane_ % kRowChunks;
#pragma unroll
      for (int pass = 0; pass < kWarpRows / kRowsPerLoad; ++pass) {
        const int in_warp = pass * kRowsPerLoad + lane_ / kRowChunks;
        const int r = row_of_warp(in_warp);
        const int64_t offset = __shfl_sync(0xffffffffu, my_offset, in_warp);
        const uint32_t to = shared_ + r / kBlockRows * kEntryBytes + swizzled(r % kBlockRows, chunk);
        ptx::cp_async_16(to, q + offset + chunk * 8, r < item.query_rows);
      }
    } else {
      fragment.load_q(q, my_offset, item.query_rows);
    }
    // A row that outgrew its tail unseen by the host becomes NaN, wherever it is computed.
    overflowed_ = __ballot_sync(0xffffffffu, __ldg(params_.live_lens + mine.row) < 0);
  }

  /// Normalised output of a row block to `out` (a row's only item) or to its partial slots with their
  /// log-sum-exp.
  __device__ __forceinline__ void write(const RowBlock& rows, int32_t piece, int block) {
    // NOTE: read again, from L1, rather than kept in registers through the loop.
    const Item item = load(piece);
    const QueryRow mine = my_query_row(item, piece % params_.num_kv_heads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int in_warp = block * kFragmentRows + half * 8 + lane_ / 4;
      const int32_t row = __shfl_sync(0xffffffffu, mine.row, in_warp);
      const int32_t head = __shfl_sync(0xffffffffu, mine.head, in_warp);
      const int32_t part = __shfl_sync(0xffffffffu, mine.part, in_warp);
      if (row_of_warp(in_warp) >= item.query_rows) continue;
      const bool overflowed = overflowed_ >> in_warp & 1;
      // No token: zeros when final, weight zero (-inf) when partial.
      float inverse = sum == 0.f ? 0.f : 1.f / sum;
      if (overflowed) inverse = NAN;
      if (part < 0) {
        uint32_t* to = reinterpret_cast<uint32_t*>(
            static_cast<Element*>(params_.out) + row * params_.out_row_stride + head * kHeadDim);
#pragma unroll
        for (int n = 0; n < kOutBlocks; ++n) {
          to[n * 4 + lane_ % 4] = ptx::pack<Element>(rows.out[n][2 * half] * inverse,
                                                     rows.out[n][2 * half + 1] * inverse);
        }
      } else {
        const int64_t index = int64_t{part} * params_.num_q_heads + head;
        if (lane_ % 4 == 0) {
          float lse = rows.top[half] * params_.scale_log2 + log2f(sum);
          if (sum == 0.f) lse = -INFINITY;
          params_.partial_lse[index] = overflowed ? NAN : lse;
        }
        if (sum == 0.f) continue;  // the merge skips it, nobody reads the values
        float2* to = reinterpret_cast<float2*>(params_.partial_out + index * kHeadDim);
#pragma unroll
        for (int n = 0; n < kOutBlocks; ++n) {
          to[n * 4 + lane_ % 4] = make_float2(rows.out[n][2 * half] * inverse,
                                              rows.out[n][2 * half + 1] * inverse);
        }
      }
    }
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const uint32_t shared_;
  const int warp_, lane_;
  int32_t* const mailbox_;
  int32_t column_, stage_;
  uint32_t overflowed_;  // bit r: row r of this warp
  RowBlock rows_[Config::kRowBlocks];
};

}  // namespace pat
