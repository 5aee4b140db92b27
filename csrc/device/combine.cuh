// SPDX-License-Identifier: MIT
// The states of four warps that have computed the same 16 query rows from different tokens become one,
// warp 0's, through shared memory.
#pragma once

#include "rows.cuh"

namespace pat {

/// Where a warp leaves its state: 8 rows at a time.
struct alignas(8) SentState {
  float2 of_row[8];  // {maximum, sum}
};

/// Address of column block n of 8 rows in a slice of a ring entry: a slice has the room in its panels.
__device__ __forceinline__ uint32_t sent_values(uint32_t slice, int n) {
  constexpr int kBlocksPerPanel = kSliceBytes / 256;  // n8 blocks of 8 rows, 256 bytes each
  static_assert(kBlocksPerPanel * kPanels == kOutBlocks,
                "8 rows of floats fill a slice of 16 bits");
  return slice + n / kBlocksPerPanel * kPanelBytes + n % kBlocksPerPanel * 256;
}

/// By warps 1 to 3: rows 8 kHalf .. 8 kHalf + 7 to `slice`, a slice of an entry that is the warp's own,
/// and to `state`, the address of a SentState.
template <int kHalf>
__device__ __forceinline__ void send_state(const RowBlock& rows, uint32_t slice, uint32_t state) {
  const int lane = threadIdx.x % 32;
  float sum = rows.sum[kHalf];
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (lane % 4 == 0) ptx::store_shared_f2(state + lane / 4 * 8, {rows.top[kHalf], sum});
#pragma unroll
  for (int n = 0; n < kOutBlocks; ++n) {
    ptx::store_shared_f2(sent_values(slice, n) + lane * 8,
                         {rows.out[n][2 * kHalf], rows.out[n][2 * kHalf + 1]});
  }
}

/// By warp 0, once for each of the others.
template <int kHalf>
__device__ __forceinline__ void receive_state(RowBlock& rows, uint32_t slice, uint32_t state,
                                              float scale_log2) {
  const int lane = threadIdx.x % 32;
  const float2 theirs = ptx::load_shared_f2(state + lane / 4 * 8);
  const float top = fmaxf(rows.top[kHalf], theirs.x);
  const float shift = top == -INFINITY ? 0.f : top * scale_log2;
  const float keep = ptx::exp2(rows.top[kHalf] * scale_log2 - shift);
  const float take = ptx::exp2(theirs.x * scale_log2 - shift);
  rows.top[kHalf] = top;
  rows.sum[kHalf] = rows.sum[kHalf] * keep + (lane % 4 == 0 ? theirs.y * take : 0.f);
#pragma unroll
  for (int n = 0; n < kOutBlocks; ++n) {
    const float2 value = ptx::load_shared_f2(sent_values(slice, n) + lane * 8);
    rows.out[n][2 * kHalf] = rows.out[n][2 * kHalf] * keep + value.x * take;
    rows.out[n][2 * kHalf + 1] = rows.out[n][2 * kHalf + 1] * keep + value.y * take;
  }
}

}  // namespace pat
