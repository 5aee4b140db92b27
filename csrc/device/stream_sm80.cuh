// SPDX-License-Identifier: MIT
// The KV stream of one warp: which 16 tokens it brings next, through the run all rows of the item
// share and then through the steps of the warp's fragments.
#pragma once

#include "slice.cuh"

#if defined(PAT_PATH_SM80)

namespace pat {

template <typename Config>
class Stream {
 public:
  __device__ Stream(const DecodeParams& params, const Tables& tables, const Item& item,
                    int32_t warp, int32_t lane)
      : params_(params),
        tables_(tables),
        walk_(item),
        lane_(lane),
        tokens_(item.tokens()),
        // The narrow tile's stream is its warp's alone; of a wide one each warp brings a quarter.
        position_(Config::kWide ? warp * kSliceTokens : 0),
        tiles_left_((item.tokens() + Config::kTokens - 1) / Config::kTokens),
        first_entry_(item.first_entry),
        first_row_(Config::kWide ? warp * kFragmentRows : 0) {
    if (item.first_fragment >= 0) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
        const int32_t row = b * kBlockRows + first_row_;
        if (row < item.query_rows) {
          const int2 words = tables.fragment(item.first_fragment + row / kFragmentRows);
          first_step_[b] = words.x;
          num_steps_[b] = words.y;
        }
      }
      load_steps();
    }
    fetch();
    advance();
  }

  /// Slot of this lane's token (lanes 0..15) and the word of the current slice.
  __device__ int32_t slot() const { return slot_; }
  __device__ int32_t slice() const { return slice_; }
  __device__ bool over() const { return slice_ == Slice::kEnd; }

  /// To the next slice; the one after it is fetched, a slice ahead of its use.
  __device__ __forceinline__ void advance() {
    slot_ = next_slot_;
    slice_ = next_slice_;
    fetch();
  }

 private:
  __device__ __forceinline__ void fetch() {
    if (tiles_left_ > 0) {
      --tiles_left_;
      const int32_t valid = min(max(tokens_ - position_, 0), kSliceTokens);
      if (lane_ < valid) next_slot_ = walk_.slot(tables_, params_.slots, position_ + lane_);
      position_ += Config::kTokens;
      next_slice_ = Slice::pack(valid, Slice::kAllRows, 0);
      return;
    }
    while (offset_ >= length_) {
      if (step_ == total_steps()) {
        next_slice_ = Slice::kEnd;
        return;
      }
      if (step_ - batch_ == 32) {
        batch_ = step_;
        load_steps();
      }
      from_ = __shfl_sync(0xffffffffu, mine_.slot, step_ - batch_);
      length_ = __shfl_sync(0xffffffffu, mine_.length, step_ - batch_);
      owners_ = __shfl_sync(0xffffffffu, mine_.rows, step_ - batch_);
      offset_ = 0;
      ++step_;
    }
    const int32_t valid = min(length_ - offset_, kSliceTokens);
    if (lane_ < valid) next_slot_ = __ldg(params_.slots + from_ + offset_ + lane_);
    offset_ += kSliceTokens;
    next_slice_ = Slice::pack(valid, owners_, 0);
  }

  __device__ int32_t total_steps() const {
    int32_t total = num_steps_[0];
#pragma unroll
    for (int b = 1; b < Config::kRowBlocks; ++b) total += num_steps_[b];
    return total;
  }

  /// Lane l reads step batch_ + l, the first block's steps before the second's: one latency for up to
  /// 32 steps.
  __device__ __forceinline__ void load_steps() {
    int32_t index = batch_ + lane_, block = 0;
    if (index >= total_steps()) return;
    if (Config::kRowBlocks > 1 && index >= num_steps_[0]) {
      index -= num_steps_[0];
      block = 1;
    }
    const int32_t first = block == 0 ? first_step_[0] : first_step_[Config::kRowBlocks - 1];
    const Item chain{.first_entry = first_entry_, .head_offset = 0};
    mine_ = load_step(tables_, params_, first + index, chain, block * kBlockRows + first_row_);
    mine_.rows |= Slice::pack(0, 0, block) >> 8;
  }

  const DecodeParams& params_;
  const Tables& tables_;
  SlotWalk walk_;
  const int32_t lane_;
  const int32_t tokens_;
  int32_t position_, tiles_left_;  // shared run: of lane 0's next token

  const int32_t first_entry_, first_row_;
  int32_t first_step_[Config::kRowBlocks] = {}, num_steps_[Config::kRowBlocks] = {};
  Step mine_{};                                               // step batch_ + lane
  int32_t batch_ = 0, step_ = 0;                              // step_: the one after the current
  int32_t from_ = 0, length_ = 0, offset_ = 0, owners_ = 0;  // the current step

  int32_t slot_ = 0, slice_ = Slice::kEnd;
  int32_t next_slot_ = 0, next_slice_ = Slice::kEnd;
};

}  // namespace pat

#endif
