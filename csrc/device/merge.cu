// SPDX-License-Identifier: MIT
// The merge kernel: combines the partials of each (request row, query head) that has any.
//
// out = sum_i 2^(lse_i - max) o_i / sum_i 2^(lse_i - max), in the order of the parts. Rows with a single
// work item were written by the forward kernel. Padding rows are set to zero. Everything becomes NaN when
// the plan has more rows than q, of which the forward kernel computes nothing. Block 0 resets that
// kernel's work counters, which is safe because launches of one stream run in order.
//
// It is a programmatic dependent of the forward kernel: its blocks start as those of the forward kernel
// end, read the plan, and wait for the rest. All that is left then is to read the partials once.
//
// Large batches have few parts a pair of row and head: one warp a pair. Small batches have few pairs and,
// after the KV split, many parts: eight warps a pair, joined through shared memory. The choice depends
// on the padded batch only, so it is fixed at capture.
#include <algorithm>

#include "config.cuh"
#include "launch.h"
#include "params.h"

namespace pat {
namespace {

constexpr int kLaneValues = kHeadDim / 32;  // 2 or 4 floats a lane
constexpr int kInFlight = 8;                // partials a lane
constexpr int kBlockWarps = 8;
constexpr int32_t kPairsPerSm = 4;  // up to here eight warps a pair fill the GPU
constexpr int kResidentBlocks = 3;  // of an SM; pairs beyond are taken by the same warps

/// A running combination of partials: base-2 maximum, total weight and weighted sum (of a lane).
struct State {
  float top = -INFINITY, total = 0.f;
  float sum[kLaneValues] = {};

  /// A batch of partials, -inf in `lse` for those that do not exist. NaN (a row that outgrew its tail)
  /// is no maximum, but spreads.
  __device__ __forceinline__ void add(const float (&lse)[kInFlight],
                                      const float (&values)[kInFlight][kLaneValues]) {
    float higher = top;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) higher = fmaxf(higher, lse[i]);
    const float old = top == -INFINITY ? 0.f : ptx::exp2(top - higher);
    total *= old;
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) sum[j] *= old;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (lse[i] == -INFINITY) continue;  // NOTE: what was never written may be NaN
      const float weight = ptx::exp2(lse[i] - higher);
      total += weight;
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) sum[j] += weight * values[i][j];
    }
    top = higher;
  }
};

/// The states of the warps of a block.
struct SharedStates {
  float top[kBlockWarps], total[kBlockWarps], sum[kBlockWarps][kHeadDim];

  __device__ __forceinline__ void put(const State& state) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    top[warp] = state.top;
    total[warp] = state.total;
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) sum[warp][lane * kLaneValues + j] = state.sum[j];
  }

  /// One column of the output.
  __device__ __forceinline__ float column(int c) const {
    float highest = -INFINITY, all = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) highest = fmaxf(highest, top[w]);
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      // NOTE: NaN is in total and sum, whatever the weight.
      const float weight = top[w] == -INFINITY ? 0.f : ptx::exp2(top[w] - highest);
      all += weight * total[w];
      value += weight * sum[w][c];
    }
    return all == 0.f ? 0.f : value / all;
  }
};

/// The parts of one pair of request row and query head; none: a padding row, or, with a negative `begin`,
/// one of a plan that has more rows than q.
struct Pair {
  int32_t row, head, begin, end;
};

/// Up to 32 pairs of a worker, one a lane, so that the plan is read once for all of them.
class Pairs {
 public:
  /// Pairs first, first + stride, ...
  /// NOTE: load_l2 is volatile. Other loads ptxas moves behind the wait that they are to be ahead of.
  __device__ Pairs(const DecodeParams& params, int32_t first, int32_t stride) : pair_{} {
    const int32_t rows = ptx::load_l2(params.plan + kHeaderRows);
    const int32_t part_ptr_offset = ptx::load_l2(params.plan + kHeaderOffPartPtr);
    const int32_t index = first + static_cast<int32_t>(threadIdx.x % 32) * stride;
    pair_.row = index / params.num_q_heads;
    pair_.head = index % params.num_q_heads;
    const bool exists = pair_.row < params.rows_padded, fits = rows <= params.rows_padded;
    if (!fits) {
      pair_.begin = pair_.end = -1;
    } else if (pair_.row < rows) {
      const int32_t* part_ptr = params.plan + part_ptr_offset + pair_.row;
      pair_.begin = ptx::load_l2(part_ptr);
      pair_.end = ptx::load_l2(part_ptr + 1);
    }
    // A row without parts was written by the forward kernel.
    left_ = __ballot_sync(0xffffffffu,
                          exists && (!fits || pair_.row >= rows || pair_.begin < pair_.end));
  }

  __device__ bool is_empty() const { return left_ == 0; }
  __device__ Pair take() {
    const int lane = __ffs(static_cast<int>(left_)) - 1;
    left_ &= left_ - 1;
    return {__shfl_sync(0xffffffffu, pair_.row, lane), __shfl_sync(0xffffffffu, pair_.head, lane),
            __shfl_sync(0xffffffffu, pair_.begin, lane), __shfl_sync(0xffffffffu, pair_.end, lane)};
  }

 private:
  Pair pair_;
  uint32_t left_;
};

/// Partials first, first + stride, ... of a pair.
__device__ __forceinline__ State combine(const DecodeParams& params, const Pair& pair,
                                         int32_t first, int32_t stride) {
  const int lane = threadIdx.x % 32;
  State state;
  if (pair.begin < 0) state.total = NAN;
#pragma unroll 1
  for (int32_t batch = pair.begin + first; batch < pair.end; batch += kInFlight * stride) {
    float lse[kInFlight], values[kInFlight][kLaneValues];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int32_t part = batch + i * stride;
      const int64_t index = int64_t{part} * params.num_q_heads + pair.head;
      ptx::load_l2(lse[i], params.partial_lse + index, part < pair.end);
      ptx::load_l2(values[i], params.partial_out + index * kHeadDim + lane * kLaneValues,
                   part < pair.end);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (batch + i * stride >= pair.end) lse[i] = -INFINITY;
    }
    state.add(lse, values);
  }
  return state;
}

__device__ __forceinline__ void store(const DecodeParams& params, const Pair& pair,
                                      const State& state) {
  uint32_t packed[kLaneValues / 2];
  const float inverse = state.total == 0.f ? 0.f : 1.f / state.total;  // no token, padding: zeros
#pragma unroll
  for (int i = 0; i < kLaneValues / 2; ++i) {
    packed[i] = ptx::pack<Element>(state.sum[2 * i] * inverse, state.sum[2 * i + 1] * inverse);
  }
  Element* to = static_cast<Element*>(params.out) + int64_t{pair.row} * params.out_row_stride +
                pair.head * kHeadDim + threadIdx.x % 32 * kLaneValues;
  if constexpr (kLaneValues == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
  } else {
    *reinterpret_cast<uint32_t*>(to) = packed[0];
  }
}

template <int kWarpsPerPair>
__global__ void __launch_bounds__(kBlockWarps * 32, kResidentBlocks)
    merge_kernel(const __grid_constant__ DecodeParams params) {
  static_assert(kWarpsPerPair == 1 || kWarpsPerPair == kBlockWarps, "a block joins one pair");
  constexpr int kPairsPerBlock = kBlockWarps / kWarpsPerPair;
  const int32_t pairs = params.rows_padded * params.num_q_heads;
  const int32_t stride = gridDim.x * kPairsPerBlock;
  const int warp = threadIdx.x / 32;
  int32_t first = blockIdx.x * kPairsPerBlock + (kWarpsPerPair == 1 ? warp : 0);
  Pairs mine(params, first, stride);
  ptx::wait_for_previous_kernel();  // NOTE: by every block, or the grid could end before it
  if (blockIdx.x == 0 && threadIdx.x < kNumTiles) params.counters[threadIdx.x] = 0;
#pragma unroll 1
  while (true) {
#pragma unroll 1
    while (!mine.is_empty()) {
      const Pair pair = mine.take();
      if constexpr (kWarpsPerPair == 1) {
        store(params, pair, combine(params, pair, 0, 1));
      } else {
        __shared__ SharedStates states;
        states.put(combine(params, pair, warp, kBlockWarps));
        __syncthreads();
        if (threadIdx.x < kHeadDim) {
          Element* to = static_cast<Element*>(params.out) +
                        int64_t{pair.row} * params.out_row_stride + pair.head * kHeadDim;
          to[threadIdx.x] = Element(states.column(threadIdx.x));
        }
        __syncthreads();  // the next pair's states take their place
      }
    }
    first += 32 * stride;
    if (first >= pairs) return;
    mine = Pairs(params, first, stride);
  }
}

template <int kWarpsPerPair>
cudaError_t launch_variant(const DecodeParams& params, int32_t num_sms, cudaStream_t stream) {
  constexpr int kPairsPerBlock = kBlockWarps / kWarpsPerPair;
  const int32_t pairs = params.rows_padded * params.num_q_heads;
  const int32_t blocks =
      std::min((pairs + kPairsPerBlock - 1) / kPairsPerBlock, num_sms * kResidentBlocks);
  return launch(merge_kernel<kWarpsPerPair>, blocks, kBlockWarps * 32, 0, Start::kEarly, stream,
                params);
}

}  // namespace

cudaError_t launch_merge(const DecodeParams& params, int32_t num_sms, cudaStream_t stream) {
  return params.rows_padded * params.num_q_heads <= kPairsPerSm * num_sms
             ? launch_variant<kBlockWarps>(params, num_sms, stream)
             : launch_variant<1>(params, num_sms, stream);
}

}  // namespace pat
