// SPDX-License-Identifier: MIT
// The tables of work items: items, entries, and the fragments and steps of chains. Mirrors _Items
// of pat_sglang/layout.py.
#pragma once

#include <cstdint>

#include "../plan_layout.h"
#include "cost_model.h"
#include "fragments.h"
#include "packing.h"
#include "scratch.h"
#include "segment_tree.h"

namespace pat {

/// A packing to be written, with what is known of its batch, and where the tables go.
struct ItemJob {
  const SegmentTree& tree;
  const Packing& packing;
  const PriceTable& prices;
  const int32_t* segment_slot;  // [segments] offset in the slot snapshot
  const int32_t* tail_slot;     // [rows]
  int32_t* next_part;           // [rows] partial slot, counted up; -1: the row is written directly
  int64_t num_items;

  int32_t* items;
  int32_t* fragments;
  int32_t* steps;
  int32_t* entries;
};

class ItemWriter {
 public:
  explicit ItemWriter(int32_t group_size) : group_size_(group_size) {}

  void write(const ItemJob& job);

  /// Of the last job.
  int32_t tile_count(int32_t tile) const { return tile_count_[tile]; }
  int64_t planned_tokens() const { return planned_tokens_; }
  int32_t num_chain_items() const { return num_chain_items_; }

 private:
  struct Item {
    int32_t words[kItemWords];
  };
  /// The words of an item that say which rows it has, and those that say what all of them read.
  struct ItemRows {
    int32_t first_entry, head_offset, query_rows, first_fragment;
  };
  struct ItemRun {
    int32_t first_slot, first_length, next_run, beyond, tail_position, tail_row;
  };
  /// A pack; the common part of shared packs and tails.
  struct Range {
    int64_t start, end;
    int32_t chunk, num_chunks, segment;
    const Chain* chain;  // nullptr: a plain pack or a tail
    bool is_tail;
  };

  void add_pack(const ItemJob& job, const Range& range, const int32_t* rows, int32_t num_rows);
  void add_whole_tail(const ItemJob& job, int32_t row);
  void add_chain(const ItemJob& job, const Chain& chain, const int32_t* rows, int32_t num_rows,
                 int32_t first_entry, ItemRun run, int64_t planned);
  void add_item(int32_t created, int32_t tile, int64_t weight, const ItemRows& rows,
                const ItemRun& run);
  void sort(int32_t num_items);

  int32_t group_size_;
  Scratch<Item> items_;                   // as created
  Scratch<uint64_t> keys_, sorted_keys_;  // tile, weight and creation number of each item
  Scratch<RowLoad> row_loads_;            // [rows + 1] of a chain
  Scratch<int32_t> next_step_;            // [fragments] of a chain
  int32_t num_items_ = 0, num_entries_ = 0, num_fragments_ = 0, num_steps_ = 0;
  int32_t num_chain_items_ = 0;
  int32_t tile_count_[kNumTiles] = {};
  int64_t planned_tokens_ = 0;
};

}  // namespace pat
