// SPDX-License-Identifier: MIT
// The merge kernel: combines the partials of each (request row, query head) pair that has any.
//
// out = sum_i 2^(lse_i - max) o_i / sum_i 2^(lse_i - max). The plan lists the rows; those with
// a single item were written by the forward kernel. Padding rows are set to zero. Block 0 resets the forward
// kernel's work counters, which is safe because launches of one stream run in order.
//
// Large batches have few parts a pair: one warp a pair, four pairs a block. Small batches have few
// pairs and, after the KV split, many parts: eight warps a pair, joined through shared memory. The
// choice depends on the padded batch only, so it is fixed at capture.
#include <algorithm>

#include "config.cuh"
#include "params.h"

namespace pat {
namespace {

constexpr int kLaneValues = kHeadDim / 32;  // 2 or 4 floats a lane
constexpr int kUnroll = 4;                  // partials in flight a lane
constexpr int32_t kFewPairs = 2048;         // below: eight warps a pair
constexpr int kResidentWarps = 32;          // of an SM; pairs beyond are taken by the same warps

struct alignas(kLaneValues * 4) Values {
  float v[kLaneValues];
};

/// A running combination of partials: base-2 maximum, total weight and weighted sum (of a lane).
struct State {
  float top = -INFINITY, total = 0.f;
  Values sum{};

  /// NaN in `lse` (an overflowed tail) spreads to the output.
  __device__ void add(float lse, const Values& value) {
    if (lse == -INFINITY) return;
    const float higher = fmaxf(top, lse);
    const float old = top == -INFINITY ? 0.f : ptx::exp2(top - higher);
    const float weight = ptx::exp2(lse - higher);
    total = total * old + weight;
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) sum.v[j] = sum.v[j] * old + weight * value.v[j];
    top = higher;
  }
  __device__ void add(const State& other) {
    if (other.total == 0.f) return;  // NaN is not: it must spread
    const float higher = fmaxf(top, other.top);
    const float mine = top == -INFINITY ? 0.f : ptx::exp2(top - higher);
    const float theirs = ptx::exp2(other.top - higher);
    total = total * mine + other.total * theirs;
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) {
      sum.v[j] = sum.v[j] * mine + other.sum.v[j] * theirs;
    }
    top = higher;
  }
};

__device__ void store(Element* to, const Values& value, float factor) {
  uint32_t packed[kLaneValues / 2];
#pragma unroll
  for (int i = 0; i < kLaneValues / 2; ++i) {
    packed[i] = ptx::pack<Element>(value.v[2 * i] * factor, value.v[2 * i + 1] * factor);
  }
  if constexpr (kLaneValues == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
  } else {
    *reinterpret_cast<uint32_t*>(to) = packed[0];
  }
}

/// Combines the partials of one pair by `kWarpsPerPair` warps of the block, or clears a padding row.
template <int kWarpsPerPair>
__device__ __forceinline__ void merge_pair(const DecodeParams& params, int32_t row, int32_t head,
                                           bool padding) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % kWarpsPerPair;
  Element* to = static_cast<Element*>(params.out) + int64_t{row} * params.out_row_stride +
                head * kHeadDim + lane * kLaneValues;
  State state;
  if (padding) {
    if (warp == 0) store(to, state.sum, 0.f);
    return;
  }
  const int32_t* part_ptr = params.plan + __ldg(params.plan + kHeaderOffPartPtr) + row;
  const int32_t begin = __ldg(part_ptr), end = __ldg(part_ptr + 1);
  for (int32_t first = begin + warp; first < end; first += kUnroll * kWarpsPerPair) {
    float lse[kUnroll];
    Values value[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int32_t part = first + i * kWarpsPerPair;
      const int64_t index = int64_t{part} * params.num_q_heads + head;
      lse[i] = part < end ? params.partial_lse[index] : -INFINITY;
      // NOTE: the values of an empty part were never written and may be NaN; add() skips them.
      if (part < end) {
        value[i] = reinterpret_cast<const Values*>(params.partial_out + index * kHeadDim)[lane];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) state.add(lse[i], value[i]);
  }
  if constexpr (kWarpsPerPair > 1) {
    __shared__ State states[kWarpsPerPair][32];
    states[warp][lane] = state;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int w = 1; w < kWarpsPerPair; ++w) state.add(states[w][lane]);
    }
    __syncthreads();  // the next pair's states take their place
    if (warp != 0) return;
  }
  store(to, state.sum, state.total == 0.f ? 0.f : 1.f / state.total);
}

template <int kWarpsPerPair, int kPairsPerBlock>
__global__ void __launch_bounds__(kWarpsPerPair* kPairsPerBlock * 32)
    merge_kernel(const __grid_constant__ DecodeParams params) {
  static_assert(kWarpsPerPair == 1 || kPairsPerBlock == 1, "a block joins one pair at most");
  ptx::wait_for_previous_kernel();  // NOTE: by every block, or the grid could end before it
  if (blockIdx.x == 0 && threadIdx.x < kNumTiles) params.counters[threadIdx.x] = 0;
  const int32_t rows = __ldg(params.plan + kHeaderRows);
  const int32_t merge_rows = __ldg(params.plan + kHeaderMergeRows);
  const int32_t* list = params.plan + __ldg(params.plan + kHeaderOffMergeRows);
  // The rows of the list, then the padding.
  const int32_t pairs = (merge_rows + params.rows_padded - rows) * params.num_q_heads;
  for (int32_t pair = blockIdx.x * kPairsPerBlock + threadIdx.x / 32 / kWarpsPerPair; pair < pairs;
       pair += gridDim.x * kPairsPerBlock) {
    const int32_t index = pair / params.num_q_heads, head = pair % params.num_q_heads;
    const bool padding = index >= merge_rows;
    const int32_t row = padding ? rows + index - merge_rows : __ldg(list + index);
    merge_pair<kWarpsPerPair>(params, row, head, padding);
  }
}

/// Launched as a programmatic dependent of the forward kernel, which hides the launch latency.
template <int kWarpsPerPair, int kPairsPerBlock>
cudaError_t launch(const DecodeParams& params, int32_t num_sms, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  const int32_t pairs = params.rows_padded * params.num_q_heads;
  const int32_t resident = num_sms * (kResidentWarps / (kWarpsPerPair * kPairsPerBlock));
  config.gridDim = std::min((pairs + kPairsPerBlock - 1) / kPairsPerBlock, resident);
  config.blockDim = kWarpsPerPair * kPairsPerBlock * 32;
  config.stream = stream;
#if defined(PAT_PATH_SM90)
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
#else
  static_cast<void>(attribute);
#endif
  return cudaLaunchKernelEx(&config, merge_kernel<kWarpsPerPair, kPairsPerBlock>, params);
}

}  // namespace

cudaError_t launch_merge(const DecodeParams& params, int32_t num_sms, cudaStream_t stream) {
  return params.rows_padded * params.num_q_heads <= kFewPairs
             ? launch<8, 1>(params, num_sms, stream)
             : launch<1, 4>(params, num_sms, stream);
}

}  // namespace pat
