// SPDX-License-Identifier: MIT
// A wide tile's step: 64 or 128 query rows times 64 tokens by the four warps of a block.
// Warp w owns rows 16 w .. 16 w + 15 of every block of 64, with both instruction sets, so that it can
// go on alone with its rows' private runs.
#pragma once

#include "rows.cuh"
#include "wgmma.cuh"

namespace pat {

/// Tokens from `valid` on do not exist.
template <int kScoreBlocks>
__device__ __forceinline__ void mask_tokens(float (&scores)[kScoreBlocks][4], int32_t lane,
                                            int32_t valid) {
#pragma unroll
  for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + (lane & 3) * 2 + (i & 1) >= valid) scores[n][i] = -INFINITY;
    }
  }
}

inline constexpr int kScoreBlocks = kBlockRows / 8;   // n8 blocks of the scores
inline constexpr int kTokenSteps = kBlockRows / 16;   // MMA steps along the tokens

#if defined(PAT_PATH_SM90)

template <typename Config>
class BlockTile {
 public:
  /// `q`: Q of the item in shared memory, blocks of 64 rows.
  __device__ BlockTile(uint32_t q, int32_t warp, int32_t lane) : q_(q), lane_(lane) {}

  /// Scores of all row blocks; K may be overwritten after the next barrier of the block.
  __device__ __forceinline__ void scores(uint32_t k_tile) {
    wgmma::fence();
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int k = 0; k < kDepthSteps; ++k) {
        // 16 columns of d are 32 bytes of a panel row.
        const uint32_t offset = k / 4 * kPanelBytes + k % 4 * 32;
        wgmma::mma_shared(scores_[b], wgmma::descriptor(q_ + b * kEntryBytes + offset),
                          wgmma::descriptor(k_tile + offset), k > 0);
      }
      wgmma::commit();
    }
    wgmma::wait<0>();
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) wgmma::pin(scores_[b]);
  }

  /// Softmax of one block and out += P V while the next block's softmax runs.
  __device__ __forceinline__ void accumulate(uint32_t v_tile, int32_t valid, RowBlock* rows,
                                             float scale_log2) {
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
      if (valid < kBlockRows) mask_tokens(scores_[b], lane_, valid);
      auto& block = reinterpret_cast<float(&)[1][kScoreBlocks][4]>(scores_[b]);
      online_softmax(rows + b, block, scale_log2);
      uint32_t p[kTokenSteps][4];
#pragma unroll
      for (int t = 0; t < kTokenSteps; ++t) pack_probabilities(p[t], scores_[b], t);
      wgmma::pin(rows[b].out);
      wgmma::fence();
#pragma unroll
      for (int t = 0; t < kTokenSteps; ++t) {
        wgmma::mma_registers(rows[b].out, p[t],
                             wgmma::descriptor(v_tile + t * 16 * kPanelRowBytes));
      }
      wgmma::commit();
    }
    wgmma::wait<0>();
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) wgmma::pin(rows[b].out);
  }

 private:
  const uint32_t q_;
  const int32_t lane_;
  float scores_[Config::kRowBlocks][kScoreBlocks][4];
};

#else

template <typename Config>
class BlockTile {
 public:
  /// `q`: Q of the item in shared memory, blocks of 64 rows.
  __device__ BlockTile(uint32_t q, int32_t warp, int32_t lane)
      : q_(q + warp * kSliceBytes), lane_(lane) {}

  __device__ __forceinline__ void scores(uint32_t k_tile) {
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[b][n][i] = 0.f;
      }
    }
    const int token = (lane_ & 7) + ((lane_ >> 4) << 3);
    const int half = (lane_ >> 3) & 1;
    constexpr int kPairs = kScoreBlocks / 2;
    // The next fragment is loaded before the MMAs of the current one: with two warps a scheduler
    // nothing else hides the latency.
    const uint32_t lane_address = k_tile + swizzled(token, half);
    uint32_t r[2][4];
    ptx::ldmatrix_x4(r[0], lane_address);
#pragma unroll
    for (int k = 0; k < kDepthSteps; ++k) {
      uint32_t a[Config::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
        const uint32_t row_address = q_ + b * kEntryBytes + swizzled(lane_ & 15, lane_ >> 4);
        ptx::ldmatrix_x4(a[b], stepped(row_address, 0, k * 2));
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
        for (int b = 0; b < Config::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(scores_[b][2 * pair], a[b], f[0], f[1]);
          ptx::mma_m16n8k16<Element>(scores_[b][2 * pair + 1], a[b], f[2], f[3]);
        }
      }
    }
  }

  /// Softmax and out += P V.
  __device__ __forceinline__ void accumulate(uint32_t v_tile, int32_t valid, RowBlock* rows,
                                             float scale_log2) {
    if (valid < kBlockRows) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) mask_tokens(scores_[b], lane_, valid);
    }
    online_softmax(rows, scores_, scale_log2);
    const int token = (lane_ & 7) + ((lane_ >> 3) & 1) * 8;
    const int half = lane_ >> 4;
    constexpr int kPairs = kOutBlocks / 2;
    const uint32_t lane_address = v_tile + swizzled(token, half);
    uint32_t r[2][4];
    ptx::ldmatrix_x4_trans(r[0], lane_address);
#pragma unroll
    for (int t = 0; t < kTokenSteps; ++t) {
      uint32_t p[Config::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) pack_probabilities(p[b], scores_[b], t);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int next = t * kPairs + pair + 1;
        if (next < kTokenSteps * kPairs) {
          ptx::ldmatrix_x4_trans(r[next % 2],
                                 stepped(lane_address, next / kPairs * 16, next % kPairs * 2));
        }
        const auto& f = r[(next - 1) % 2];
#pragma unroll
        for (int b = 0; b < Config::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(rows[b].out[2 * pair], p[b], f[0], f[1]);
          ptx::mma_m16n8k16<Element>(rows[b].out[2 * pair + 1], p[b], f[2], f[3]);
        }
      }
    }
  }

 private:
  const uint32_t q_;  // of this warp's rows
  const int32_t lane_;
  float scores_[Config::kRowBlocks][kScoreBlocks][4];
};

#endif

}  // namespace pat
