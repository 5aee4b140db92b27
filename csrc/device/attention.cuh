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

/// From a lane's address of (row, chunk) to that of (row + down, chunk + right). Compile-time steps
/// leave one XOR for every other `right` and an immediate: `down` is a multiple of 8, `right` even
/// and `chunk` below 2, tiles start at multiples of 128 bytes.
__device__ __forceinline__ uint32_t stepped(uint32_t address, int down, int right) {
  return (address ^ ((right & 7) << 4)) + (right & ~7) * 16 + down * kRowBytes;
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

  /// Computes one piece, a pair of item and KV head, and writes its outputs or partials. Returns
  /// what `draw` gave, which is called when the last tile starts: late enough not to hoard pieces
  /// that idle units could take, early enough to hide its latency.
  template <typename Draw>
  __device__ int32_t run(int32_t piece, const Draw& draw) {
    const Item item = load(piece);
    const int32_t kv_head = piece % params_.num_kv_heads;
    const int32_t tokens = item.tokens();
    const int32_t tiles = (tokens + Config::kTokens - 1) / Config::kTokens;
    SlotWalk walk(item);
    // Column of this lane's 16-byte chunk in every row of K and V.
    const int32_t column = kv_head * kHeadDim + lane_ % kRowChunks * 8;

    int32_t slot = fetch_slot(walk, 0, tokens);
    int32_t next_slot = fetch_slot(walk, 1, tokens);
    auto issue = [&]<bool kPrologue>(int32_t step) __attribute__((always_inline)) {
      const int32_t tile = step >> 1;
      if (tile < tiles) {
        const int32_t valid = tokens - tile * Config::kTokens;
        if ((step & 1) == 0) {
          load_entry(entry(step), params_.k_cache, params_.k_slot_stride, column, slot, valid);
        } else {
          load_entry(entry(step), params_.v_cache, params_.v_slot_stride, column, slot, valid);
          if constexpr (kSlotsAhead) {
            slot = next_slot;
            next_slot = fetch_slot(walk, tile + 2, tokens);
          } else {
            slot = kPrologue && tile == 0 ? next_slot : fetch_slot(walk, tile + 1, tokens);
          }
        }
      }
      ptx::cp_async_commit();  // also when empty: the waits below count groups
    };
    // Q first: in two-block tiles it goes through shared memory, in the first group.
    load_q(item, kv_head);
#pragma unroll
    for (int step = 0; step < Config::kStages - 1; ++step) issue.template operator()<true>(step);

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

    int32_t next = 0;
    for (int32_t tile = 0; tile < tiles; ++tile) {
      if (tile == tiles - 1) next = draw();
      const int32_t valid = tokens - tile * Config::kTokens;
      await_step();
      issue.template operator()<false>(2 * tile + Config::kStages - 1);
      scores(entry(2 * tile));
      softmax(valid);
      await_step();
      issue.template operator()<false>(2 * tile + Config::kStages);
      accumulate(entry(2 * tile + 1));
    }
    if (tiles == 0) next = draw();
    ptx::cp_async_wait<0>();
    write(piece);
    // The next item's loads overwrite entries that slower warps of the unit may still read.
    unit_barrier<Config>(unit_);
    return next;
  }

 private:
  static constexpr int kWarpRows = 16 * Config::kRowBlocks;
  // Slots are fetched two tiles before their K is issued, or one where registers are short and a
  // half step of compute covers the latency (after the first two tiles).
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

  __device__ __forceinline__ int32_t fetch_slot(SlotWalk& walk, int32_t tile,
                                                int32_t tokens) const {
    const int32_t token = tile * Config::kTokens + warp_ * Config::kWarpTokens + lane_;
    const bool mine = lane_ < Config::kWarpTokens && token < tokens;
    return mine ? walk.slot(tables_, params_.slots, token) : 0;
  }

  /// This warp's share of one ring entry. `valid` tokens of the tile exist; the rest become zeros.
  __device__ __forceinline__ void load_entry(uint32_t to, const void* cache, int64_t slot_stride,
                                             int32_t column, int32_t slot, int32_t valid) const {
    const int lane = ptx::opaque(lane_);
    const int first = warp_ * Config::kWarpTokens + lane / kRowChunks;
    const uint32_t lane_address = to + swizzled(first, lane % kRowChunks);
#pragma unroll
    for (int pass = 0; pass < Config::kWarpTokens / kRowsPerLoad; ++pass) {
      // Rows advance by 2 or 4, so the swizzle's row bits advance by XOR: `first` is below them.
      const int down = pass * kRowsPerLoad;
      const uint32_t address = (lane_address ^ ((down & 7) << 4)) + down * kRowBytes;
      const int32_t from = __shfl_sync(0xffffffffu, slot, down + lane / kRowChunks);
      ptx::cp_async_16(address, static_cast<const Element*>(cache) + from * slot_stride + column,
                       first + down < valid);
    }
  }

  /// Lane l's query row of this warp's 16 or 32; lanes beyond the item repeat its first row.
  __device__ __forceinline__ QueryRow my_query_row(const Item& item, int32_t kv_head) const {
    const int r = warp_ * kWarpRows + lane_;
    const bool valid = lane_ < kWarpRows && r < item.query_rows;
    return QueryRow(tables_, item, valid ? r : 0, kv_head, params_.group_size);
  }

  __device__ __forceinline__ void load_q(const Item& item, int32_t kv_head) {
    const QueryRow mine = my_query_row(item, kv_head);
    const int64_t my_offset = mine.row * params_.q_row_stride + mine.head * kHeadDim;
    const Element* q = static_cast<const Element*>(params_.q);
    if constexpr (Config::kSharedQ) {
      // Each warp brings the rows it will read itself, so that the ring's wait covers them.
      const int chunk = lane_ % kRowChunks;
#pragma unroll
      for (int pass = 0; pass < kWarpRows / kRowsPerLoad; ++pass) {
        const int in_warp = pass * kRowsPerLoad + lane_ / kRowChunks;
        const int r = warp_ * kWarpRows + in_warp;
        const int64_t offset = __shfl_sync(0xffffffffu, my_offset, in_warp);
        ptx::cp_async_16(shared_ + swizzled(r, chunk), q + offset + chunk * 8, r < item.query_rows);
      }
    } else {
      // MMA fragments straight from global memory: 4 bytes a lane and register.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int in_warp = half * 8 + lane_ / 4;
        const int64_t offset = __shfl_sync(0xffffffffu, my_offset, in_warp);
        const bool valid = warp_ * kWarpRows + in_warp < item.query_rows;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(q + offset) + lane_ % 4;
#pragma unroll
        for (int k = 0; k < kDepthSteps; ++k) {
          q_[k][half] = valid ? __ldg(from + k * 8) : 0u;
          q_[k][half + 2] = valid ? __ldg(from + k * 8 + 4) : 0u;
        }
      }
    }
  }

  /// scores_ = Q K^T for the tile; tokens that do not exist are zeros in shared memory.
  __device__ __forceinline__ void scores(uint32_t k_tile) {
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
    constexpr int kPairs = Config::kScoreBlocks / 2;
    // The next fragment is loaded before the MMAs of the current one: with two warps a scheduler
    // nothing else hides the latency.
    const uint32_t lane_address = k_tile + swizzled(token, half);
    uint32_t r[2][4];
    ptx::ldmatrix_x4(r[0], lane_address);
#pragma unroll
    for (int k = 0; k < kDepthSteps; ++k) {
      uint32_t a[Config::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) q_fragment(a[b], b, k);
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

  __device__ __forceinline__ void q_fragment(uint32_t (&a)[4], int block, int k) const {
    if constexpr (Config::kSharedQ) {
      const int row = warp_ * Config::kRowBlocks * 16 + (lane_ & 15);
      ptx::ldmatrix_x4(a, stepped(shared_ + swizzled(row, lane_ >> 4), block * 16, k * 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q_[k][i];
    }
  }

  /// Online softmax in base 2: scores_ become probabilities, out_ and row_sum_ are rescaled.
  /// Loops run over the rows innermost: a row's maximum and sum are chains, several side by side
  /// hide their latency.
  __device__ __forceinline__ void softmax(int32_t valid) {
    if (valid < Config::kTokens) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
        for (int n = 0; n < Config::kScoreBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (n * 8 + (lane_ & 3) * 2 + (i & 1) >= valid) scores_[b][n][i] = -INFINITY;
          }
        }
      }
    }
    float top[Config::kRowBlocks][2], shift[Config::kRowBlocks][2], rescale[Config::kRowBlocks][2];
    bool moved = false;
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) top[b][half] = row_max_[b][half];
    }
#pragma unroll
    for (int n = 0; n < Config::kScoreBlocks; ++n) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          top[b][half] =
              fmaxf(top[b][half], fmaxf(scores_[b][n][2 * half], scores_[b][n][2 * half + 1]));
        }
      }
    }
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          top[b][half] = fmaxf(top[b][half], __shfl_xor_sync(0xffffffffu, top[b][half], step));
        }
      }
    }
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A tile has at least one token, so the maximum is -inf only if every score is: then exp2
        // of (-inf - -inf) would be NaN.
        shift[b][half] = top[b][half] == -INFINITY ? 0.f : top[b][half] * params_.scale_log2;
        rescale[b][half] = ptx::exp2(row_max_[b][half] * params_.scale_log2 - shift[b][half]);
        moved |= top[b][half] != row_max_[b][half];
        row_max_[b][half] = top[b][half];
        row_sum_[b][half] *= rescale[b][half];
      }
    }
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
        for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out_[b][n][i] *= rescale[b][i / 2];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kScoreBlocks; ++n) {
#pragma unroll
      for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores_[b][n][i];
          score = ptx::exp2(score * params_.scale_log2 - shift[b][i / 2]);
          row_sum_[b][i / 2] += score;
        }
      }
    }
  }

  /// out_ += P V for the tile.
  __device__ __forceinline__ void accumulate(uint32_t v_tile) {
    const int token = (lane_ & 7) + ((lane_ >> 3) & 1) * 8;
    const int half = lane_ >> 4;
    constexpr int kPairs = kOutBlocks / 2;
    constexpr int kSteps = Config::kTokens / 16;
    const uint32_t lane_address = v_tile + swizzled(token, half);
    uint32_t r[2][4];
    ptx::ldmatrix_x4_trans(r[0], lane_address);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
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
      for (int pair = 0; pair < kPairs; ++pair) {
        const int next = t * kPairs + pair + 1;
        if (next < kSteps * kPairs) {
          ptx::ldmatrix_x4_trans(r[next % 2],
                                 stepped(lane_address, next / kPairs * 16, next % kPairs * 2));
        }
        const auto& f = r[(next - 1) % 2];
#pragma unroll
        for (int b = 0; b < Config::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<Element>(out_[b][2 * pair], p[b], f[0], f[1]);
          ptx::mma_m16n8k16<Element>(out_[b][2 * pair + 1], p[b], f[2], f[3]);
        }
      }
    }
  }

  /// Normalised output to `out` (a row's only item) or to its partial slot with its log-sum-exp.
  __device__ __forceinline__ void write(int32_t piece) {
    // NOTE: read again, from L1, rather than kept in registers through the loop.
    const Item item = load(piece);
    const QueryRow mine = my_query_row(item, piece % params_.num_kv_heads);
#pragma unroll
    for (int b = 0; b < Config::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = row_sum_[b][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int in_warp = b * 16 + half * 8 + lane_ / 4;
        const int32_t row = __shfl_sync(0xffffffffu, mine.row, in_warp);
        const int32_t head = __shfl_sync(0xffffffffu, mine.head, in_warp);
        const int32_t part = __shfl_sync(0xffffffffu, mine.part, in_warp);
        if (warp_ * kWarpRows + in_warp >= item.query_rows) continue;
        // No token: zeros when final, weight zero (-inf) when partial.
        float inverse = sum == 0.f ? 0.f : 1.f / sum;
        if (item.overflowed) inverse = NAN;
        if (part < 0) {
          uint32_t* to = reinterpret_cast<uint32_t*>(
              static_cast<Element*>(params_.out) + row * params_.out_row_stride + head * kHeadDim);
#pragma unroll
          for (int n = 0; n < kOutBlocks; ++n) {
            to[n * 4 + lane_ % 4] = ptx::pack<Element>(out_[b][n][2 * half] * inverse,
                                                       out_[b][n][2 * half + 1] * inverse);
          }
        } else {
          const int64_t index = int64_t{part} * params_.num_q_heads + head;
          if (lane_ % 4 == 0) {
            float lse = row_max_[b][half] * params_.scale_log2 + log2f(sum);
            if (sum == 0.f) lse = -INFINITY;
            params_.partial_lse[index] = item.overflowed ? NAN : lse;
          }
          if (sum == 0.f) continue;  // the merge skips it, nobody reads the values
          float2* to = reinterpret_cast<float2*>(params_.partial_out + index * kHeadDim);
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
