// SPDX-License-Identifier: MIT
// A work item as the kernel reads it from the plan.
#pragma once

#include "config.cuh"
#include "params.h"

namespace pat {

/// Tables of the plan. Offsets are read from the header at every use: the header stays in L1, and
/// registers are scarcer than its latency where the tables are used.
struct Tables {
  const int32_t* __restrict__ plan;

  __device__ int32_t header(int32_t word) const { return __ldg(plan + word); }
  /// Third `third` (0, 1, 2) of an item.
  __device__ int4 item(int32_t index, int32_t third) const {
    return __ldg(reinterpret_cast<const int4*>(plan + header(kHeaderOffItems)) + 3 * index + third);
  }
  /// {request row, partial slot or -1}
  __device__ int2 entry(int32_t index) const {
    return __ldg(reinterpret_cast<const int2*>(plan + header(kHeaderOffEntries)) + index);
  }
  /// {slot offset, length, next, position}
  __device__ int4 run(int32_t index) const {
    return __ldg(reinterpret_cast<const int4*>(plan + header(kHeaderOffRuns)) + index);
  }
  /// {first step, number of steps}
  __device__ int2 fragment(int32_t index) const {
    return __ldg(reinterpret_cast<const int2*>(plan + header(kHeaderOffFragments)) + index);
  }
  /// {slot offset, length, rows, tail position or -1}
  __device__ int4 step(int32_t index) const {
    return __ldg(reinterpret_cast<const int4*>(plan + header(kHeaderOffSteps)) + index);
  }
};
static_assert(kItemWords == 12 && kEntryWords == 2 && kRunWords == 4 && kFragmentWords == 2 &&
                  kStepWords == 4,
              "vector loads of the tables");

/// Tokens of a tail piece that exist. `live` is the row's true length, -1 when it outgrew its tail
/// unseen by the host: its output is NaN, whatever was read.
__device__ __forceinline__ int32_t live_length(int32_t bound, int32_t live, int32_t position) {
  return min(max(live - position, 0), bound);
}

struct Item {
  int32_t first_entry, head_offset, query_rows;
  int32_t first_slot, first_length, next_run, beyond;  // the run all rows share
  int32_t first_fragment;                              // -1: no row has steps of its own
  int32_t tail_row, tail_position;  // where the run starts in a tail, -1: it does not

  __device__ Item(const Tables& tables, int32_t index) {
    const int4 a = tables.item(index, 0), b = tables.item(index, 1), c = tables.item(index, 2);
    first_entry = a.x;
    head_offset = a.y;
    query_rows = a.z;
    first_slot = a.w;
    first_length = b.x;
    next_run = b.y;
    beyond = b.z;
    tail_position = b.w;
    first_fragment = c.x;
    tail_row = c.y;
  }

  /// Cuts the tail to what exists of it. Until then `first_length` is a bound.
  __device__ void clip(const int32_t* live_lens) {
    if (tail_position >= 0) {
      first_length = live_length(first_length, __ldg(live_lens + tail_row), tail_position);
    }
  }

  __device__ int32_t tokens() const { return first_length + beyond; }
};

/// Query row r of an item: request row, query head, partial slot (-1: final).
struct QueryRow {
  int32_t row, head, part;

  /// `first_entry`, `head_offset`: of the item.
  __device__ QueryRow(const Tables& tables, int32_t first_entry, int32_t head_offset, int32_t r,
                      int32_t kv_head, const Divisor& group_size) {
    const int32_t flat = head_offset + r;
    const int32_t row_of_item = group_size.quotient(flat);
    const int2 entry = tables.entry(first_entry + row_of_item);
    row = entry.x;
    head = kv_head * group_size.value() + flat - row_of_item * group_size.value();
    part = entry.y;
  }
};

/// A query row at the end of an item, with whether its request outgrew its tail.
struct FinishedRow : QueryRow {
  bool overflowed;

  __device__ FinishedRow(const QueryRow& query, const int32_t* live_lens)
      : QueryRow(query), overflowed(__ldg(live_lens + query.row) < 0) {}
};

/// Maps a token index of the shared run to a slot, for one lane whose token indices only ever grow.
/// Runs are walked from the first one upwards; of the last run the end is read.
class SlotWalk {
 public:
  __device__ SlotWalk(const Item& item)
      : run_end_(item.first_length),
        offset_(item.first_slot),
        next_(item.next_run),
        beyond_(item.beyond) {}

  /// Slot of a token; `token` must be below the item's token count.
  __device__ int32_t slot(const Tables& tables, const int32_t* slots, int32_t token) {
    while (token >= run_end_) {
      const int4 run = tables.run(next_);
      const int32_t take = min(run.y, beyond_);
      offset_ = run.x + run.y - take - run_end_;
      run_end_ += take;
      beyond_ -= take;
      next_ = run.z;
    }
    return __ldg(slots + offset_ + token);
  }

 private:
  int32_t run_end_;  // one past the last token index of the current run
  int32_t offset_;   // snapshot offset of token index 0, were it in the current run
  int32_t next_, beyond_;
};

/// Brings the head of the plan, the slots and the lengths to L2, by all threads of the grid. Between two
/// layers of a model they have left it, and an item's first loads are a chain: header, item, slots, K.
/// Each block also touches every buffer, for its SM to know their pages.
__device__ __forceinline__ void prefetch_tables(const DecodeParams& params) {
  switch (threadIdx.x) {
    case 0:
      ptx::prefetch_l1(params.plan);
      break;
    case 32:
      ptx::prefetch_l2(params.slots);
      break;
    case 64:
      ptx::prefetch_l2(params.live_lens);
      break;
    case 96:
      ptx::prefetch_l2(params.q);
      break;
#if defined(PAT_PATH_SM90)
    case 128:
      if (params.has_maps) ptx::prefetch_map(&params.k_map);
      break;
    case 160:
      if (params.has_maps) ptx::prefetch_map(&params.v_map);
      break;
#endif
  }
  constexpr int32_t kLines = 4096, kLineWords = 32;
  const auto line = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  const int32_t word = line % kLines * kLineWords;
  if (line < kLines) {
    if (word < params.plan_words) ptx::prefetch_l2(params.plan + word);
  } else if (line < 2 * kLines) {
    if (word < params.slot_words) ptx::prefetch_l2(params.slots + word);
  } else if (word < params.live_words) {
    ptx::prefetch_l2(params.live_lens + word);
  }
}

}  // namespace pat
