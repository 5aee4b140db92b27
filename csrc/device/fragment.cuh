// SPDX-License-Identifier: MIT
// 16 query rows times 16 tokens by one warp: the step of the narrow tile and of a chain's private
// runs. K and V are the warp's own slice of a ring entry.
#pragma once

#include "rows.cuh"
#include "stream.cuh"

namespace pat {

class Fragment {
 public:
  __device__ explicit Fragment(int32_t lane) : lane_(lane) {}

  /// Q from global memory, 4 bytes a lane and register. `row_offset`: element offset of the query row
  /// of lanes 0..15; rows from `rows` on become zeros.
  __device__ __forceinline__ void load_q(const Element* q, int64_t row_offset, int32_t rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane_ / 4;
      const int64_t offset = __shfl_sync(0xffffffffu, row_offset, row);
      const uint32_t* from = reinterpret_cast<const uint32_t*>(q + offset) + lane_ % 4;
#pragma unroll
      for (int k = 0; k < kDepthSteps; ++k) {
        q_[k][half] = row < rows ? __ldg(from + k * 8) : 0u;
        q_[k][half + 2] = row < rows ? __ldg(from + k * 8 + 4) : 0u;
      }
    }
  }

  /// Q from 16 rows of a block in shared memory.
  __device__ __forceinline__ void load_q(uint32_t rows_address) {
    const uint32_t lane_address = rows_address + swizzled(lane_ & 15, lane_ >> 4);
#pragma unroll
    for (int k = 0; k < kDepthSteps; ++k) ptx::ldmatrix_x4(q_[k], stepped(lane_address, 0, k * 2));
  }

  /// Scores of the slice and the online softmax. Rows that do not own it keep their state.
  __device__ __forceinline__ void scores(uint32_t k_slice, int32_t slice, RowBlock& row,
                                         float scale_log2) {
    const int token = (lane_ & 7) + ((lane_ >> 4) << 3);
    const int half = (lane_ >> 3) & 1;
    const uint32_t lane_address = k_slice + swizzled(token, half);
    // Two sums along d: the chains of dependent MMAs are half as long.
    float odd[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores_[0][n][i] = odd[n][i] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kDepthSteps; ++k) {
      uint32_t f[4];
      ptx::ldmatrix_x4(f, stepped(lane_address, 0, k * 2));
      auto& sum = k % 2 == 0 ? scores_[0] : odd;
      ptx::mma_m16n8k16<Element>(sum[0], q_[k], f[0], f[1]);
      ptx::mma_m16n8k16<Element>(sum[1], q_[k], f[2], f[3]);
    }
    const int32_t valid = Slice::valid(slice);
    const int32_t low = Slice::low(slice), high = Slice::high(slice);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t column = n * 8 + (lane_ & 3) * 2 + (i & 1);
        const int32_t r = lane_ / 4 + i / 2 * 8;
        const bool owned = column < valid && r >= low && r < high;
        scores_[0][n][i] = owned ? scores_[0][n][i] + odd[n][i] : -INFINITY;
      }
    }
    online_softmax(&row, scores_, scale_log2);
  }

  /// row.out += P V of the slice.
  __device__ __forceinline__ void accumulate(uint32_t v_slice, RowBlock& row) {
    const int token = (lane_ & 7) + ((lane_ >> 3) & 1) * 8;
    const int half = lane_ >> 4;
    const uint32_t lane_address = v_slice + swizzled(token, half);
    uint32_t p[4];
    pack_probabilities(p, scores_[0], 0);
#pragma unroll
    for (int pair = 0; pair < kOutBlocks / 2; ++pair) {
      uint32_t f[4];
      ptx::ldmatrix_x4_trans(f, stepped(lane_address, 0, pair * 2));
      ptx::mma_m16n8k16<Element>(row.out[2 * pair], p, f[0], f[1]);
      ptx::mma_m16n8k16<Element>(row.out[2 * pair + 1], p, f[2], f[3]);
    }
  }

 private:
  const int32_t lane_;
  uint32_t q_[kDepthSteps][4];
  float scores_[1][2][4];
};

}  // namespace pat
