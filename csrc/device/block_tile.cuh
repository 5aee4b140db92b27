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

/// The shared run of a wide item: 64 rows of it, by one warpgroup. The tensor cores go on with P V of a
/// tile while the softmax of the next one runs; the block's other half fills what is left of their time.
class SharedRun {
 public:
  /// `q`: the rows' Q in shared memory.
  __device__ SharedRun(uint32_t q, RowBlock& rows, float scale_log2)
      : q_(wgmma::descriptor(q)), rows_(rows), scale_log2_(scale_log2) {}

  /// `ring` gives the tiles in order, the descriptor of the next K (V) once it has arrived, and takes
  /// them back in the same order.
  template <typename Ring>
  __device__ __forceinline__ void run(int32_t tokens, Ring& ring) {
    if (tokens <= 0) return;
    issue_scores(ring.await_k());
    wgmma::wait<0>();
    ring.release_k();
    float rescale[2];
    if (probabilities_of(tokens, rescale)) rescale_out(rows_, rescale);
    pack();
    for (int32_t left = tokens - kBlockRows; left > 0; left -= kBlockRows) {
      // NOTE: all that is in flight has ended with the body. Were it not, or were accumulators
      // written between the first MMA and the wait, ptxas would make every MMA wait for the one
      // before (C7514, C7515).
      const uint64_t v = ring.await_v();
      issue_scores(ring.await_k());
      issue_output(v);
      wgmma::wait<1>();
      ring.release_k();
      const bool moved = probabilities_of(left, rescale);
      wgmma::wait<0>();
      wgmma::pin(rows_.out);
      ring.release_v();
      if (moved) rescale_out(rows_, rescale);
      pack();
    }
    issue_output(ring.await_v());
    wgmma::wait<0>();
    wgmma::pin(rows_.out);
    ring.release_v();
  }

 private:
  __device__ __forceinline__ void issue_scores(uint64_t k) {
    wgmma::pin(scores_);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kDepthSteps; ++i) {
      // 16 columns of d are 32 bytes of a panel row.
      const uint64_t offset = wgmma::offset(i / 4 * kPanelBytes + i % 4 * 32);
      wgmma::mma_shared(scores_, q_ + offset, k + offset, i > 0);
    }
    wgmma::commit();
  }

  __device__ __forceinline__ void issue_output(uint64_t v) {
    wgmma::pin(rows_.out);
    wgmma::fence();
#pragma unroll
    for (int t = 0; t < kTokenSteps; ++t) {
      wgmma::mma_registers(rows_.out, p_[t], v + wgmma::offset(t * kSliceBytes));
    }
    wgmma::commit();
  }

  /// Of the tile `left` tokens exist.
  __device__ __forceinline__ bool probabilities_of(int32_t left, float (&rescale)[2]) {
    wgmma::pin(scores_);
    if (left < kBlockRows) mask_tokens(scores_, threadIdx.x % 32, left);
    return probabilities(rows_, scores_, scale_log2_, rescale);
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int t = 0; t < kTokenSteps; ++t) pack_probabilities(p_[t], scores_, t);
  }

  const uint64_t q_;
  RowBlock& rows_;
  const float scale_log2_;
  float scores_[kScoreBlocks][4];
  uint32_t p_[kTokenSteps][4];
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
