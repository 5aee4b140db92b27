// SPDX-License-Identifier: MIT
// The state one warp keeps of 16 query rows, in the register layout of an m16n8 accumulator: lane l
// has rows l / 4 and l / 4 + 8, of every n8 block columns 2 (l % 4) and the next.
#pragma once

#include "config.cuh"

namespace pat {

struct RowBlock {
  float out[kOutBlocks][4];
  float top[2];  // maximum of the scores so far, unscaled
  float sum[2];  // of this lane's columns, reduced at the end

  __device__ __forceinline__ void clear() {
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.f;
    }
  }
};

/// Their Q, as the A operand of either MMA.
struct QueryFragment {
  uint32_t of_step[kDepthSteps][4];
};

/// Q from 16 rows of a block in shared memory.
__device__ __forceinline__ void load_query(QueryFragment& q, uint32_t rows_address) {
  const int lane = threadIdx.x % 32;
  const uint32_t lane_address = rows_address + swizzled(lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < kDepthSteps; ++k) {
    ptx::ldmatrix_x4(q.of_step[k], stepped(lane_address, 0, k * 2));
  }
}

/// First half of an online softmax in base 2: scores become probabilities and enter `sum`. A score of
/// -inf is a token that does not exist or that the row does not own. Returns whether any row of the
/// warp has a new maximum: `out` must then be multiplied by `rescale`.
template <int kScoreBlocks>
__device__ __forceinline__ bool probabilities(RowBlock& rows, float (&scores)[kScoreBlocks][4],
                                              float scale_log2, float (&rescale)[2]) {
  float top[2] = {-INFINITY, -INFINITY}, shift[2];
#pragma unroll
  for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], step));
    }
  }
  bool moved = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float now = fmaxf(rows.top[half], top[half]);
    // A row that has seen no token yet: exp2 of (-inf - -inf) would be NaN.
    shift[half] = now == -INFINITY ? 0.f : now * scale_log2;
    rescale[half] = ptx::exp2(rows.top[half] * scale_log2 - shift[half]);
    moved |= now != rows.top[half];
    rows.top[half] = now;
    rows.sum[half] *= rescale[half];
  }
#pragma unroll
  for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = ptx::exp2(scores[n][i] * scale_log2 - shift[i / 2]);
      rows.sum[i / 2] += scores[n][i];
    }
  }
  return __any_sync(0xffffffffu, moved);
}

/// Second half, when the first returned true.
__device__ __forceinline__ void rescale_out(RowBlock& rows, const float (&rescale)[2]) {
#pragma unroll
  for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[n][i] *= rescale[i / 2];
  }
}

/// MMA fragment of 16 tokens of the probabilities: n8 blocks 2t and 2t + 1.
template <int kScoreBlocks>
__device__ __forceinline__ void pack_probabilities(uint32_t (&a)[4],
                                                   const float (&scores)[kScoreBlocks][4], int t) {
  const auto& s0 = scores[2 * t];
  const auto& s1 = scores[2 * t + 1];
  a[0] = ptx::pack<Element>(s0[0], s0[1]);
  a[1] = ptx::pack<Element>(s0[2], s0[3]);
  a[2] = ptx::pack<Element>(s1[0], s1[1]);
  a[3] = ptx::pack<Element>(s1[2], s1[3]);
}

}  // namespace pat
