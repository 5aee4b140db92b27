// SPDX-License-Identifier: MIT
// The floor of decode attention: a kernel that only moves the bytes. Arguments and variants.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pat::bench {

/// One stream over K and V. A *piece* is what is contiguous and read as a whole: one slot with all
/// its heads, or one head of a slot. A vector is 16 bytes.
struct StreamParams {
  const uint4* __restrict__ k;        // first vector of slot 0
  const uint4* __restrict__ v;        // first vector of slot 0
  const int32_t* __restrict__ slots;  // [num_slots] in the order they are read
  const uint4* __restrict__ q;        // [q_vectors]
  uint4* __restrict__ out;            // [q_vectors], q again
  uint32_t* __restrict__ digest;      // [warps of the grid] xor of the 32-bit words a warp read
  uint32_t zero;                      // 0, which the compiler does not know
  int64_t slot_stride;                // vectors between slots
  int64_t q_vectors;
  int32_t num_slots;
  int32_t num_pieces;   // num_slots, or num_slots x heads: all slots of a head, then the next
  int32_t piece_shift;  // log2 of the vectors of a piece
};

inline constexpr int32_t kMaxWarps = 1 << 14;  // entries of `digest`
inline constexpr int32_t kMaxPieceShift = 9;   // 8 KB: two of them are a stage of the bulk ring

/// Number of variants, and what one is, in words.
int32_t num_variants();
const char* variant_name(int32_t variant);

/// Raises the shared-memory limits on the current device; once, before capture.
cudaError_t prepare_stream();

/// Launches a variant on `stream`; nothing is allocated.
cudaError_t launch_stream(int32_t variant, const StreamParams& params, int32_t num_sms,
                          cudaStream_t stream);

}  // namespace pat::bench
