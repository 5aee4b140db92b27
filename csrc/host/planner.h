// SPDX-License-Identifier: MIT
// The host planner: batch in, words of a plan out. The hot path behind pat_sglang/host.py; equal,
// word for word, to lay_out(build_segment_tree(..), pack_rows(..), ..) of the Python oracle.
#pragma once

#include <cstdint>

#include "cost_model.h"
#include "item_writer.h"
#include "packer.h"
#include "packing.h"
#include "scratch.h"
#include "segment_tree.h"

namespace pat {

/// Plans batches of one layer shape on one GPU. Keeps its memory between calls; one thread at a
/// time.
class Planner {
 public:
  /// Raises std::invalid_argument for a shape, model or capacity that makes no sense.
  Planner(const Shape& shape, const CostModel& model, const Capacity& capacity);

  /// Writes the plan of a batch to `out` [out_words] and returns the number of words.
  /// Raises std::invalid_argument for a bad batch and CapacityError for one that does not fit;
  /// nothing was written then.
  int64_t plan(const Batch& batch, int32_t* out, int64_t out_words);

 private:
  /// Rows of the tables whose size the packing decides.
  struct Counts {
    int64_t items = 0, fragments = 0, steps = 0, entries = 0, splits = 0;
  };

  int64_t place_slots(const SegmentTree& tree, int32_t horizon);
  void number_parts(const Packing& packing);
  Counts count(const Packing& packing) const;
  void write_small_tables(int32_t horizon, int32_t* out) const;

  Capacity capacity_;
  int32_t group_size_;
  SegmentTree tree_;
  Packer packer_;
  ItemWriter writer_;

  Scratch<int32_t> segment_slot_, tail_slot_;
  Scratch<int32_t> part_ptr_;   // [rows + 1]
  Scratch<int32_t> next_part_;  // [rows], -1: the row's only item writes the output
};

}  // namespace pat
