// SPDX-License-Identifier: MIT
// The computing warps: a warpgroup for the run all rows of a wide item share, then each warp alone for
// the runs of its own rows.
#pragma once

#include "block_tile.cuh"
#include "fragment.cuh"
#include "output.cuh"
#include "pipeline_sm90.cuh"

#if defined(PAT_PATH_SM90)

namespace pat {

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

  /// Computes the pieces the partner loads of one tile shape.
  template <typename Config>
  __device__ void drain() {
    if (tables_.header(kHeaderItemCount + Config::kTile) == 0) return;
    while (true) {
      await_q<Config>();
      const int4 a = ptx::load_shared_x4(pair_.box());
      const int4 b = ptx::load_shared_x4(pair_.box() + 16);
      if (a.x < 0) break;
      compute<Config>({a.x, a.y, a.z, a.w, b.x, b.y, b.z});
    }
    release_q<Config>();
  }

 private:
  template <typename Config>
  __device__ void compute(const Box& box) {
    // Known only at the end, asked for now.
    const int32_t first = first_row<Config>(half_, warp_);
    const int32_t rows_left = box.query_rows - first;
    const bool valid = lane_ < min(rows_left, kFragmentRows);
    const Item item{.first_entry = box.first_entry, .head_offset = box.head_offset};
    const QueryRow mine(tables_, item, valid ? first + lane_ : 0, box.piece % params_.num_kv_heads,
                        params_.group_size);
    RowBlock rows;
    rows.clear();

    if constexpr (Config::kWide) {
      if (!box.is_chain) {
        shared_run<Config>(box.tokens, rows);
        release_q<Config>();
      } else {
#pragma unroll 1
        for (int phase = 0; phase < 2; ++phase) {
          if (phase == (box.private_first ? 0 : 1)) {
            private_runs<Config>(rows, phase == 1);
          } else {
            shared_run<Config>(box.tokens, rows);
            if (phase == 1) release_q<Config>();
          }
        }
      }
    } else {
      private_runs<Config>(rows, true);
    }
    write_rows(params_, rows, mine, rows_left);
  }

  template <typename Config>
  __device__ __forceinline__ void shared_run(int32_t tokens, RowBlock& rows) {
    EntryRing<Config> ring(*this);
    SharedRun(mine_.q(), rows, params_.scale_log2).run(tokens, ring);
    // Behind the entries that this half brought.
    const int32_t tiles = (tokens + kBlockRows - 1) / kBlockRows;
    ring_.go_to((tiles + Config::kRowBlocks - 1 - (Config::kRowBlocks == 2 ? half_ : 0)) /
                Config::kRowBlocks * 2 % kStages);
  }

  /// This warp's stream to its end. `last`: nobody needs Q afterwards.
  template <typename Config>
  __device__ __forceinline__ void private_runs(RowBlock& rows, bool last) {
    Fragment fragment(lane_);
    fragment.load_q(mine_.q() + warp_ * kSliceBytes);
    if (last) release_q<Config>();
    while (true) {
      await_slice();
      const int32_t slice = ptx::load_shared(pair_.slice(ring_.stage()));
      if (slice == Slice::kEnd) break;
      fragment.scores(slice_address(), slice, rows, params_.scale_log2, [&] { release_slice(); });
      await_slice();
      fragment.accumulate(slice_address(), rows, [&] { release_slice(); });
    }
    release_slice();
  }

  __device__ uint32_t slice_address() const {
    return mine_.entry(ring_.stage()) + warp_ * kSliceBytes;
  }

  template <typename Config>
  __device__ void await_q() {
    if constexpr (Config::kWide) {
      ptx::barrier_wait(mine_.q_full(), half_q_parity_);
      half_q_parity_ ^= 1;
    } else {
      ptx::barrier_wait(pair_.q_full(), pair_q_parity_);
      pair_q_parity_ ^= 1;
    }
  }

  /// Of a wide item every warp has read all rows of its half, of a narrow one its own.
  template <typename Config>
  __device__ void release_q() {
    __syncwarp();
    if constexpr (Config::kWide) {
      if (lane_ < kWarps) ptx::barrier_arrive(Pair(mine_, lane_).q_empty(), 1);
    } else {
      if (lane_ == 0) ptx::barrier_arrive(pair_.q_empty(), kWarps);
    }
  }

  /// The entries of a shared run in the order of the tiles: K at even stages, V at odd ones, of this
  /// half or of both in turn. What was awaited last is what is released.
  template <typename Config>
  class EntryRing {
   public:
    __device__ explicit EntryRing(Computer& computer) : computer_(computer) {}

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
    static constexpr bool kBoth = Config::kRowBlocks == 2;
    static constexpr int kPlaces = kStages / 2 * Config::kRowBlocks;  // of a tile

    __device__ int half_of(int place) const { return kBoth ? place % 2 : computer_.half_; }
    __device__ static int stage_of(int place) { return kBoth ? (place & ~1) : place * 2; }

    __device__ void await(int& place, int is_v) {
      place = place == kPlaces - 1 ? 0 : place + 1;
      const Half half(computer_.shared_, half_of(place));
      const int stage = stage_of(place) + is_v;
      const uint32_t bit = 1u << (half_of(place) * kStages + stage);
      ptx::barrier_wait(half.entry_full(stage), (computer_.entry_parities_ & bit) != 0);
      computer_.entry_parities_ ^= bit;
    }
    __device__ uint64_t descriptor(int place, int is_v) const {
      const Half half(computer_.shared_, half_of(place));
      return wgmma::descriptor(half.entry(stage_of(place) + is_v));
    }
    __device__ void release(int place, int is_v) const {
      __syncwarp();
      const int lane = computer_.lane_;
      if (lane < kWarps) {
        const Pair pair(Half(computer_.shared_, half_of(place)), lane);
        ptx::barrier_arrive(pair.slice_empty(stage_of(place) + is_v),
                            kReaders / kWarps / Config::kRowBlocks);
      }
    }

    Computer& computer_;
    int k_ = kPlaces - 1, v_ = kPlaces - 1;
  };

  __device__ __forceinline__ void await_slice() {
    ptx::barrier_wait(pair_.slice_full(ring_.stage()), ring_.parity());
  }
  __device__ __forceinline__ void release_slice() {
    __syncwarp();
    if (lane_ == 0) ptx::barrier_arrive(pair_.slice_empty(ring_.stage()), kReaders);
    ring_.advance();
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const int warp_, lane_, half_;
  const uint32_t shared_;
  const Half mine_;
  const Pair pair_;
  RingPosition ring_;            // of private runs
  uint32_t entry_parities_ = 0;  // bit half * kStages + stage
  uint32_t half_q_parity_ = 0, pair_q_parity_ = 0;
};

}  // namespace pat

#endif
