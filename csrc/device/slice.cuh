// SPDX-License-Identifier: MIT
// What one warp loads of a ring entry, and for whom, in one word.
#pragma once

#include "item.cuh"

namespace pat {

struct Slice {
  static constexpr int32_t kEnd = -1;  // nothing: the item's stream is over

  /// `rows`: lo and hi as in a step, see kStepRows; `block` counts the fragments of the warp, of which
  /// only the sm_80 path has more than one.
  __device__ static int32_t pack(int32_t valid, int32_t rows, int32_t block) {
    return valid | rows << kRowsShift | block << kBlockShift;
  }
  __device__ static int32_t valid(int32_t word) {  // tokens that exist
    return word & ((1 << kRowsShift) - 1);
  }
  __device__ static int32_t low(int32_t word) {  // rows [low, high)
    return word >> kRowsShift & kStepRowMask;
  }
  __device__ static int32_t high(int32_t word) {
    return word >> (kRowsShift + kStepHiShift) & kStepRowMask;
  }
  __device__ static int32_t block(int32_t word) { return word >> kBlockShift; }

  static constexpr int kRowsShift = 8;
  static constexpr int kBlockShift = kRowsShift + 2 * kStepHiShift;
  static constexpr int32_t kAllRows = kFragmentRows << kStepHiShift;
};

__device__ __forceinline__ int32_t whole_slices(int32_t tokens) {
  return (tokens + kSliceTokens - 1) / kSliceTokens * kSliceTokens;
}

/// A step of a fragment with its live length; lanes hold one each.
struct Step {
  int32_t slot, length, rows;
};

/// Step `index` of the table. `first_row`: the item's query row where the fragment starts.
__device__ __forceinline__ Step load_step(const Tables& tables, const DecodeParams& params,
                                          int32_t index, const Item& item, int32_t first_row) {
  const int4 words = tables.step(index);
  Step step{words.x, words.y, words.z};
  if (words.w >= 0) {
    const int32_t flat = item.head_offset + first_row + (words.z & kStepRowMask);
    const int32_t row = tables.entry(item.first_entry + params.group_size.quotient(flat)).x;
    step.length = live_length(words.y, __ldg(params.live_lens + row), words.w);
  }
  return step;
}

}  // namespace pat
