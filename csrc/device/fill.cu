// SPDX-License-Identifier: MIT
// The fill kernel: brings the slot snapshot up to the true lengths, once a step, outside the graph.
//
// After a new plan (runs >= 0): grid (rows + runs, kFreshBlocks); every run is gathered through its
// representative row and every tail from its start. Otherwise: grid (rows, 1); only positions
// [filled, seq_len) are copied, so a step the planner did not see heals itself.
#include "params.h"
#include "plan_layout.h"

namespace pat {
namespace {

constexpr int kFillThreads = 128;
constexpr int kFreshBlocks = 8;  // blocks that share one run or tail

__device__ int64_t at(const void* array, bool is_64bit, int32_t index) {
  return is_64bit ? static_cast<const int64_t*>(array)[index]
                  : static_cast<const int32_t*>(array)[index];
}

/// Copies token positions [begin, end) of one line of req_to_token.
__device__ void copy(const FillParams& params, int32_t row, int32_t begin, int32_t end,
                     int32_t* to) {
  const int64_t line = at(params.req_pool_indices, params.indices_are_64bit, row);
  const int32_t* from = params.req_to_token + line * params.req_to_token_stride + begin;
  for (int32_t i = blockIdx.y * kFillThreads + threadIdx.x; i < end - begin;
       i += gridDim.y * kFillThreads) {
    to[i] = from[i];
  }
}

__global__ void __launch_bounds__(kFillThreads)
    fill_kernel(const __grid_constant__ FillParams params) {
  const int32_t* plan = params.plan;
  const bool fresh = params.runs >= 0;
  if (const int32_t run = static_cast<int32_t>(blockIdx.x) - params.rows; run >= 0) {
    const int32_t* words = plan + plan[kHeaderOffRuns] + kRunWords * run;
    const int32_t begin = words[kRunPosition];
    copy(params, plan[plan[kHeaderOffReps] + run], begin, begin + words[kRunLength],
         params.slots + words[kRunSlot]);
    return;
  }
  const int32_t row = blockIdx.x;
  const int32_t* tail = plan + plan[kHeaderOffTails] + kTailWords * row;
  const int32_t position = tail[kTailPosition];
  const int32_t length = static_cast<int32_t>(at(params.seq_lens, params.lens_are_64bit, row));
  const bool overflows = length - position > tail[kTailCapacity];
  const int32_t end = overflows ? position + tail[kTailCapacity] : length;
  const int32_t begin = fresh ? position : params.filled[row];
  copy(params, row, begin, end, params.slots + tail[kTailSlot] + begin - position);
  __syncthreads();  // everyone has read `filled`
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    params.filled[row] = max(begin, end);
    params.live_lens[row] = overflows ? -1 : length;
  }
}

}  // namespace

cudaError_t launch_fill(const FillParams& params, cudaStream_t stream) {
  const bool fresh = params.runs >= 0;
  const dim3 grid(params.rows + (fresh ? params.runs : 0), fresh ? kFreshBlocks : 1);
  if (grid.x == 0) return cudaSuccess;
  fill_kernel<<<grid, kFillThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pat
