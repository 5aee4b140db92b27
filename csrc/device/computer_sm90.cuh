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
        half_(ptx::uniform(threadIdx.x / kHalfThreads % kHalves)),
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
    if (releases(lane_)) ptx::barrier_arrive(mine_.q_empty(), 1);
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
                 params_.num_kv_heads.remainder(box.piece()), params_.group_size),
        params_.live_lens);
    if (!is_narrow(box.tile())) {
      write_rows(params_, rows, mine, rows_left);
      return;
    }
    if (lane_ == 0) ptx::store_shared(pair_.sent_slice(), slice_address());
    __syncwarp();
    combine_and_write(params_, rows, mine, rows_left, warp_, Room{*this});
    release_slice();
  }

  __device__ __forceinline__ void shared_run(const QueryFragment& q, int32_t tokens, bool both,
                                             RowBlock& rows) {
    tokens = ptx::uniform(tokens);
    EntryRing ring(*this, ptx::uniform(both ? 1 : 0));
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
    __device__ void release() const {
      ptx::fence_proxy_async();  // by all who have read it, see release_slice()
      sync();
    }
  };

  __device__ uint32_t slice_address() const { return mine_.entry(stage_) + warp_ * kSliceBytes; }

  /// The entries of a shared run in the order of the tiles: K at even stages, V at odd ones, of this
  /// half or of both in turn.
  /// NOTE: places are the same for the whole warpgroup and come from uniform(): addresses and
  /// descriptors stay in uniform registers, where WGMMA wants them. Only `seen_` is of one warp.
  class EntryRing {
   public:
    __device__ EntryRing(Computer& computer, uint32_t both)
        : computer_(computer),
          both_(both),
          shared_(both ? computer.shared_ : computer.mine_.q()),
          first_bit_(both ? 0 : computer.half_ * kStages),
          places_(kStages / 2 << both) {}

    /// Waits for the first K, the last V, or a K and the V before it, and gives their descriptors.
    /// NOTE: one fence for both: it waits until the thread has no memory access in flight.
    __device__ uint32_t await_k() {
      k_ = advance();
      await(k_, 0);
      ptx::fence_proxy_async();  // WGMMA reads what cp.async wrote
      return descriptor(k_, 0);
    }
    __device__ uint32_t await_v() {
      v_ = k_;
      await(v_, 1);
      ptx::fence_proxy_async();
      return descriptor(v_, 1);
    }
    __device__ void await_both(uint32_t& k, uint32_t& v) {
      v_ = k_;
      k_ = advance();
      if (!seen_) {
        wait(k_, 0);
        wait(v_, 1);
        ptx::fence_proxy_async();
      }
      seen_ = false;
      computer_.entries_.advance(k_.bit);
      computer_.entries_.advance(v_.bit + 1);
      k = descriptor(k_, 0);
      v = descriptor(v_, 1);
    }
    /// Sees whether what await_both() waits for next is there already, while the tensor cores are busy.
    /// NOTE: warps of a warpgroup may differ in it: each waits, and fences, for its own MMAs.
    __device__ void look_ahead() {
      const Place next = place(next_);
      const bool has_k = is_there(next, 0), has_v = is_there(k_, 1);
      seen_ = __all_sync(0xffffffffu, has_k && has_v);
      if (seen_) ptx::fence_proxy_async();
    }
    /// Of what was awaited last.
    __device__ void release_k() const { release(k_, 0); }
    __device__ void release_v() const { release(v_, 1); }

   private:
    /// Of a K and its V.
    struct Place {
      uint32_t base;   // of the half's shared memory
      uint32_t stage;  // K's, V's is the next
      uint32_t bit;    // of K's barrier in `entries_`, V's is the next
    };

    /// With both halves, even indices are the first's.
    __device__ Place place(uint32_t index) const {
      const uint32_t half = index & both_, stage = (index >> both_) * 2;
      return {shared_ + half * kHalfBytes, stage, first_bit_ + half * kStages + stage};
    }
    __device__ Place advance() {
      const Place found = place(next_);
      next_ = next_ + 1 == places_ ? 0 : next_ + 1;
      return found;
    }
    __device__ static Half half_of(const Place& place) { return Half(place.base, 0); }

    __device__ void wait(const Place& place, int is_v) const {
      ptx::barrier_wait(half_of(place).entry_full(place.stage + is_v),
                        computer_.entries_.of(place.bit + is_v));
    }
    __device__ bool is_there(const Place& place, int is_v) const {
      return ptx::barrier_is_over(half_of(place).entry_full(place.stage + is_v),
                                  computer_.entries_.of(place.bit + is_v));
    }
    __device__ void await(const Place& place, int is_v) {
      wait(place, is_v);
      computer_.entries_.advance(place.bit + is_v);
    }
    __device__ static uint32_t descriptor(const Place& place, int is_v) {
      return wgmma::descriptor(half_of(place).entry(place.stage + is_v));
    }
    __device__ void release(const Place& place, int is_v) const {
      __syncwarp();
      ptx::barrier_arrive_if(releases(computer_.lane_),
                             half_of(place).entry_empty(place.stage + is_v),
                             kReaders / kWarps >> both_);
    }

    Computer& computer_;
    const uint32_t both_;  // 0 or 1
    const uint32_t shared_, first_bit_, places_;
    uint32_t next_ = 0;  // index of the next K's place
    bool seen_ = false;  // that K, and the V of the last one
    Place k_, v_;        // awaited last
  };
  static_assert(kHalves == 2, "kReaders / kWarps >> both_");

  __device__ __forceinline__ void await_slice() {
    ptx::barrier_wait(pair_.slice_full(stage_), slices_.of(stage_));
  }
  __device__ __forceinline__ void release_slice() {
    // The copy engine may write here next, and the arrival may leave while `ldmatrix` are in flight: what
    // other threads do is ordered behind them, what the engine does is not. Without the fence it overtook
    // them once in some hundred layers.
    ptx::fence_proxy_async();
    __syncwarp();
    if (releases(lane_)) ptx::barrier_arrive(pair_.slice_empty(stage_), 1);
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
