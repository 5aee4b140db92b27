// SPDX-License-Identifier: MIT
// A wide tile's step with the MMA of a warp: 64 or 128 query rows times 64 tokens by the four warps of
// a block. Warp w owns rows 16 w .. 16 w + 15 of every block of 64, as WGMMA has it, so that it can go
// on alone with its rows' private runs.
#pragma once

#include "block_tile.cuh"

#if defined(PAT_PATH_SM80)

namespace pat {

template <typename Config>
class BlockTile {
 public:
  /// `q`: Q of the item in shared memory, blocks of 64 rows.
  __device__ BlockTile(uint32_t q, int32_t warp, int32_t lane)
      : q_(q + warp * kSliceBytes), lane_(lane) {}

  /// Scores of the tile, of which `left` tokens exist, and the online softmax.
  __device__ __forceinline__ void scores(uint32_t k_tile, int32_t left, RowBlock* rows,
                                         float scale_log2) {
    float scores[kBlocks][kScoreBlocks][4] = {};
    const int lane = ptx::opaque(lane_);
    const int token = (lane & 7) + ((lane >> 4) << 3);
    const int half = (lane >> 3) & 1;
    const uint32_t row_address = q_ + swizzled(lane & 15, lane >> 4);
    constexpr int kPairs = kScoreBlocks / 2;
    // The next fragment is loaded before the MMAs of the current one: with two warps a scheduler
    // nothing else hides the latency.
    const uint32_t lane_address = k_tile + swizzled(token, half);
    uint32_t r[2][4];
    ptx::ldmatrix_x4(r[0], lane_address);
#pragma unroll
    for (int k = 0; k < kDepthSteps; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        ptx::ldmatrix_x4(a[b], stepped(row_address, 0, k * 2) + b * kEntryBytes);
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int next = k * kPairs + pair + 1;
        if (next < kDepthSteps * kPairs) {
          ptx::ldmatrix_x4(r[next % 2],
                           stepped(lane_address, next % kPairs * 16, next / kPairs * 2));
        }
        const auto& f = r[(next - 1) % 2];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(scores[b][2 * pair], a[b], f[0], f[1]);
          ptx::mma_m16n8k16<Element>(scores[b][2 * pair + 1], a[b], f[2], f[3]);
        }
      }
    }
    if (left < kBlockRows) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) mask_tokens(scores[b], lane, left);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float rescale[2];
      if (probabilities(rows[b], scores[b], scale_log2, rescale)) rescale_out(rows[b], rescale);
#pragma unroll
      for (int t = 0; t < kTokenSteps; ++t) pack_probabilities(p_[b][t], scores[b], t);
    }
  }

  /// out += P V.
  __device__ __forceinline__ void accumulate(uint32_t v_tile, RowBlock* rows) {
    const int lane = ptx::opaque(lane_);
    const int token = (lane & 7) + ((lane >> 3) & 1) * 8;
    const int half = lane >> 4;
    constexpr int kPairs = kOutBlocks / 2;
    const uint32_t lane_address = v_tile + swizzled(token, half);
    uint32_t r[2][4];
    ptx::ldmatrix_x4_trans(r[0], lane_address);
#pragma unroll
    for (int t = 0; t < kTokenSteps; ++t) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int next = t * kPairs + pair + 1;
        if (next < kTokenSteps * kPairs) {
          ptx::ldmatrix_x4_trans(r[next % 2],
                                 stepped(lane_address, next / kPairs * 16, next % kPairs * 2));
        }
        const auto& f = r[(next - 1) % 2];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(rows[b].out[2 * pair], p_[b][t], f[0], f[1]);
          ptx::mma_m16n8k16<Element>(rows[b].out[2 * pair + 1], p_[b][t], f[2], f[3]);
        }
      }
    }
  }

 private:
  static constexpr int kBlocks = Config::kRowBlocks;

  const uint32_t q_;  // of this warp's rows
  const int32_t lane_;
  uint32_t p_[kBlocks][kTokenSteps][4];  // of the tile
};

}  // namespace pat

#endif
