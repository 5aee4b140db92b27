// SPDX-License-Identifier: MIT
// The KV stream of one warp: which 16 tokens it brings next, through the run all rows of the item
// share and then through the steps of the warp's fragments.
#pragma once

#include "pipeline_sm80.cuh"
#include "slice.cuh"

#if defined(PAT_PATH_SM80)

namespace pat {

/// Item of a piece, a pair of item and KV head.
template <typename Config>
__device__ __forceinline__ Item load_piece(const DecodeParams& params, const Tables& tables,
                                           int32_t piece) {
  const int32_t first = tables.header(kHeaderItemBegin + Config::kTile);
  return load_item(tables, params.live_lens, first + piece / params.num_kv_heads);
}

template <typename Config>
class Stream {
 public:
  /// `staged`: room for the slots of a slice, of this warp alone.
  __device__ Stream(const DecodeParams& params, const Tables& tables, const Item& item,
                    int32_t piece, StagedSlots& staged, int32_t warp, int32_t lane)
      : params_(params),
        tables_(tables),
        staged_(staged),
        piece_(piece),
        lane_(lane),
        first_(Config::kWide ? warp * kSliceTokens : 0),
        walk_(item),
        position_(first_),
        tokens_(item.tokens()) {
    fetch();
    advance();
  }

  /// The word of the current slice; its slots are staged.
  __device__ int32_t slice() const { return slice_; }
  __device__ bool over() const { return slice_ == Slice::kEnd; }

  /// To the next slice; the one after it is fetched, a slice ahead of its use.
  __device__ __forceinline__ void advance() {
    __syncwarp();
    if (lane_ < kSliceTokens) {
      staged_[lane_ % kRowsPerLoad][lane_ / kRowsPerLoad] = next_slot_;
    }
    __syncwarp();
    slice_ = next_slice_;
    if (!over()) fetch();
  }

 private:
  __device__ __forceinline__ void fetch() {
    if (position_ - first_ < tokens_) {
      const int32_t valid = min(max(tokens_ - position_, 0), kSliceTokens);
      if (lane_ < valid) next_slot_ = walk_.slot(tables_, params_.slots, position_ + lane_);
      position_ += Config::kTokens;
      next_slice_ = Slice::pack(valid, Slice::kAllRows, 0);
      return;
    }
    while (left_ <= 0) {
      if (step_ % 32 == 0) load_steps();
      if (step_ == steps_) {
        next_slice_ = Slice::kEnd;
        return;
      }
      from_ = __shfl_sync(0xffffffffu, mine_.slot, step_ % 32);
      left_ = __shfl_sync(0xffffffffu, mine_.length, step_ % 32);
      owners_ = __shfl_sync(0xffffffffu, mine_.rows, step_ % 32);
      ++step_;
    }
    const int32_t valid = min(left_, kSliceTokens);
    if (lane_ < valid) next_slot_ = __ldg(params_.slots + from_ + lane_);
    from_ += kSliceTokens;
    left_ -= kSliceTokens;
    next_slice_ = Slice::pack(valid, owners_, 0);
  }

  /// Lane l reads step step_ + l, the first block's steps before the second's: one latency for up to
  /// 32 steps.
  __device__ __forceinline__ void load_steps() {
    const Item item = load_piece<Config>(params_, tables_, piece_);
    if (item.first_fragment < 0) return;
    const int32_t mine = step_ + lane_;
    int32_t index = 0, row = 0;
    steps_ = 0;
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
      const int32_t first_row = b * kBlockRows + first_;
      if (first_row >= item.query_rows) break;
      const int2 words = tables_.fragment(item.first_fragment + first_row / kFragmentRows);
      if (mine >= steps_) {
        index = words.x + mine - steps_;
        row = first_row;
      }
      steps_ += words.y;
    }
    if (mine >= steps_) return;
    mine_ = load_step(tables_, params_, index, item, row);
    mine_.rows |= row / kBlockRows << 16;  // the block, as in a word of Slice less its tokens
  }

  const DecodeParams& params_;
  const Tables& tables_;
  StagedSlots& staged_;
  const int32_t piece_, lane_;
  const int32_t first_;  // token in a tile that this warp brings, and row in a block that it owns

  SlotWalk walk_;
  int32_t position_;  // in the shared run: of lane 0's next token
  const int32_t tokens_;

  Step mine_{};                           // step step_ / 32 * 32 + lane
  int32_t step_ = 0, steps_ = 0;          // the next one; of all the warp's fragments
  int32_t from_, left_ = 0, owners_ = 0;  // what is left of the current one

  int32_t slice_, next_slot_ = 0, next_slice_;
};

}  // namespace pat

#endif
