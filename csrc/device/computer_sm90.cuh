// SPDX-License-Identifier: MIT
// The computing warps: a warpgroup for the run all rows of a wide item share, each warp alone for its
// stream of slices.
#pragma once

#include "block_tile.cuh"
#include "combine.cuh"
#include "fragment.cuh"
#include "output.cuh"
#include "pipeline_sm90.cuh"

#if defined(PAT_PATH_SM90)

namespace pat {

/// A box, read when a word of it is needed: registers are scarcer than the latency of shared memory.
class BoxReader {
 public:
  __device__ explicit BoxReader(uint32_t address) : address_(address) {}
  __device__ int32_t piece() const { return word(offsetof(Box, piece)); }
  __device__ int32_t tokens() const { return word(offsetof(Box, tokens)); }
  __device__ int32_t query_rows() const { return word(offsetof(Box, query_rows)); }
  __device__ int32_t first_entry() const { return word(offsetof(Box, first_entry)); }
  __device__ int32_t head_offset() const { return word(offsetof(Box, head_offset)); }
  __device__ int tile() const { return word(offsetof(Box, tile)); }
  __device__ Phase phase(int i) const {
    return static_cast<Phase>(word(offsetof(Box, phases) + i * sizeof(Phase)));
  }

 private:
  __device__ int32_t word(uint32_t offset) const { return ptx::load_shared(address_ + offset); }
  uint32_t address_;
};

class Computer {
 public:
  __device__ Computer(const DecodeParams& params, const Tables& tables, uint32_t shared)
      : params_(params),
        tables_(tables),
        warp_(threadIdx.x / 32 % kWarps),
        lane_(threadIdx.x % 32),
        half_(threadIdx.x / kHalfThreads % kHalves),
        shared_(shared),
        mine_(shared, half_),
        pair_(mine_, warp_) {}

  /// Computes what the loading warps bring.
  __device__ void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      ptx::barrier_wait(mine_.q_full(), parity);
      const BoxReader box(mine_.box(parity));
      if (box.piece() < 0) break;
      compute(box);
    }
  }

 private:
  __device__ __forceinline__ void compute(const BoxReader& box) {
    QueryFragment q;
    load_query(q, mine_.q() + (is_narrow(box.tile()) ? 0 : warp_ * kSliceBytes));
    __syncwarp();
    if (lane_ == 0) ptx::barrier_arrive(mine_.q_empty(), 1);
    RowBlock rows;
    rows.clear();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Phase phase = box.phase(i);
      if (phase == kSharedRun) shared_run(q, box.tokens(), is_joint(box.tile()), rows);
      if (phase == kStreams) {
        stream(q, rows);
        if (!is_narrow(box.tile())) release_slice();
      }
    }
    const int32_t first = first_row(box.tile(), half_, warp_);
    const int32_t rows_left = box.query_rows() - first;
    const bool exists = lane_ < min(rows_left, kFragmentRows);
    const FinishedRow mine(
        QueryRow(tables_, box.first_entry(), box.head_offset(), exists ? first + lane_ : 0,
                 box.piece() % params_.num_kv_heads, params_.group_size),
        params_.live_lens);
    if (!is_narrow(box.tile())) {
      write_rows(params_, rows, mine, rows_left);
      return;
    }
    if (lane_ == 0) ptx::store_shared(pair_.sent_slice(), slice_address());
    __syncwarp();
    combine_and_write(params_, rows, mine, rows_left, warp_, Room{*this});
    ptx::fence_proxy_async();  // the copy engine may write next where a state was sent
    release_slice();
  }

  __device__ __forceinline__ void shared_run(const QueryFragment& q, int32_t tokens, bool both,
                                             RowBlock& rows) {
    EntryRing ring(*this, both);
    SharedRun(q, rows, params_.scale_log2).run(tokens, ring);
    // Behind the entries that this half brought.
    const int32_t tiles = (tokens + kBlockRows - 1) / kBlockRows;
    stage_ = (both ? (tiles + 1 - half_) / 2 : tiles) * 2 % kStages;
  }

  /// This warp's stream; its end mark is not released.
  __device__ __forceinline__ void stream(const QueryFragment& q, RowBlock& rows) {
    Fragment fragment(q, lane_);
    while (true) {
      await_slice();
      const int32_t slice = ptx::load_shared(pair_.slice(stage_));
      if (slice == Slice::kEnd) break;
      fragment.scores(slice_address(), slice, rows, params_.scale_log2, [&] { release_slice(); });
      await_slice();
      fragment.accumulate(slice_address(), rows, [&] { release_slice(); });
    }
  }

  /// The slice of a narrow item's end mark, which holds nothing, takes what a warp sends.
  struct Room {
    const Computer& computer;
    __device__ uint32_t slice(int warp) const {
      return ptx::load_shared(Pair(computer.mine_, warp).sent_slice());
    }
    __device__ uint32_t state(int warp) const { return Pair(computer.mine_, warp).sent(); }
    __device__ void sync() const {
      ptx::named_barrier(kComputersOfHalf + computer.half_, kHalfThreads);
    }
  };

  __device__ uint32_t slice_address() const { return mine_.entry(stage_) + warp_ * kSliceBytes; }

  /// The entries of a shared run in the order of the tiles: K at even stages, V at odd ones, of this
  /// half or of both in turn. What was awaited last is what is released.
  class EntryRing {
   public:
    __device__ EntryRing(Computer& computer, bool both)
        : computer_(computer),
          both_(both),
          last_place_(kStages / 2 * (both ? 2 : 1) - 1),
          k_(last_place_),
          v_(last_place_) {}

    /// Waits for the next K, the next V or both and gives their descriptors.
    /// NOTE: one fence for both: it waits until the thread has no memory access in flight.
    __device__ uint64_t await_k() {
      await(k_, 0);
      ptx::fence_proxy_async();  // WGMMA reads what cp.async wrote
      return descriptor(k_, 0);
    }
    __device__ uint64_t await_v() {
      await(v_, 1);
      ptx::fence_proxy_async();
      return descriptor(v_, 1);
    }
    __device__ void await_both(uint64_t& k, uint64_t& v) {
      await(k_, 0);
      await(v_, 1);
      ptx::fence_proxy_async();
      k = descriptor(k_, 0);
      v = descriptor(v_, 1);
    }
    __device__ void release_k() const { release(k_, 0); }
    __device__ void release_v() const { release(v_, 1); }

   private:
    __device__ int half_of(int place) const { return both_ ? place % 2 : computer_.half_; }
    __device__ int stage_of(int place) const { return both_ ? (place & ~1) : place * 2; }

    __device__ void await(int& place, int is_v) {
      place = place == last_place_ ? 0 : place + 1;
      const Half half(computer_.shared_, half_of(place));
      const int stage = stage_of(place) + is_v, of_both = half_of(place) * kStages + stage;
      ptx::barrier_wait(half.entry_full(stage), computer_.entries_.of(of_both));
      computer_.entries_.advance(of_both);
    }
    __device__ uint64_t descriptor(int place, int is_v) const {
      const Half half(computer_.shared_, half_of(place));
      return wgmma::descriptor(half.entry(stage_of(place) + is_v));
    }
    __device__ void release(int place, int is_v) const {
      __syncwarp();
      if (computer_.lane_ == 0) {
        const Half half(computer_.shared_, half_of(place));
        ptx::barrier_arrive(half.entry_empty(stage_of(place) + is_v),
                            kReaders / kWarps / (both_ ? 2 : 1));
      }
    }

    Computer& computer_;
    const bool both_;
    const int last_place_;  // of a tile
    int k_, v_;
  };

  __device__ __forceinline__ void await_slice() {
    ptx::barrier_wait(pair_.slice_full(stage_), slices_.of(stage_));
  }
  __device__ __forceinline__ void release_slice() {
    __syncwarp();
    if (lane_ == 0) ptx::barrier_arrive(pair_.slice_empty(stage_), 1);
    slices_.advance(stage_);
    stage_ = next_stage(stage_);
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const int warp_, lane_, half_;
  const uint32_t shared_;
  const Half mine_;
  const Pair pair_;
  int stage_ = 0;        // of the warp's stream
  Parities slices_{0};   // of slice_full
  Parities entries_{0};  // of entry_full, half * kStages + stage
};

}  // namespace pat

#endif
