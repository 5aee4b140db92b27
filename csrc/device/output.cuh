// SPDX-License-Identifier: MIT
// What leaves the chip: the normalised output of a row block, or its partial and log-sum-exp.
#pragma once

#include "item.cuh"
#include "rows.cuh"

namespace pat {

/// Writes the rows of a block, of which `rows_left` exist. Lane l < 16 holds query row l in `mine`.
__device__ __forceinline__ void write_rows(const DecodeParams& params, const RowBlock& rows,
                                           const FinishedRow& mine, int32_t rows_left) {
  const int lane = ptx::opaque(threadIdx.x % 32);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int in_block = half * 8 + lane / 4;
    const int32_t row = __shfl_sync(0xffffffffu, mine.row, in_block);
    const int32_t head = __shfl_sync(0xffffffffu, mine.head, in_block);
    const int32_t part = __shfl_sync(0xffffffffu, mine.part, in_block);
    // A request that outgrew its tail: NaN, rather than attention to a part of its tokens.
    if (__shfl_sync(0xffffffffu, mine.overflowed, in_block)) sum = NAN;
    if (in_block >= rows_left) continue;
    // No token: zeros when final, weight zero (-inf) when partial.
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    if (part < 0) {
      uint32_t* to =
          reinterpret_cast<uint32_t*>(static_cast<Element*>(params.out) +
                                      int64_t{row} * params.out_row_stride + head * kHeadDim);
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
        to[n * 4 + lane % 4] = ptx::pack<Element>(rows.out[n][2 * half] * inverse,
                                                  rows.out[n][2 * half + 1] * inverse);
      }
    } else {
      const int64_t index = int64_t{part} * params.num_q_heads + head;
      if (lane % 4 == 0) {
        params.partial_lse[index] =
            sum == 0.f ? -INFINITY : rows.top[half] * params.scale_log2 + log2f(sum);
      }
      if (sum == 0.f) continue;  // the merge skips it, nobody reads the values
      float2* to = reinterpret_cast<float2*>(params.partial_out + index * kHeadDim);
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
        to[n * 4 + lane % 4] =
            make_float2(rows.out[n][2 * half] * inverse, rows.out[n][2 * half + 1] * inverse);
      }
    }
  }
}

}  // namespace pat
