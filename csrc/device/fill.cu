// SPDX-License-Identifier: MIT
// What a step does on the device before its layers, outside the graph: the upload kernel brings a new plan
// from the host, the fill kernel brings the slot snapshot up to the true lengths.
//
// Upload: the blocks read pinned host memory themselves, which spares the way to the copy engine and
// back and lets the next kernel start early.
//
// Fill, after a new plan: grid (rows + runs, blocks that share one); every run is gathered through its
// representative row and every tail from its start. It is a programmatic dependent of the upload: its
// blocks are in place when the plan is. Otherwise: grid (rows, 1); only positions
// [filled, seq_len) are copied, so a step the planner did not see heals itself.
#include <algorithm>

#include "element.cuh"
#include "launch.h"
#include "params.h"
#include "plan_layout.h"
#include "ptx.cuh"

namespace pat {
namespace {

constexpr int kUploadThreads = 256;
constexpr int kUploadBlocks = 32;  // at most; their loads in flight are 512 KB
constexpr int kFillThreads = 128;
// Blocks that share one run or tail of a new plan: the fewer there are, the longer they may be.
constexpr uint32_t kFreshBlocks = 2048, kLeastBlocks = 8, kMostBlocks = 64;
constexpr int kInFlight = 4;  // loads of a thread

/// Elements first, first + stride, ... below `count`.
template <typename T>
__device__ __forceinline__ void copy(const T* from, T* to, int32_t count, int32_t first,
                                     int32_t stride) {
  for (; first < count; first += kInFlight * stride) {
    T values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * stride < count) values[i] = from[first + i * stride];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * stride < count) to[first + i * stride] = values[i];
    }
  }
}

__global__ void __launch_bounds__(kUploadThreads)
    upload_kernel(const int4* from, int4* to, int32_t chunks) {
  ptx::launch_dependents();  // the fill kernel waits for our end, but may be on its way
  copy(from, to, chunks, blockIdx.x * kUploadThreads + threadIdx.x, gridDim.x * kUploadThreads);
}

/// A request row's line of req_to_token.
__device__ const int32_t* line_of(const FillParams& params, int32_t row) {
  return params.req_to_token + element(params.req_pool_indices, params.indices_are_64bit, row) *
                                   params.req_to_token_stride;
}

/// Copies `count` slots, by all blocks of a column of the grid.
__device__ void copy_slots(const int32_t* from, int32_t count, int32_t* to) {
  copy(from, to, count, blockIdx.y * kFillThreads + threadIdx.x, gridDim.y * kFillThreads);
}

__device__ void fill_run(const FillParams& params, int32_t index) {
  ptx::wait_for_previous_kernel();
  static_assert(kRunWords == 4 && kRunSlot == 0 && kRunLength == 1 && kRunPosition == 3);
  const int4 run = ptx::load_l2(reinterpret_cast<const int4*>(params.runs) + index);
  const int32_t row = ptx::load_l2(params.reps + index);
  copy_slots(line_of(params, row) + run.w, run.y, params.slots + run.x);
}

__device__ void fill_tail(const FillParams& params, int32_t row) {
  // Ahead of the wait: the plan's upload has nothing to do with them.
  const int32_t* line = line_of(params, row);
  const int32_t length = element(params.seq_lens, params.lens_are_64bit, row);
  ptx::wait_for_previous_kernel();
  static_assert(kTailWords == 4 && kTailSlot == 0 && kTailPosition == 1 && kTailCapacity == 2);
  const int4 tail = ptx::load_l2(reinterpret_cast<const int4*>(params.tails) + row);
  const int32_t position = tail.y, capacity = tail.z;
  const bool overflows = length - position > capacity;
  const int32_t end = overflows ? position + capacity : length;
  const int32_t begin = params.fresh ? position : params.filled[row];
  copy_slots(line + begin, end - begin, params.slots + tail.x + begin - position);
  __syncthreads();  // everyone has read `filled`
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    params.filled[row] = max(begin, end);
    params.live_lens[row] = overflows ? -1 : length;
  }
}

__global__ void __launch_bounds__(kFillThreads)
    fill_kernel(const __grid_constant__ FillParams params) {
  const int32_t row = blockIdx.x;
  if (row < params.rows) {
    fill_tail(params, row);
  } else {
    fill_run(params, row - params.rows);
  }
}

}  // namespace

cudaError_t launch_upload(const void* from, int32_t* to, int32_t words, cudaStream_t stream) {
  const int32_t chunks = (words + 3) / 4;
  const int32_t blocks = (chunks + kUploadThreads - 1) / kUploadThreads;
  return launch(upload_kernel, std::min(blocks, kUploadBlocks), kUploadThreads, 0, Start::kInOrder,
                stream, static_cast<const int4*>(from), reinterpret_cast<int4*>(to), chunks);
}

cudaError_t launch_fill(const FillParams& params, bool after_upload, cudaStream_t stream) {
  const auto rows = static_cast<uint32_t>(params.rows);
  const uint32_t copies = params.fresh ? rows + static_cast<uint32_t>(params.num_runs) : rows;
  if (copies == 0) return cudaSuccess;
  const uint32_t share = std::clamp(kFreshBlocks / copies, kLeastBlocks, kMostBlocks);
  const dim3 blocks(copies, params.fresh ? share : 1);
  return launch(fill_kernel, blocks, kFillThreads, 0,
                after_upload ? Start::kEarly : Start::kInOrder, stream, params);
}

}  // namespace pat
