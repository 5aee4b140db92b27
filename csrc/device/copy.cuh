// SPDX-License-Identifier: MIT
// 16 rows of Q, K or V to shared memory by one warp, kRowsPerLoad rows a pass, kCopyPasses
// apart: lane l brings chunk l % kRowChunks of row l / kRowChunks * kCopyPasses + pass.
#pragma once

#include "item.cuh"

namespace pat {

inline constexpr int kCopyPasses = kSliceTokens / kRowsPerLoad;
static_assert(kSliceTokens == kMapTokens && kPanelRowBytes == 2 * kMapElements,
              "boxes of the maps");
static_assert(kSliceTokens == kFragmentRows, "tokens of a slice and rows of a fragment, alike");

/// Row of the 16 that a lane brings in a pass: its first one and those that follow.
__device__ __forceinline__ int copied_row(int lane, int pass) {
  return lane / kRowChunks * kCopyPasses + pass;
}

/// Where a lane puts it, from its address of the first pass, whose row is a multiple of kCopyPasses: the
/// swizzle's row bits advance by XOR.
__device__ __forceinline__ uint32_t copied_to(uint32_t address, int pass) {
  return (address ^ pass << 4) + pass * kPanelRowBytes;
}
static_assert(kCopyPasses == 4 || kCopyPasses == 8, "of the swizzle's three row bits");

/// Offset within an entry of the chunk that a lane brings in the first pass.
__device__ __forceinline__ uint32_t copied_first(int lane) {
  return swizzled(copied_row(lane, 0), lane % kRowChunks);
}

/// Query rows of an item on their way to shared memory, 16 of them by one warp; rows that do not exist
/// become zeros.
class QueryRows {
 public:
  /// Rows first .. first + 15. Asks for what issue() needs.
  __device__ QueryRows(const DecodeParams& params, const Tables& tables, const Item& item,
                       int32_t first, int32_t kv_head)
      : rows_(item.query_rows - first) {
    const int lane = threadIdx.x % 32;
    const bool valid = lane < min(rows_, kFragmentRows);
    const QueryRow query(tables, item.first_entry, item.head_offset, valid ? first + lane : 0,
                         kv_head, params.group_size);
    offset_ = int64_t{query.row} * params.q_row_stride + query.head * kHeadDim;
  }

  /// To 16 rows of a block.
  __device__ void issue(const DecodeParams& params, uint32_t to) const {
    const int lane = threadIdx.x % 32;
    const Element* q = static_cast<const Element*>(params.q) + lane % kRowChunks * 8;
    const uint32_t lane_address = to + copied_first(lane);
#pragma unroll
    for (int pass = 0; pass < kCopyPasses; ++pass) {
      const int row = copied_row(lane, pass);
      const int64_t offset = __shfl_sync(0xffffffffu, offset_, row);
      ptx::cp_async_16(copied_to(lane_address, pass), q + offset, row < rows_);
    }
  }

 private:
  int32_t rows_;    // that exist, from the first on
  int64_t offset_;  // lane l's: of row l, in elements
};

}  // namespace pat
