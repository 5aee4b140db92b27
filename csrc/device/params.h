// SPDX-License-Identifier: MIT
// Arguments of the kernels: plain pointers and sizes, a shape on every pointer.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "divisor.h"

namespace pat {

/// A CUtensorMap, of the driver's header, which device code does without.
struct alignas(64) TensorMap {
  uint8_t opaque[128];
};

/// Tokens of a box of a tensor map: 16 slots side by side, 64 elements of one head.
inline constexpr int32_t kMapTokens = 16;
inline constexpr int32_t kMapElements = 64;

/// Arguments of one pat_decode: the forward kernel over work items and the merge kernel.
struct DecodeParams {
  TensorMap k_map, v_map;  // of the caches, for slots side by side
  bool has_maps;           // false: every slot is gathered

  const void* __restrict__ q;        // [rows_padded, q_heads, d], 16-bit
  const void* __restrict__ k_cache;  // [slots, kv_heads, d], 16-bit
  const void* __restrict__ v_cache;  // [slots, kv_heads, d], 16-bit
  void* __restrict__ out;            // [rows_padded, q_heads, d], 16-bit

  const int32_t* __restrict__ plan;       // plan words, see plan_layout.h
  const int32_t* __restrict__ slots;      // slot snapshot
  const int32_t* __restrict__ live_lens;  // [rows] true sequence lengths, -1: tail overflowed
  int32_t* __restrict__ counters;         // [kNumTiles] work counters, zero between launches
  float* __restrict__ partial_out;        // [parts, q_heads, d]
  float* __restrict__ partial_lse;        // [parts, q_heads], base 2

  int32_t q_row_stride, out_row_stride;        // elements between request rows
  uint32_t k_slot_stride, v_slot_stride;       // bytes between slots
  int32_t plan_words, slot_words, live_words;  // sizes of `plan`, `slots` and `live_lens`
  int32_t rows_padded, num_q_heads;
  Divisor num_kv_heads, group_size;
  float scale_log2;  // sm_scale * log2(e)
};

/// Arguments of the fill kernel, which brings the slot snapshot up to the true lengths.
struct FillParams {
  const int32_t* runs;   // [num_runs, kRunWords] of the plan
  const int32_t* reps;   // [num_runs] of the plan
  const int32_t* tails;  // [rows, kTailWords] of the plan
  int32_t* __restrict__ slots;
  int32_t* __restrict__ filled;     // [rows] first position not yet in the snapshot
  int32_t* __restrict__ live_lens;  // [rows]

  const int32_t* __restrict__ req_to_token;   // [requests, max_context]
  const void* __restrict__ req_pool_indices;  // [rows] int32 or int64
  const void* __restrict__ seq_lens;          // [rows] int32 or int64
  int64_t req_to_token_stride;
  bool indices_are_64bit, lens_are_64bit;
  bool fresh;  // a new plan: gather everything anew; false: only append to the tails
  int32_t rows, num_runs;
};

/// Arguments of the append kernel, which brings it up to one more token a row in a captured step.
struct AppendParams {
  const int32_t* __restrict__ plan;  // plan words, see plan_layout.h
  int32_t* __restrict__ slots;
  int32_t* __restrict__ filled;     // [rows] first position not yet in the snapshot
  int32_t* __restrict__ live_lens;  // [rows], -1: tail overflowed

  const void* __restrict__ seq_lens;   // [rows] int32 or int64
  const void* __restrict__ new_slots;  // [rows] int32 or int64, of each row's last token
  bool lens_are_64bit, slots_are_64bit;
  int32_t rows;  // of the graph, padding included
};

/// Each launches on `stream` and returns the launch's error; nothing is allocated.
cudaError_t launch_decode(const DecodeParams& params, int32_t num_sms, cudaStream_t stream);
cudaError_t launch_merge(const DecodeParams& params, int32_t num_sms, cudaStream_t stream);
/// `words` words of pinned host memory, by an address the device knows; both ends are 16-byte aligned
/// and have room for a multiple of 16 bytes.
cudaError_t launch_upload(const void* from, int32_t* to, int32_t words, cudaStream_t stream);
/// `after_upload`: the launch before it on the stream is launch_upload's.
cudaError_t launch_fill(const FillParams& params, bool after_upload, cudaStream_t stream);
cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

/// Raises the forward kernel's shared-memory limit on the current device; once, before capture.
cudaError_t prepare_decode();

}  // namespace pat
