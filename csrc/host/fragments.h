// SPDX-License-Identifier: MIT
// Fragments of a chain: which 16 query rows of which work item read which private piece. Mirrors
// chain_items and private_span of pat_sglang/packing.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../plan_layout.h"

namespace pat {

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

/// Pieces that begin at a row of a chain or before it, and pieces that end before it. Rows a to b
/// read what has begun at b less what has ended before a, however the rows are cut into fragments.
struct RowLoad {
  int64_t begun_tokens, ended_tokens;
  int64_t begun_steps, ended_steps;
};

/// Fills `loads` [num_rows + 1]; separated tails do not count.
void sum_pieces(const Piece* pieces, int32_t num_pieces, int64_t tail_room, int32_t num_rows,
                RowLoad* loads);

/// What the fragments of a chain read below the shared run.
struct FragmentLoad {
  int64_t span = 0;    // time the steps take, in tokens of the narrow tile
  int64_t tokens = 0;  // of all steps
  int64_t steps = 0;
};

/// The rows of one chain pack cut into work items, and these into fragments, numbered over all
/// items.
class FragmentGrid {
 public:
  FragmentGrid(int32_t group_size, int32_t num_rows, int32_t rows_per_item)
      : group_size_(group_size),
        num_rows_(num_rows),
        rows_per_item_(rows_per_item),
        num_items_((num_rows + rows_per_item - 1) / rows_per_item),
        fragments_per_item_(fragments_of(rows_per_item)) {}

  int32_t num_items() const { return num_items_; }
  int32_t first_row(int32_t item) const { return item * rows_per_item_; }
  int32_t rows_of(int32_t item) const {
    return std::min(rows_per_item_, num_rows_ - first_row(item));
  }
  int32_t first_fragment(int32_t item) const { return item * fragments_per_item_; }
  int32_t num_fragments() const {
    return first_fragment(num_items_ - 1) + fragments_of(rows_of(num_items_ - 1));
  }

  /// What the fragments of an item read; visit(fragment, steps) is called for each.
  template <typename Visit>
  FragmentLoad load_of(const RowLoad* loads, int32_t item, Visit&& visit) const {
    const RowLoad* of_item = loads + first_row(item);
    const int32_t last_query_row = rows_of(item) * group_size_ - 1;
    int64_t of_warp[kItemWarps] = {};
    FragmentLoad sum;
    for (int32_t f = 0, begin = 0; begin <= last_query_row; ++f, begin += kFragmentRows) {
      const RowLoad& first = of_item[begin / group_size_];
      const RowLoad& last =
          of_item[std::min(begin + kFragmentRows - 1, last_query_row) / group_size_];
      const int64_t tokens = last.begun_tokens - first.ended_tokens;
      const int64_t steps = last.begun_steps - first.ended_steps;
      of_warp[f % kItemWarps] += tokens;
      sum.tokens += tokens;
      sum.steps += steps;
      visit(first_fragment(item) + f, static_cast<int32_t>(steps));
    }
    // All warps share the steps of a single fragment.
    sum.span = last_query_row < kFragmentRows
                   ? sum.tokens
                   : kItemWarps * *std::max_element(of_warp, of_warp + kItemWarps);
    return sum;
  }

  /// Of all items; the span of the longest.
  FragmentLoad load(const RowLoad* loads) const {
    FragmentLoad sum;
    for (int32_t item = 0; item < num_items_; ++item) {
      const FragmentLoad one = load_of(loads, item, [](int32_t, int32_t) {});
      sum.span = std::max(sum.span, one.span);
      sum.tokens += one.tokens;
      sum.steps += one.steps;
    }
    return sum;
  }

  /// Calls visit(fragment, lo, hi) for each fragment of a piece with its query rows there.
  template <typename Visit>
  void for_each_fragment(const Piece& piece, Visit&& visit) const {
    for (int32_t item = piece.first_row / rows_per_item_;
         item < num_items_ && first_row(item) <= piece.last_row; ++item) {
      // Query rows of the piece, from the start of the item.
      const int32_t begin = std::max(piece.first_row - first_row(item), 0) * group_size_;
      const int32_t end =
          std::min(piece.last_row + 1 - first_row(item), rows_per_item_) * group_size_;
      for (int32_t f = begin / kFragmentRows; f * kFragmentRows < end; ++f) {
        const int32_t at = f * kFragmentRows;
        visit(first_fragment(item) + f, std::max(begin - at, 0), std::min(end - at, kFragmentRows));
      }
    }
  }

 private:
  int32_t fragments_of(int32_t rows) const {
    return (rows * group_size_ + kFragmentRows - 1) / kFragmentRows;
  }

  int32_t group_size_, num_rows_, rows_per_item_, num_items_, fragments_per_item_;
};

}  // namespace pat
