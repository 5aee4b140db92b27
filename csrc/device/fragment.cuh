// SPDX-License-Identifier: MIT
// 16 query rows times 16 tokens by one warp: the step of the narrow tile and of a chain's private
// runs. K and V are the warp's own slice of a ring entry.
#pragma once

#include "rows.cuh"
#include "slice.cuh"

namespace pat {

class Fragment {
 public:
  __device__ Fragment(const QueryFragment& q, int32_t lane) : lane_(lane), q_(q) {}

  /// Scores of the slice and the online softmax; `release` is called when K has been read. Rows that
  /// do not own the slice keep their state.
  template <typename Release>
  __device__ __forceinline__ void scores(uint32_t k_slice, int32_t slice, RowBlock& row,
                                         float scale_log2, const Release& release) {
    const int lane = ptx::opaque(lane_);
    const int token = (lane & 7) + ((lane >> 4) << 3);
    const int half = (lane >> 3) & 1;
    const uint32_t lane_address = k_slice + swizzled(token, half);
    // Two sums along d: the chains of dependent MMAs are half as long.
    float odd[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores_[n][i] = odd[n][i] = 0.f;
    }
    // One warp alone has only itself to hide latencies: loads come in batches.
#pragma unroll
    for (int first = 0; first < kDepthSteps; first += kBatch) {
      uint32_t f[kBatch][4];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        ptx::ldmatrix_x4(f[i], stepped(lane_address, 0, (first + i) * 2));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        auto& sum = i % 2 == 0 ? scores_ : odd;
        ptx::mma_m16n8k16<Element>(sum[0], q_.of_step[first + i], f[i][0], f[i][1]);
        ptx::mma_m16n8k16<Element>(sum[1], q_.of_step[first + i], f[i][2], f[i][3]);
      }
    }
    release();
    const int32_t valid = Slice::valid(slice);
    const int32_t low = Slice::low(slice), high = Slice::high(slice);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t column = n * 8 + (lane & 3) * 2 + (i & 1);
        const int32_t r = lane / 4 + i / 2 * 8;
        const bool owned = column < valid && r >= low && r < high;
        scores_[n][i] = owned ? scores_[n][i] + odd[n][i] : -INFINITY;
      }
    }
    float rescale[2];
    if (probabilities(row, scores_, scale_log2, rescale)) rescale_out(row, rescale);
  }

  /// row.out += P V of the slice; `release` is called when V has been read.
  template <typename Release>
  __device__ __forceinline__ void accumulate(uint32_t v_slice, RowBlock& row,
                                             const Release& release) {
    const int lane = ptx::opaque(lane_);
    const int token = (lane & 7) + ((lane >> 3) & 1) * 8;
    const int half = lane >> 4;
    const uint32_t lane_address = v_slice + swizzled(token, half);
    uint32_t p[4];
    pack_probabilities(p, scores_, 0);
    constexpr int kPairs = kOutBlocks / 2;
#pragma unroll
    for (int first = 0; first < kPairs; first += kBatch) {
      uint32_t f[kBatch][4];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        ptx::ldmatrix_x4_trans(f[i], stepped(lane_address, 0, (first + i) * 2));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int pair = first + i;
        ptx::mma_m16n8k16<Element>(row.out[2 * pair], p, f[i][0], f[i][1]);
        ptx::mma_m16n8k16<Element>(row.out[2 * pair + 1], p, f[i][2], f[i][3]);
      }
    }
    release();
  }

 private:
  static constexpr int kBatch = kDepthSteps;
  static_assert(kOutBlocks / 2 % kBatch == 0, "whole batches");

  const int32_t lane_;
  const QueryFragment& q_;
  float scores_[2][4];
};

}  // namespace pat
