// SPDX-License-Identifier: MIT
// The states of four warps that have computed the same 16 query rows from different tokens become one,
// through shared memory: 8 rows at a time, each warp for a quarter of the columns, which it writes.
#pragma once

#include "output.cuh"

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

/// Rows 8 kHalf .. 8 kHalf + 7 to `slice`, a slice of an entry that is the warp's own, and to `state`, the
/// address of a SentState.
template <int kHalf>
__device__ __forceinline__ void send_state(const RowBlock& rows, uint32_t slice, uint32_t state) {
  const int lane = threadIdx.x % 32;
  const float sum = row_sum(rows.sum[kHalf]);
  if (lane % 4 == 0) ptx::store_shared_f2(state + lane / 4 * 8, {rows.top[kHalf], sum});
#pragma unroll
  for (int n = 0; n < kOutBlocks; ++n) {
    ptx::store_shared_f2(sent_values(slice, n) + lane * 8,
                         {rows.out[n][2 * kHalf], rows.out[n][2 * kHalf + 1]});
  }
}

/// What four warps have sent of row lane / 4, combined, in a quarter of the columns.
struct Quarter {
  static constexpr int kBlocks = kOutBlocks / kWarps;
  float2 out[kBlocks];
  float top = -INFINITY, sum = 0.f;

  /// Of column blocks kBlocks `warp` and on. `room`: see combine_and_write().
  template <typename Room>
  __device__ __forceinline__ Quarter(const Room& room, int warp, float scale_log2) {
    const int lane = threadIdx.x % 32;
    float2 sent[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sent[w] = ptx::load_shared_f2(room.state(w) + lane / 4 * 8);
      top = fmaxf(top, sent[w].x);
    }
    // No warp has seen a token of this row: exp2 of (-inf - -inf) would be NaN.
    const float shift = top == -INFINITY ? 0.f : top * scale_log2;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) out[n] = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2(sent[w].x * scale_log2 - shift);
      const uint32_t slice = room.slice(w);
      sum += sent[w].y * weight;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const float2 v =
            ptx::load_shared_f2(sent_values(slice, warp * kBlocks) + n * 256 + lane * 8);
        out[n].x += v.x * weight;
        out[n].y += v.y * weight;
      }
    }
  }
  static_assert(kSliceBytes / 256 % kBlocks == 0, "the blocks of a warp lie in one panel");
};

template <int kHalf, typename Room>
__device__ __forceinline__ void combine_and_write_half(const DecodeParams& params,
                                                       const RowBlock& rows,
                                                       const FinishedRow& mine, int32_t rows_left,
                                                       int warp, const Room& room) {
  send_state<kHalf>(rows, room.slice(warp), room.state(warp));
  room.sync();
  const Quarter all(room, warp, params.scale_log2);
  room.release();
  write_row<Quarter::kBlocks>(params, mine, kHalf, rows_left, warp * Quarter::kBlocks, all.top,
                              all.sum, [&](int n) { return all.out[n]; });
}

/// By all warps, for a narrow item of `rows_left` query rows. `room`: slice(w) and state(w) are addresses of
/// what warp w has to send its state in, sync() is a barrier of the warps, and release() is one behind which
/// the owner of a slice may hand it on.
template <typename Room>
__device__ __forceinline__ void combine_and_write(const DecodeParams& params, const RowBlock& rows,
                                                  const FinishedRow& mine, int32_t rows_left,
                                                  int warp, const Room& room) {
  combine_and_write_half<0>(params, rows, mine, rows_left, warp, room);
  if (rows_left > 8) combine_and_write_half<1>(params, rows, mine, rows_left, warp, room);
}

}  // namespace pat
