// SPDX-License-Identifier: MIT
// Fragments of a chain: which 16 query rows of which work item read which private piece. Mirrors
// chain_items and longest_warp of pat_sglang/packing.py.
#pragma once

#include <cstdint>

#include "../plan_layout.h"
#include "scratch.h"

namespace pat {

inline constexpr int32_t kItemWarps = 4;  // warp f % kItemWarps computes fragment f of an item

/// A segment or a tail below the shared run of a chain, and the rows of the pack that own it, which
/// lie side by side. The pieces of a chain are in the order of their steps: by first row, from the
/// top down, the tail last.
struct Piece {
  int32_t segment;  // -1: the tail of row first_row
  int32_t first_row;
  int32_t last_row;  // included
  int32_t tokens;    // without the horizon

  /// Whether this is a tail that a pack of its own reads instead.
  bool is_separated(int64_t tail_room) const { return segment < 0 && tokens > tail_room; }
};

/// What the fragments of a chain read below the shared run.
struct FragmentLoad {
  int64_t longest_warp = 0;   // tokens of the warp that reads most
  int64_t tokens = 0;         // of all steps
  int64_t unique_tokens = 0;  // every piece counted once
  int64_t steps = 0;
  int32_t fragments = 0;
};

/// The rows of one chain pack cut into work items, and these into fragments, numbered from 0 over
/// all items. The fragments of a piece are consecutive: its tokens are added at the first and taken
/// away behind the last, and one running sum gives the load of all fragments.
class FragmentGrid {
 public:
  explicit FragmentGrid(int32_t group_size) : group_size_(group_size) {}

  /// Cuts a pack of `num_rows` rows into items of `rows_per_item` and distributes its pieces.
  FragmentLoad cut(int32_t num_rows, int32_t rows_per_item, const Piece* pieces, int32_t num_pieces,
                   int64_t tail_room);

  int32_t num_items() const { return num_items_; }
  int32_t num_fragments() const { return num_fragments_; }
  /// First fragment of an item; of one past the last item: the number of fragments.
  int32_t first_fragment(int32_t item) const {
    return item < num_items_ ? item * fragments_per_item_ : num_fragments_;
  }
  int32_t steps(int32_t fragment) const { return steps_[fragment]; }
  /// Step tokens of the warp of an item that has most.
  int64_t longest_warp(int32_t item) const;

  /// Calls visit(fragment, lo, hi) for each fragment of a piece with its query rows there.
  template <typename Visit>
  void for_each_fragment(const Piece& piece, Visit&& visit) const {
    const int32_t end = last_[piece.last_row];
    int32_t item = piece.first_row / rows_per_item_;
    int32_t fragment = first_[piece.first_row];
    while (fragment <= end) {
      // Query rows from the start of the item.
      const int32_t rows_above = item * rows_per_item_;
      const int32_t begin = (piece.first_row - rows_above) * group_size_;
      const int32_t rows = piece.last_row + 1 - rows_above;
      const int32_t stop = (rows < rows_per_item_ ? rows : rows_per_item_) * group_size_;
      const int32_t next_item = ++item * fragments_per_item_;
      int32_t at = (fragment + fragments_per_item_ - next_item) * kFragmentRows;
      for (; fragment <= end && fragment < next_item; ++fragment, at += kFragmentRows) {
        visit(fragment, begin > at ? begin - at : 0,
              stop - at < kFragmentRows ? stop - at : kFragmentRows);
      }
    }
  }

 private:
  int32_t group_size_;
  int32_t rows_per_item_ = 1, num_items_ = 0, fragments_per_item_ = 0, num_fragments_ = 0;
  Scratch<int32_t> first_, last_;  // [rows] first and last fragment of each row
  Scratch<int64_t> tokens_;        // [fragments + 1]
  Scratch<int32_t> steps_;         // [fragments + 1]
};

}  // namespace pat
