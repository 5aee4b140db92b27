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
/// unseen by the host: its output is NaN, and one token is left to carry that.
__device__ __forceinline__ int32_t live_length(int32_t bound, int32_t live, int32_t position) {
  return live < 0 ? min(1, bound) : min(max(live - position, 0), bound);
}

struct Item {
  int32_t first_entry, head_offset, query_rows;
  int32_t first_slot, first_length, next_run, beyond;  // the run all rows share
  int32_t first_fragment;                              // -1: no row has steps of its own

  __device__ int32_t tokens() const { return first_length + beyond; }
};

__device__ __forceinline__ Item load_item(const Tables& tables, const int32_t* live_lens,
                                          int32_t index) {
  const int4 a = tables.item(index, 0);
  const int4 b = tables.item(index, 1);
  const int4 c = tables.item(index, 2);
  Item item{a.x, a.y, a.z, a.w, b.x, b.y, b.z, c.x};
  if (b.w >= 0) {
    const int32_t live = __ldg(live_lens + tables.entry(item.first_entry).x);
    item.first_length = live_length(item.first_length, live, b.w);
  }
  return item;
}

/// Query row r of an item: request row, query head, partial slot.
struct QueryRow {
  int32_t row, head, part;

  __device__ QueryRow(const Tables& tables, const Item& item, int32_t r, int32_t kv_head,
                      int32_t group_size) {
    const int32_t flat = item.head_offset + r;
    const int2 entry = tables.entry(item.first_entry + flat / group_size);
    row = entry.x;
    head = kv_head * group_size + flat % group_size;
    part = entry.y;
  }
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

}  // namespace pat
