// SPDX-License-Identifier: MIT
// A wide tile's step. On Hopper 64 query rows times 64 tokens by one half of a block; warp w owns rows
// 16 w .. 16 w + 15, with both instruction sets, so that it can go on alone with its rows' private runs.
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

inline constexpr int kScoreBlocks = kBlockRows / 8;  // n8 blocks of the scores
inline constexpr int kTokenSteps = kBlockRows / 16;  // MMA steps along the tokens

#if defined(PAT_PATH_SM90)

/// The shared run of a wide item: 64 rows of it, by one warpgroup. The tensor cores go on with P V of a
/// tile while the softmax of the next one runs; the block's other half fills what is left of their time.
class SharedRun {
 public:
  /// `q`: of the warp's rows. From registers it leaves the tensor cores all of the shared memory's rate:
  /// with 64 tokens a step, Q takes as much of it as K.
  __device__ SharedRun(const QueryFragment& q, RowBlock& rows, float scale_log2)
      : q_(q), rows_(rows), scale_log2_(scale_log2) {}

  /// `ring` gives the tiles in order, the descriptor's low word of the next K (V) once it has arrived, and
  /// takes them back in the same order; see EntryRing.
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
      uint32_t k, v;
      ring.await_both(k, v);
      issue_scores(k);
      issue_output(v);
      if (left > kBlockRows) ring.look_ahead();
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
  __device__ __forceinline__ void issue_scores(uint32_t k) {
    wgmma::pin(scores_);
    wgmma::fence();
#pragma unroll
    for (int i = 0; i < kDepthSteps; ++i) {
      // 16 columns of d are 32 bytes of a panel row.
      const uint32_t offset = wgmma::offset(i / 4 * kPanelBytes + i % 4 * 32);
      wgmma::mma_scores(scores_, q_.of_step[i], k + offset, i > 0);
    }
    wgmma::commit();
  }

  __device__ __forceinline__ void issue_output(uint32_t v) {
    wgmma::pin(rows_.out);
    wgmma::fence();
#pragma unroll
    for (int t = 0; t < kTokenSteps; ++t) {
      wgmma::mma_output(rows_.out, p_[t], v + wgmma::offset(t * kSliceBytes));
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

  const QueryFragment& q_;
  RowBlock& rows_;
  const float scale_log2_;
  float scores_[kScoreBlocks][4];
  uint32_t p_[kTokenSteps][4];
};

#endif

}  // namespace pat
