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
  Item item(tables, first + params.num_kv_heads.quotient(piece));
  item.clip(params.live_lens);
  return item;
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
        first_(warp * kSliceTokens),
        shared_{SlotWalk(item), first_, item.tokens()} {
    fetch();
    advance();
  }

  /// The word of the current slice; its slots are staged.
  __device__ int32_t slice() const { return slice_; }
  __device__ bool over() const { return slice_ == Slice::kEnd; }

  /// To the next slice; the one after it is fetched, a slice ahead of its use.
  __device__ __forceinline__ void advance() {
    __syncwarp();
    if (lane_ < kSliceTokens) staged_[lane_] = next_slot_;
    __syncwarp();
    slice_ = next_slice_;
    if (!over()) fetch();
  }

 private:
  __device__ __forceinline__ void fetch() {
    if (!is_private_) {
      const int32_t position = shared_.position, tokens = shared_.tokens;
      // An entry has the slices of all four warps, a stream of its own slices with tokens only.
      if (position - (Config::kWide ? first_ : 0) < tokens) {
        const int32_t valid = min(max(shared_.tokens - position, 0), kSliceTokens);
        if (lane_ < valid) {
          next_slot_ = shared_.walk.slot(tables_, params_.slots, position + lane_);
        }
        shared_.position = position + Config::kTokens;
        next_slice_ = Slice::pack(valid, Slice::kAllRows, 0);
        return;
      }
      is_private_ = true;
      private_ = {};
      // Slices of a narrow item are dealt in turn, from the shared run to the last step.
      if (!Config::kWide) private_.offset = (first_ - whole_slices(tokens)) & (kBlockRows - 1);
    }
    while (private_.offset >= private_.length) {
      private_.offset -= whole_slices(private_.length);
      if (private_.step % 32 == 0) load_steps();
      if (private_.step == private_.steps) {
        next_slice_ = Slice::kEnd;
        return;
      }
      const int from = private_.step % 32;
      private_.from = __shfl_sync(0xffffffffu, private_.mine.slot, from);
      private_.length = __shfl_sync(0xffffffffu, private_.mine.length, from);
      private_.owners = __shfl_sync(0xffffffffu, private_.mine.rows, from);
      ++private_.step;
    }
    const int32_t valid = min(private_.length - private_.offset, kSliceTokens);
    if (lane_ < valid) next_slot_ = __ldg(params_.slots + private_.from + private_.offset + lane_);
    private_.offset += Config::kWide ? kSliceTokens : kBlockRows;
    next_slice_ = Slice::pack(valid, private_.owners, 0);
  }

  /// Lane l reads step `step` + l, the first block's steps before the second's: one latency for up to
  /// 32 steps.
  __device__ __forceinline__ void load_steps() {
    const Item item = load_piece<Config>(params_, tables_, piece_);
    if (item.first_fragment < 0) return;
    const int32_t mine = private_.step + lane_;
    int32_t index = 0, row = 0;
    private_.steps = 0;
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
      const int32_t first_row = Config::kWide ? b * kBlockRows + first_ : 0;
      if (first_row >= item.query_rows) break;
      const int2 words = tables_.fragment(item.first_fragment + first_row / kFragmentRows);
      if (mine >= private_.steps) {
        index = words.x + mine - private_.steps;
        row = first_row;
      }
      private_.steps += words.y;
    }
    if (mine >= private_.steps) return;
    private_.mine = load_step(tables_, params_, index, item, row);
    // A word of Slice, less its tokens.
    private_.mine.rows |= row / kBlockRows << (Slice::kBlockShift - Slice::kRowsShift);
  }

  const DecodeParams& params_;
  const Tables& tables_;
  StagedSlots& staged_;
  const int32_t piece_, lane_;
  const int32_t first_;  // token of a step that this warp brings; of a wide tile also its first row

  // One after the other, in the same registers.
  struct SharedRun {
    SlotWalk walk;
    int32_t position, tokens;  // position: of lane 0's next token
  };
  struct PrivateRuns {
    Step mine;                     // this lane's of a batch of 32
    int32_t step, steps;           // the next one; of all the warp's fragments
    int32_t from, length, owners;  // the current one
    int32_t offset;                // in it, of the next slice
  };
  union {
    SharedRun shared_;
    PrivateRuns private_;
  };
  bool is_private_ = false;

  int32_t slice_, next_slot_ = 0, next_slice_;
};

}  // namespace pat

#endif
