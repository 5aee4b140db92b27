// SPDX-License-Identifier: MIT
// The KV stream of one warp: which 16 tokens it brings next, through the run all rows of the item
// share and then through the steps of the warp's fragments.
#pragma once

#include "item.cuh"

namespace pat {

/// What one warp loads of a ring entry, and for whom: a word, so that it fits the mailbox beside the
/// entry. `block` counts the fragments of the warp.
struct Slice {
  static constexpr int32_t kEnd = -1;  // the stream is over

  __device__ static int32_t pack(int32_t valid, int32_t rows, int32_t block) {
    return valid | rows << 8 | block << 24;
  }
  __device__ static int32_t valid(int32_t word) { return word & 0xff; }  // tokens that exist
  __device__ static int32_t low(int32_t word) { return word >> 8 & 0xff; }  // rows [low, high)
  __device__ static int32_t high(int32_t word) { return word >> 16 & 0xff; }
  __device__ static int32_t block(int32_t word) { return word >> 24; }
};

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
        tiles_left_((item.tokens() + Config::kTokens - 1) / Config::kTokens) {
    if (item.first_fragment >= 0) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
        const int32_t fragment = Config::kWide ? b * kWarps + warp : 0;
        if (fragment * kFragmentRows < item.query_rows) {
          const int2 words = tables.fragment(item.first_fragment + fragment);
          first_step_[b] = words.x;
          num_steps_[b] = words.y;
        }
      }
      load_steps(item.first_entry);
      first_entry_ = item.first_entry;
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
      next_slice_ = Slice::pack(valid, kFragmentRows << 8, 0);
      return;
    }
    while (offset_ >= length_) {
      if (step_ == total_steps()) {
        next_slice_ = Slice::kEnd;
        return;
      }
      if (step_ - batch_ == 32) {
        batch_ = step_;
        load_steps(first_entry_);
      }
      base_ = __shfl_sync(0xffffffffu, step_slot_, step_ - batch_);
      length_ = __shfl_sync(0xffffffffu, step_length_, step_ - batch_);
      rows_ = __shfl_sync(0xffffffffu, step_rows_, step_ - batch_);
      offset_ = 0;
      ++step_;
    }
    const int32_t valid = min(length_ - offset_, kSliceTokens);
    if (lane_ < valid) next_slot_ = __ldg(params_.slots + base_ + offset_ + lane_);
    offset_ += kSliceTokens;
    next_slice_ = valid | rows_;
  }

  __device__ int32_t total_steps() const {
    int32_t total = num_steps_[0];
#pragma unroll
    for (int b = 1; b < Config::kRowBlocks; ++b) total += num_steps_[b];
    return total;
  }

  /// Lane l reads step batch_ + l with its live length: one latency for up to 32 steps.
  __device__ __forceinline__ void load_steps(int32_t first_entry) {
    int32_t index = batch_ + lane_, block = 0;
#pragma unroll
    for (int b = 0; b + 1 < Config::kRowBlocks; ++b) {
      if (index >= num_steps_[b]) {
        index -= num_steps_[b];
        block = b + 1;
      }
    }
    if (batch_ + lane_ >= total_steps()) return;
    const int32_t first = block == 0 ? first_step_[0] : first_step_[Config::kRowBlocks - 1];
    const int4 words = tables_.step(first + index);
    step_slot_ = words.x;
    step_length_ = words.y;
    step_rows_ = words.z << 8 | block << 24;
    if (words.w >= 0) {
      const int32_t in_item = (Config::kWide ? block * kBlockRows + fragment_row() : 0);
      const int32_t row =
          tables_.entry(first_entry + (in_item + (words.z & 0xff)) / params_.group_size).x;
      step_length_ = live_length(words.y, __ldg(params_.live_lens + row), words.w);
    }
  }

  __device__ static int32_t fragment_row() { return threadIdx.x / 32 * kFragmentRows; }

  const DecodeParams& params_;
  const Tables& tables_;
  SlotWalk walk_;
  const int32_t lane_;
  const int32_t tokens_;
  int32_t position_, tiles_left_;  // shared run: of lane 0's next token

  int32_t first_step_[Config::kRowBlocks] = {}, num_steps_[Config::kRowBlocks] = {};
  int32_t first_entry_ = 0;
  int32_t step_slot_ = 0, step_length_ = 0, step_rows_ = 0;  // of step batch_ + lane
  int32_t batch_ = 0, step_ = 0;                             // step_: the one after the current
  int32_t base_ = 0, length_ = 0, offset_ = 0, rows_ = 0;    // the current step

  int32_t slot_ = 0, slice_ = Slice::kEnd;
  int32_t next_slot_ = 0, next_slice_ = Slice::kEnd;
};

}  // namespace pat
