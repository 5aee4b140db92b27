// SPDX-License-Identifier: MIT
// The host planner: batch in, words of a plan out. The hot path behind pat_sglang/host.py; equal,
// word for word, to lay_out(build_segment_tree(..), pack_rows(..), ..) of the Python oracle.
#pragma once

#include <cstdint>

#include "cost_model.h"
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
  struct Item {
    int32_t words[kItemWords];
  };

  int64_t place_slots(const SegmentTree& tree, int32_t horizon);
  void number_parts(const Packing& packing);
  void write_items(const Packing& packing, int32_t* entries);
  void sort_items(int32_t num_items);

  Capacity capacity_;
  int32_t group_size_;
  SegmentTree tree_;
  Packer packer_;

  Scratch<int32_t> segment_slot_, tail_slot_;
  Scratch<int32_t> part_ptr_, next_part_;  // [rows + 1], [rows]
  Scratch<uint8_t> direct_;                // [rows] the row's only item writes the output
  Scratch<Item> items_;                    // as created
  Scratch<uint64_t> keys_, sorted_keys_;   // tile, weight and creation number of each item
  int32_t tile_count_[kNumTiles] = {};
  int64_t planned_tokens_ = 0;
};

}  // namespace pat
