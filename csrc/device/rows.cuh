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

/// Online softmax in base 2 of kBlocks row blocks: scores become probabilities, `out` and `sum` are
/// rescaled. A score of -inf is a token that does not exist or that the row does not own.
/// Loops run over the rows innermost: a row's maximum and sum are chains, several side by side hide
/// their latency.
template <int kBlocks, int kScoreBlocks>
__device__ __forceinline__ void online_softmax(RowBlock* rows,
                                               float (&scores)[kBlocks][kScoreBlocks][4],
                                               float scale_log2) {
  float top[kBlocks][2], shift[kBlocks][2], rescale[kBlocks][2];
  bool moved = false;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) top[b][half] = rows[b].top[half];
  }
#pragma unroll
  for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[b][half] =
            fmaxf(top[b][half], fmaxf(scores[b][n][2 * half], scores[b][n][2 * half + 1]));
      }
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[b][half] = fmaxf(top[b][half], __shfl_xor_sync(0xffffffffu, top[b][half], step));
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A row that has seen no token yet: exp2 of (-inf - -inf) would be NaN.
      shift[b][half] = top[b][half] == -INFINITY ? 0.f : top[b][half] * scale_log2;
      rescale[b][half] = ptx::exp2(rows[b].top[half] * scale_log2 - shift[b][half]);
      moved |= top[b][half] != rows[b].top[half];
      rows[b].top[half] = top[b][half];
      rows[b].sum[half] *= rescale[b][half];
    }
  }
  if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[b].out[n][i] *= rescale[b][i / 2];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[b][n][i];
        score = ptx::exp2(score * scale_log2 - shift[b][i / 2]);
        rows[b].sum[i / 2] += score;
      }
    }
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
