// SPDX-License-Identifier: MIT
// The loading warps: they draw the work, read the plan and bring Q, K and V, up to kStages entries
// ahead of the computing warps and across the borders of items.
#pragma once

#include "copy.cuh"
#include "pipeline_sm90.cuh"

#if defined(PAT_PATH_SM90)

namespace pat {

class Loader {
 public:
  __device__ Loader(const DecodeParams& params, const Tables& tables, uint32_t shared)
      : params_(params),
        tables_(tables),
        warp_(threadIdx.x / 32 % kWarps),
        lane_(threadIdx.x % 32),
        half_(threadIdx.x / kHalfThreads % kHalves),
        first_half_(shared, 0),
        mine_(shared, half_),
        pair_(mine_, warp_),
        lane_offset_(warp_ * kSliceBytes + swizzled(lane_ / kRowChunks, lane_ % kRowChunks)) {}

  /// Brings the head of the plan and of the slots to L2. Between two layers of a model both have left
  /// it, and an item's first loads are a chain of four: header, item, slots, K.
  __device__ void prefetch_plan() const {
    constexpr int32_t kLines = 2048, kLineWords = 32;
    const int32_t line = blockIdx.x * (kThreads / 2) + threadIdx.x % (kThreads / 2);
    const int32_t word = line % kLines * kLineWords;
    if (line < kLines) {
      if (word < params_.plan_words) ptx::prefetch_l2(params_.plan + word);
    } else if (line < 2 * kLines) {
      if (word < params_.slot_words) ptx::prefetch_l2(params_.slots + word);
    }
  }

  /// Loads pieces of one tile shape until none is left.
  template <typename Config>
  __device__ void drain() {
    const int32_t pieces = tables_.header(kHeaderItemCount + Config::kTile) * params_.num_kv_heads;
    if (pieces == 0) return;
    for (int32_t piece = draw<Config>(); piece < pieces; piece = draw<Config>()) {
      load<Config>(piece);
    }
    announce({.piece = -1});
    arrive_q<Config>();
  }

 private:
  // Below, a shared run is too short for the order to pay: it costs the halves of a block a rendezvous.
  static constexpr int32_t kPrivateFirstTokens = 1024;

  /// The next piece: one for both halves, for one, or for one warp.
  template <typename Config>
  __device__ int32_t draw() {
    int32_t* counter = params_.counters + Config::kTile;
    if constexpr (!Config::kWide) {
      const int32_t piece = lane_ == 0 ? atomicAdd(counter, 1) : 0;
      return __shfl_sync(0xffffffffu, piece, 0);
    } else {
      constexpr bool kBoth = Config::kRowBlocks == 2;
      const int barrier = kBoth ? 1 : 2 + half_;
      const uint32_t drawn = (kBoth ? first_half_ : mine_).drawn();
      if ((!kBoth || half_ == 0) && warp_ == 0 && lane_ == 0) {
        ptx::store_shared(drawn, atomicAdd(counter, 1));
      }
      ptx::named_barrier<Config::kRowBlocks * kHalfThreads>(barrier);
      const int32_t piece = ptx::load_shared(drawn);
      ptx::named_barrier<Config::kRowBlocks * kHalfThreads>(barrier);
      return piece;
    }
  }

  template <typename Config>
  __device__ void load(int32_t piece) {
    const int32_t index =
        tables_.header(kHeaderItemBegin + Config::kTile) + piece / params_.num_kv_heads;
    const Item item = load_item(tables_, params_.live_lens, index);
    const int32_t kv_head = piece % params_.num_kv_heads;
    const Box box{piece,
                  item.tokens(),
                  item.query_rows,
                  item.first_entry,
                  item.head_offset,
                  item.first_fragment >= 0,
                  Config::kWide && piece % 2 == 1 && item.tokens() >= kPrivateFirstTokens};
    announce(box);
    // The rows the partner owns; lane 0's arrival covers what all lanes stored.
    copy_q(params_, tables_, item, first_row<Config>(half_, warp_), kv_head,
           mine_.q() + warp_ * kSliceBytes);
    arrive_q<Config>();

    // This lane's 16-byte chunk of every row of K and V.
    const uint32_t column = (kv_head * kHeadDim + lane_ % kRowChunks * 8) * sizeof(Element);
    k_ = static_cast<const char*>(params_.k_cache) + column;
    v_ = static_cast<const char*>(params_.v_cache) + column;
    if constexpr (Config::kWide) {
      if (!box.is_chain) return load_shared_run<Config>(item);
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        if (phase == (box.private_first ? 0 : 1)) {
          load_fragment<Config>(item);
          end_stream();
        } else {
          load_shared_run<Config>(item);
        }
      }
    } else {
      load_shared_run<Config>(item);
      if (box.is_chain) load_fragment<Config>(item);
      end_stream();
    }
  }

  __device__ void end_stream() {
    await_empty();
    arrive(pair_.slice_full(0), Slice::kEnd);
  }

  /// The run all rows of the item share. Slots are fetched a slice ahead of their use.
  template <typename Config>
  __device__ void load_shared_run(const Item& item) {
    const uint32_t full = Config::kWide ? mine_.entry_full(0) : pair_.slice_full(0);
    if constexpr (Config::kWide) ring_.restart();
    SlotWalk walk(item);
    const int32_t tokens = item.tokens();
    const auto fetch = [&](int32_t first) {
      return lane_ < kSliceTokens && first + lane_ < tokens
                 ? walk.slot(tables_, params_.slots, first + lane_)
                 : 0;
    };
    // Each warp brings a quarter of a wide tile, each half every other one of the widest.
    constexpr int kStride = Config::kTokens * Config::kRowBlocks;
    int32_t tile = Config::kRowBlocks == 2 ? half_ * Config::kTokens : 0;
    const int32_t in_tile = Config::kWide ? warp_ * kSliceTokens : 0;
    int32_t slot = fetch(tile + in_tile);
    for (; tile < tokens; tile += kStride) {
      const int32_t next_slot = fetch(tile + kStride + in_tile);
      const int32_t valid = min(max(tokens - tile - in_tile, 0), kSliceTokens);
      load_slices(full, slot, Slice::pack(valid, Slice::kAllRows, 0));
      slot = next_slot;
    }
  }

  /// The runs of the partner's own rows.
  template <typename Config>
  __device__ void load_fragment(const Item& item) {
    const int32_t first = first_row<Config>(half_, warp_);
    if (first >= item.query_rows) return;
    const int2 fragment = tables_.fragment(item.first_fragment + first / kFragmentRows);
    for (int32_t batch = 0; batch < fragment.y; batch += 32) {
      const int32_t count = min(fragment.y - batch, 32);
      Step mine{};  // lane l's of this batch: one latency for all of them
      if (lane_ < count) {
        mine = load_step(tables_, params_, fragment.x + batch + lane_, item, first);
      }
      const auto fetch = [&](int32_t step, int32_t offset) {
        const int32_t length = __shfl_sync(0xffffffffu, mine.length, step & 31);
        const int32_t from = __shfl_sync(0xffffffffu, mine.slot, step & 31) + offset + lane_;
        return lane_ < kSliceTokens && offset + lane_ < length ? __ldg(params_.slots + from) : 0;
      };
      int32_t slot = fetch(0, 0);
      for (int32_t step = 0; step < count; ++step) {
        const int32_t length = __shfl_sync(0xffffffffu, mine.length, step);
        const int32_t rows = __shfl_sync(0xffffffffu, mine.rows, step);
        if (length == 0) slot = fetch(step + 1, 0);
        for (int32_t offset = 0; offset < length; offset += kSliceTokens) {
          const bool last = offset + kSliceTokens >= length;
          const int32_t next_slot = fetch(step + last, last ? 0 : offset + kSliceTokens);
          const int32_t valid = min(length - offset, kSliceTokens);
          load_slices(pair_.slice_full(0), slot, Slice::pack(valid, rows, 0));
          slot = next_slot;
        }
      }
    }
  }

  /// Box of the next item, once the partner has read the previous one and is done with its Q.
  __device__ void announce(const Box& box) {
    ptx::barrier_wait(pair_.q_empty(), q_parity_ ^ 1);
    q_parity_ ^= 1;
    if (lane_ == 0) {
      ptx::store_shared_x4(pair_.box(), {box.piece, box.tokens, box.query_rows, box.first_entry});
      ptx::store_shared_x4(pair_.box() + 16, {box.head_offset, box.is_chain, box.private_first, 0});
    }
  }

  template <typename Config>
  __device__ void arrive_q() {
    const uint32_t barrier = Config::kWide ? mine_.q_full() : pair_.q_full();
    ptx::barrier_arrive_after_cp_async(barrier);
    if (lane_ == 0) ptx::barrier_arrive(barrier, 1);
  }

  __device__ __forceinline__ void await_empty() {
    ptx::barrier_wait(pair_.slice_empty(ring_.stage()), ring_.parity() ^ 1);
  }

  /// `full`: the barrier of stage 0.
  __device__ __forceinline__ void arrive(uint32_t full, int32_t word) {
    const uint32_t barrier = full + ring_.stage() * 8;
    ptx::barrier_arrive_after_cp_async(barrier);
    if (lane_ == 0) {
      ptx::store_shared(pair_.slice(ring_.stage()), word);
      ptx::barrier_arrive(barrier, 1);
    }
    ring_.advance();
  }

  /// K, then V of this warp's slice of two ring entries. `slot`: lane l's, of token l.
  __device__ __forceinline__ void load_slices(uint32_t full, int32_t slot, int32_t word) {
    uint32_t slots[kCopyPasses];  // of the row this lane copies in each pass
#pragma unroll
    for (int pass = 0; pass < kCopyPasses; ++pass) {
      slots[pass] = __shfl_sync(0xffffffffu, slot, copied_row(lane_, pass));
    }
    load_slice(k_, params_.k_slot_stride, full, slots, word);
    load_slice(v_, params_.v_slot_stride, full, slots, word);
  }

  __device__ __forceinline__ void load_slice(const char* from, uint32_t slot_stride, uint32_t full,
                                             const uint32_t (&slots)[kCopyPasses], int32_t word) {
    await_empty();
    const uint32_t to = mine_.entry(ring_.stage()) + lane_offset_;
    const int32_t valid = Slice::valid(word);
    if (valid == kSliceTokens) {
#pragma unroll
      for (int pass = 0; pass < kCopyPasses; ++pass) {
        ptx::cp_async_16(copied_to(to, pass), ptx::multiply_add(slots[pass], slot_stride, from),
                         true);
      }
    } else {  // tokens that do not exist become zeros
#pragma unroll
      for (int pass = 0; pass < kCopyPasses; ++pass) {
        ptx::cp_async_16(copied_to(to, pass), ptx::multiply_add(slots[pass], slot_stride, from),
                         copied_row(lane_, pass) < valid);
      }
    }
    arrive(full, word);
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const int warp_, lane_, half_;
  const Half first_half_, mine_;
  const Pair pair_;
  const uint32_t lane_offset_;  // of this lane's first chunk within an entry
  RingPosition ring_;
  const char *k_, *v_;
  uint32_t q_parity_ = 0;
};

}  // namespace pat

#endif
