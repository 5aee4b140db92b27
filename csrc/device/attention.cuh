// SPDX-License-Identifier: MIT
// One work item computed by one unit of 1, 2 or 4 warps.
//
//   ring step    0    1    2    3    4   ...      a ring entry is one tile of K or of V
//   contents     K0   V0   K1   V1   K2  ...      kStages entries, kStages - 1 in flight
//   at step 2i   S = Q Ki^T, online softmax       every warp owns 16 or 32 query rows and
//   at step 2i+1 O += P Vi                        reads all tokens of the tile
//
// Each warp loads kWarpTokens tokens of every tile: lane l knows the slot of token l and hands it to
// the lanes that copy it. One barrier of the unit a ring step: after it the entry of this step is
// complete for all warps, and the entry of the previous step is free.
//
// Shared memory of a unit: [Q (two-block tiles only)][entry 0]...[entry kStages - 1]; rows of
// kRowBytes, 16-byte chunk c of row r stored at chunk c ^ (r & 7) (conflict-free for ldmatrix).
#pragma once

#include "item.cuh"

namespace pat {

/// Shared-memory offset of a 16-byte chunk within a tile.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

template <typename Config>
__device__ __forceinline__ void unit_barrier(int unit) {
  if constexpr (Config::kUnitWarps == 1) {
    __syncwarp();
  } else {
    // Barrier 0 for whole-block units, 1.. for the units of smaller tiles.
    ptx::named_barrier<Config::kUnitThreads>(Config::kUnits == 1 ? 0 : 1 + unit);
  }
}

template <typename Config>
class ItemAttention {
 public:
  __device__ ItemAttention(const DecodeParams& params, const Tables& tables, uint32_t shared)
      : params_(params),
        tables_(tables),
        shared_(shared),
        unit_(threadIdx.x / Config::kUnitThreads),
        warp_(threadIdx.x / 32 % Config::kUnitWarps),
        lane_(threadIdx.x % 32) {}

  /// Computes one piece, a pair of item and KV head, and writes its outputs or partials.
  __device__ void run(int32_t piece) {
    const Item item = load(piece);
    const int32_t kv_head = piece % params_.num_kv_heads;
    const int32_t tokens = item.tokens();
    const int32_t tiles = (tokens + Config::kTokens - 1) / Config::kTokens;
    SlotWalk walk(item);
    // Column of this lane's 16-byte chunk in every row of K and V.
    const int32_t column = kv_head * kHeadDim + lane_ % kRowChunks * 8;

    int32_t slot = fetch_slot(walk, 0, tokens);
    int32_t next_slot = kSlotsAhead ? fetch_slot(walk, 1, tokens) : 0;
    auto issue = [&](int32_t step) {
      const int32_t tile = step >> 1;
      if (tile < tiles) {
        const int32_t valid = tokens - tile * Config::kTokens;
        if ((step & 1) == 0) {
          load_entry(step, params_.k_cache, params_.k_slot_stride, column, slot, valid);
        } else {
          load_entry(step, params_.v_cache, params_.v_slot_stride, column, slot, valid);
          slot = kSlotsAhead ? next_slot : fetch_slot(walk, tile + 1, tokens);
          if constexpr (kSlotsAhead) next_slot = fetch_slot(walk, tile + 2, tokens);
        }
      }
      ptx::cp_async_commit();  // also when empty: the waits below count groups
    };
    // Q first: in two-block tiles it goes through shared memory, in the first group.
    load_q(item, kv_head);
#pragma unroll
    for (int step = 0; step < Config::kStages - 1; ++step) issue(step);

#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
      row_max_[b][0] = row_max_[b][1] = -INFINITY;
      row_sum_[b][0] = row_sum_[b][1] = 0.f;
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[b][n][i] = 0.f;
      }
    }

    for (int32_t tile = 0; tile < tiles; ++tile) {
      const int32_t valid = tokens - tile * Config::kTokens;
      await_step();
      issue(2 * tile + Config::kStages - 1);
      scores(entry(2 * tile), valid);
      softmax(valid);
      await_step();
      issue(2 * tile + Config::kStages);
      accumulate(entry(2 * tile + 1), valid);
    }
    ptx::cp_async_wait<0>();
    write(piece);
    // The next item's loads overwrite entries that slower warps of the unit may still read.
    unit_barrier<Config>(unit_);
  }

 private:
  // Slots are fetched two tiles before their K is issued, or one where registers are short and a
  // half step of compute covers the latency.
  static constexpr bool kSlotsAhead = Config::kRowBlocks == 1;

  __device__ Item load(int32_t piece) const {
    const int32_t first = tables_.header(kHeaderItemBegin + Config::kTile);
    return load_item(tables_, params_.live_lens, first + piece / params_.num_kv_heads);
  }

  /// The entry of this step has arrived for the whole unit; the previous step's entry is free.
  __device__ void await_step() const {
    ptx::cp_async_wait<Config::kStages - 2>();
    unit_barrier<Config>(unit_);
  }

  __device__ uint32_t entry(int32_t step) const {
    return shared_ + Config::kQBytes + (step % Config::kStages) * Config::kEntryBytes;
  }

  __device__ int32_t fetch_slot(SlotWalk& walk, int32_t tile, int32_t tokens) const {
    const int32_t token = tile * Config::kTokens + warp_ * Config::kWarpTokens + lane_;
    const bool mine = lane_ < Config::kWarpTokens && token < tokens;
    return mine ? walk.slot(tables_, params_.slots, token) : 0;
  }

  /// This warp's share of one ring entry. `valid` tokens of the tile exist; the rest become zeros.
  __device__ void load_entry(int32_t step, const void* cache, int64_t slot_stride, int32_t column,
                             int32_t slot, int32_t valid) const {
    const uint32_t to = entry(step);
    const int chunk = lane_ % kRowChunks;
#pragma unroll
    for (int pass = 0; pass < Config::kWarpTokens / kRowsPerLoad; ++pass) {
      const int in_warp = pass * kRowsPerLoad + lane_ / kRowChunks;
      const int row = warp_ * Config::kWarpTokens + in_warp;
      const int32_t from = __shfl_sync(0xffffffffu, slot, in_warp);
      ptx::cp_async_16(to + swizzled(row, chunk),
                       static_cast<const Element*>(cache) + from * slot_stride + column,
                       row < valid);
    }
  }

  __device__ void load_q(const Item& item, int32_t kv_head) {
    const Element* q = static_cast<const Element*>(params_.q);
    if constexpr (Config::kSharedQ) {
      // Each warp brings the rows it will read itself, so that the ring's wait covers them.
      constexpr int kWarpRows = 16 * Config::kRowBlocks;
      const int chunk = lane_ % kRowChunks;
#pragma unroll
      for (int pass = 0; pass < kWarpRows / kRowsPerLoad; ++pass) {
        const int r = warp_ * kWarpRows + pass * kRowsPerLoad + lane_ / kRowChunks;
        const bool valid = r < item.query_rows;
        const QueryRow at(tables_, item, valid ? r : 0, kv_head, params_.group_size);
        const Element* from = q + at.row * params_.q_row_stride + at.head * kHeadDim + chunk * 8;
        ptx::cp_async_16(shared_ + swizzled(r, chunk), from, valid);
      }
    } else {
      // MMA fragments straight from global memory: 4 bytes a lane and register.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = warp_ * 16 + half * 8 + lane_ / 4;
        const bool valid = r < item.query_rows;
        const QueryRow at(tables_, item, valid ? r : 0, kv_head, params_.group_size);
        const uint32_t* from = reinterpret_cast<const uint32_t*>(q + at.row * params_.q_row_stride +
                                                                 at.head * kHeadDim);
#pragma unroll
        for (int k = 0; k < kDepthSteps; ++k) {
          q_[k][half] = valid ? __ldg(from + k * 8 + lane_ % 4) : 0u;
          q_[k][half + 2] = valid ? __ldg(from + k * 8 + lane_ % 4 + 4) : 0u;
        }
      }
    }
  }

  /// scores_ = Q K^T for the tile, skipping blocks of 16 tokens that do not exist.
  __device__ void scores(uint32_t k_tile, int32_t valid) {
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < Config::kScoreBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[b][n][i] = 0.f;
      }
    }
    const int token = (lane_ & 7) + ((lane_ >> 4) << 3);
    const int half = (lane_ >> 3) & 1;
#pragma unroll
    for (int k = 0; k < kDepthSteps; ++k) {
      uint32_t a[Config::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) q_fragment(a[b], b, k);
#pragma unroll
      for (int n = 0; n < Config::kScoreBlocks; n += 2) {
        if (n * 8 < valid) {
          uint32_t r[4];
          ptx::ldmatrix_x4(r, k_tile + swizzled(n * 8 + token, k * 2 + half));
#pragma unroll
          for (int b = 0; b < Config::kRowBlocks; ++b) {
            ptx::mma_m16n8k16<Element>(scores_[b][n], a[b], r[0], r[1]);
            ptx::mma_m16n8k16<Element>(scores_[b][n + 1], a[b], r[2], r[3]);
          }
        }
      }
    }
  }

  __device__ void q_fragment(uint32_t (&a)[4], int block, int k) const {
    if constexpr (Config::kSharedQ) {
      const int row = (warp_ * Config::kRowBlocks + block) * 16 + (lane_ & 15);
      ptx::ldmatrix_x4(a, shared_ + swizzled(row, k * 2 + (lane_ >> 4)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q_[k][i];
    }
  }

  /// Online softmax in base 2: scores_ become probabilities, out_ and row_sum_ are rescaled.
  __device__ void softmax(int32_t valid) {
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
      if (valid < Config::kTokens) {
#pragma unroll
        for (int n = 0; n < Config::kScoreBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (n * 8 + (lane_ & 3) * 2 + (i & 1) >= valid) scores_[b][n][i] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = row_max_[b][half];
#pragma unroll
        for (int n = 0; n < Config::kScoreBlocks; ++n) {
          top = fmaxf(top, fmaxf(scores_[b][n][2 * half], scores_[b][n][2 * half + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        // A tile has at least one token, so `top` is -inf only if every score is: then exp2 of
        // (-inf - -inf) would be NaN.
        const float shift = top == -INFINITY ? 0.f : top * params_.scale_log2;
        const float rescale = ptx::exp2(row_max_[b][half] * params_.scale_log2 - shift);
        row_max_[b][half] = top;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < Config::kScoreBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores_[b][n][2 * half + i];
            score = ptx::exp2(score * params_.scale_log2 - shift);
            sum += score;
          }
        }
        row_sum_[b][half] = row_sum_[b][half] * rescale + sum;
        if (__any_sync(0xffffffffu, rescale != 1.f)) {
#pragma unroll
          for (int n = 0; n < kOutBlocks; ++n) {
            out_[b][n][2 * half] *= rescale;
            out_[b][n][2 * half + 1] *= rescale;
          }
        }
      }
    }
  }

  /// out_ += P V for the tile.
  __device__ void accumulate(uint32_t v_tile, int32_t valid) {
    const int token = (lane_ & 7) + ((lane_ >> 3) & 1) * 8;
    const int half = lane_ >> 4;
#pragma unroll
    for (int t = 0; t < Config::kTokens / 16; ++t) {
      if (t * 16 < valid) {
        uint32_t p[Config::kRowBlocks][4];
#pragma unroll
        for (int b = 0; b < Config::kRowBlocks; ++b) {
          const auto& s0 = scores_[b][2 * t];
          const auto& s1 = scores_[b][2 * t + 1];
          p[b][0] = ptx::pack<Element>(s0[0], s0[1]);
          p[b][1] = ptx::pack<Element>(s0[2], s0[3]);
          p[b][2] = ptx::pack<Element>(s1[0], s1[1]);
          p[b][3] = ptx::pack<Element>(s1[2], s1[3]);
        }
#pragma unroll
        for (int n = 0; n < kOutBlocks; n += 2) {
          uint32_t r[4];
          ptx::ldmatrix_x4_trans(r, v_tile + swizzled(t * 16 + token, n + half));
#pragma unroll
          for (int b = 0; b < Config::kRowBlocks; ++b) {
            ptx::mma_m16n8k16<Element>(out_[b][n], p[b], r[0], r[1]);
            ptx::mma_m16n8k16<Element>(out_[b][n + 1], p[b], r[2], r[3]);
          }
        }
      }
    }
  }

  /// Normalised output to `out` (a row's only item) or to its partial slot with its log-sum-exp.
  __device__ void write(int32_t piece) {
    // NOTE: read again, from L1, rather than kept in registers through the loop.
    const Item item = load(piece);
    const int32_t kv_head = piece % params_.num_kv_heads;
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum_[b][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int r = (warp_ * Config::kRowBlocks + b) * 16 + half * 8 + lane_ / 4;
        if (r >= item.query_rows) continue;
        const QueryRow at(tables_, item, r, kv_head, params_.group_size);
        // No token: zeros when final, weight zero (-inf) when partial.
        float inverse = sum == 0.f ? 0.f : 1.f / sum;
        if (item.overflowed) inverse = NAN;
        if (at.part < 0) {
          Element* to = static_cast<Element*>(params_.out) + at.row * params_.out_row_stride +
                        at.head * kHeadDim;
#pragma unroll
          for (int n = 0; n < kOutBlocks; ++n) {
            reinterpret_cast<uint32_t*>(to)[n * 4 + lane_ % 4] =
                ptx::pack<Element>(out_[b][n][2 * half] * inverse, out_[b][n][2 * half + 1] * inverse);
          }
        } else {
          const int64_t part = int64_t{at.part} * params_.num_q_heads + at.head;
          if (lane_ % 4 == 0) {
            float lse = row_max_[b][half] * params_.scale_log2 + log2f(sum);
            if (sum == 0.f) lse = -INFINITY;
            params_.partial_lse[part] = item.overflowed ? NAN : lse;
          }
          if (sum == 0.f) continue;  // the merge skips it, nobody reads the values
          float2* to = reinterpret_cast<float2*>(params_.partial_out + part * kHeadDim);
#pragma unroll
          for (int n = 0; n < kOutBlocks; ++n) {
            to[n * 4 + lane_ % 4] =
                make_float2(out_[b][n][2 * half] * inverse, out_[b][n][2 * half + 1] * inverse);
          }
        }
      }
    }
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const uint32_t shared_;
  const int unit_, warp_, lane_;

  uint32_t q_[Config::kSharedQ ? 1 : kDepthSteps][4];
  float scores_[Config::kRowBlocks][Config::kScoreBlocks][4];
  float out_[Config::kRowBlocks][kOutBlocks][4];
  float row_max_[Config::kRowBlocks][2];
  float row_sum_[Config::kRowBlocks][2];  // of this lane's columns, reduced at the end
};

}  // namespace pat
