// SPDX-License-Identifier: MIT
// The merge kernel: one warp combines the partials of one (request row, query head).
//
// out = sum_i 2^(lse_i - max) o_i / sum_i 2^(lse_i - max). Rows with a single item were written by
// the forward kernel and are skipped; padding rows are set to zero. Block 0 resets the forward
// kernel's work counters, which is safe because launches of one stream run in order.
#include "config.cuh"
#include "params.h"

namespace pat {
namespace {

constexpr int kMergeWarps = 4;
constexpr int kLaneValues = kHeadDim / 32;  // 2 or 4 floats a lane
constexpr int kUnroll = 4;                  // partials in flight a lane

struct alignas(kLaneValues * 4) Values {
  float v[kLaneValues];
};

__device__ void store(Element* to, const float (&v)[kLaneValues]) {
  uint32_t packed[kLaneValues / 2];
#pragma unroll
  for (int i = 0; i < kLaneValues / 2; ++i) packed[i] = ptx::pack<Element>(v[2 * i], v[2 * i + 1]);
  if constexpr (kLaneValues == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[1]);
  } else {
    *reinterpret_cast<uint32_t*>(to) = packed[0];
  }
}

__global__ void __launch_bounds__(kMergeWarps * 32)
    merge_kernel(const __grid_constant__ DecodeParams params) {
  if (blockIdx.x == 0 && threadIdx.x < kNumTiles) params.counters[threadIdx.x] = 0;
  const int lane = threadIdx.x % 32;
  const int32_t at = blockIdx.x * kMergeWarps + threadIdx.x / 32;
  const int32_t row = at / params.num_q_heads, head = at % params.num_q_heads;
  if (row >= params.rows_padded) return;
  Element* to = static_cast<Element*>(params.out) + row * params.out_row_stride + head * kHeadDim +
                lane * kLaneValues;
  float sum[kLaneValues] = {};
  if (row >= __ldg(params.plan + kHeaderRows)) {
    store(to, sum);
    return;
  }
  const int32_t* part_ptr = params.plan + __ldg(params.plan + kHeaderOffPartPtr) + row;
  const int32_t begin = __ldg(part_ptr), end = __ldg(part_ptr + 1);
  if (begin == end) return;

  const float* lse = params.partial_lse + head;
  float top = -INFINITY;
  bool poisoned = false;
  for (int32_t p = begin + lane; p < end; p += 32) {
    const float value = lse[int64_t{p} * params.num_q_heads];
    poisoned |= isnan(value);
    top = fmaxf(top, value);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  poisoned = __any_sync(0xffffffffu, poisoned);

  float total = 0.f;
  for (int32_t first = begin; first < end; first += kUnroll) {
    float weight[kUnroll];
    Values value[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t index = int64_t{first + i} * params.num_q_heads + head;
      const float part_lse = first + i < end ? params.partial_lse[index] : -INFINITY;
      weight[i] = part_lse == -INFINITY ? 0.f : ptx::exp2(part_lse - top);
      // NOTE: a part of weight 0 was never written; its memory may hold NaN.
      value[i] = weight[i] == 0.f ? Values{}
                                  : reinterpret_cast<const Values*>(params.partial_out +
                                                                    index * kHeadDim)[lane];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      total += weight[i];
#pragma unroll
      for (int j = 0; j < kLaneValues; ++j) sum[j] += weight[i] * value[i].v[j];
    }
  }
  const float inverse = poisoned ? NAN : total == 0.f ? 0.f : 1.f / total;
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j) sum[j] *= inverse;
  store(to, sum);
}

}  // namespace

cudaError_t launch_merge(const DecodeParams& params, cudaStream_t stream) {
  const int32_t pairs = params.rows_padded * params.num_q_heads;
  merge_kernel<<<(pairs + kMergeWarps - 1) / kMergeWarps, kMergeWarps * 32, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pat
