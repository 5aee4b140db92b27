// SPDX-License-Identifier: MIT
// 16 rows of Q, K or V to shared memory by one warp, kRowsPerLoad rows a pass: lane l brings chunk
// l % kRowChunks of row l / kRowChunks of a pass.
#pragma once

#include "item.cuh"

namespace pat {

inline constexpr int kCopyPasses = kSliceTokens / kRowsPerLoad;
static_assert(kSliceTokens == kFragmentRows, "tokens of a slice and rows of a fragment, alike");

/// Row of the 16 that a lane brings in a pass.
__device__ __forceinline__ int copied_row(int lane, int pass) {
  return pass * kRowsPerLoad + lane / kRowChunks;
}

/// Where a lane puts it, from its address of the first pass. Rows advance by 2 or 4 from one below, so
/// the swizzle's row bits advance by XOR.
__device__ __forceinline__ uint32_t copied_to(uint32_t address, int pass) {
  const int rows = pass * kRowsPerLoad;
  return (address ^ ((rows & 7) << 4)) + rows * kPanelRowBytes;
}

/// Query rows first .. first + 15 of an item, to `to`: the address of 16 rows of a block. Rows beyond
/// the item become zeros; those of a request that outgrew its tail become NaN, which waits for all
/// copies of the thread in flight.
__device__ __forceinline__ void copy_q(const DecodeParams& params, const Tables& tables,
                                       const Item& item, int32_t first, int32_t kv_head,
                                       uint32_t to) {
  const int lane = threadIdx.x % 32;
  const int32_t rows = item.query_rows - first;
  const bool valid = lane < min(rows, kFragmentRows);
  const QueryRow query(tables, item, valid ? first + lane : 0, kv_head, params.group_size);
  const int64_t my_offset = int64_t{query.row} * params.q_row_stride + query.head * kHeadDim;
  const bool overflowed = valid && __ldg(params.live_lens + query.row) < 0;
  const Element* q = static_cast<const Element*>(params.q) + lane % kRowChunks * 8;
  const uint32_t lane_address = to + swizzled(lane / kRowChunks, lane % kRowChunks);
#pragma unroll
  for (int pass = 0; pass < kCopyPasses; ++pass) {
    const int row = copied_row(lane, pass);
    const int64_t offset = __shfl_sync(0xffffffffu, my_offset, row);
    ptx::cp_async_16(copied_to(lane_address, pass), q + offset, row < rows);
  }
  if (__any_sync(0xffffffffu, overflowed)) {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    for (int i = 0; overflowed && i < kRowChunks; ++i) {
      constexpr int32_t kNaNs = 0x7fff7fff;  // two, in either type
      ptx::store_shared_x4(to + swizzled(lane, i), {kNaNs, kNaNs, kNaNs, kNaNs});
    }
    __syncwarp();
  }
}

}  // namespace pat
