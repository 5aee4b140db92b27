// SPDX-License-Identifier: MIT
// What leaves the chip: the normalised output of query rows, or their partials and log-sum-exps.
#pragma once

#include "item.cuh"
#include "rows.cuh"

namespace pat {

/// Sum over the four lanes of a row.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

/// Writes column blocks first_block .. first_block + kBlocks - 1 of query row 8 half + lane / 4, of which
/// `rows_left` exist. Lane l < 16 holds query row l in `mine`; `values(n)` are this lane's two of block
/// first_block + n, `top` and `sum` belong to the whole row.
template <int kBlocks, typename Values>
__device__ __forceinline__ void write_row(const DecodeParams& params, const FinishedRow& mine,
                                          int half, int32_t rows_left, int first_block, float top,
                                          float sum, const Values& values) {
  const int lane = ptx::opaque(threadIdx.x % 32);
  const int in_block = half * 8 + lane / 4;
  const int32_t row = __shfl_sync(0xffffffffu, mine.row, in_block);
  const int32_t head = __shfl_sync(0xffffffffu, mine.head, in_block);
  const int32_t part = __shfl_sync(0xffffffffu, mine.part, in_block);
  // A request that outgrew its tail: NaN, rather than attention to a part of its tokens.
  if (__shfl_sync(0xffffffffu, mine.overflowed, in_block)) sum = NAN;
  if (in_block >= rows_left) return;
  // No token: zeros when final, weight zero (-inf) when partial.
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;
  const int column = first_block * 8 + lane % 4 * 2;
  if (part < 0) {
    Element* to = static_cast<Element*>(params.out) + int64_t{row} * params.out_row_stride +
                  head * kHeadDim + column;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float2 v = values(n);
      *reinterpret_cast<uint32_t*>(to + n * 8) = ptx::pack<Element>(v.x * inverse, v.y * inverse);
    }
  } else {
    const int64_t index = int64_t{part} * params.num_q_heads + head;
    if (column == 0) {
      params.partial_lse[index] = sum == 0.f ? -INFINITY : top * params.scale_log2 + log2f(sum);
    }
    if (sum == 0.f) return;  // the merge skips it, nobody reads the values
    float* to = params.partial_out + index * kHeadDim + column;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float2 v = values(n);
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(v.x * inverse, v.y * inverse);
    }
  }
}

/// Writes the rows of a block.
__device__ __forceinline__ void write_rows(const DecodeParams& params, const RowBlock& rows,
                                           const FinishedRow& mine, int32_t rows_left) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    write_row<kOutBlocks>(
        params, mine, half, rows_left, 0, rows.top[half], row_sum(rows.sum[half]),
        [&](int n) { return make_float2(rows.out[n][2 * half], rows.out[n][2 * half + 1]); });
  }
}

}  // namespace pat
