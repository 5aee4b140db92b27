// SPDX-License-Identifier: MIT
#include "fragments.h"

#include <algorithm>

namespace pat {
namespace {

int32_t fragments_of(int32_t query_rows) {
  return (query_rows + kFragmentRows - 1) / kFragmentRows;
}

}  // namespace

FragmentLoad FragmentGrid::cut(int32_t num_rows, int32_t rows_per_item, const Piece* pieces,
                               int32_t num_pieces, int64_t tail_room) {
  rows_per_item_ = rows_per_item;
  num_items_ = (num_rows + rows_per_item - 1) / rows_per_item;
  fragments_per_item_ = fragments_of(rows_per_item * group_size_);
  const int32_t rows_of_last = num_rows - (num_items_ - 1) * rows_per_item;
  num_fragments_ =
      (num_items_ - 1) * fragments_per_item_ + fragments_of(rows_of_last * group_size_);

  int32_t* first = first_.fit(num_rows);
  int32_t* last = last_.fit(num_rows);
  for (int32_t row = 0, fragment = 0; row < num_rows; fragment += fragments_per_item_) {
    const int32_t end = std::min(row + rows_per_item, num_rows);
    for (int32_t query_row = 0; row < end; ++row, query_row += group_size_) {
      first[row] = fragment + query_row / kFragmentRows;
      last[row] = fragment + (query_row + group_size_ - 1) / kFragmentRows;
    }
  }

  FragmentLoad load;
  int64_t* tokens = tokens_.fill(num_fragments_ + 1, 0);
  int32_t* steps = steps_.fill(num_fragments_ + 1, 0);
  for (int32_t i = 0; i < num_pieces; ++i) {
    const Piece& piece = pieces[i];
    if (piece.is_separated(tail_room)) continue;
    const int32_t begin = first[piece.first_row], end = last[piece.last_row] + 1;
    tokens[begin] += piece.tokens;
    tokens[end] -= piece.tokens;
    ++steps[begin];
    --steps[end];
    load.unique_tokens += piece.tokens;
  }
  for (int32_t f = 0; f < num_fragments_; ++f) {
    if (f > 0) {
      tokens[f] += tokens[f - 1];
      steps[f] += steps[f - 1];
    }
    load.tokens += tokens[f];
    load.steps += steps[f];
  }
  for (int32_t item = 0; item < num_items_; ++item) {
    load.longest_warp = std::max(load.longest_warp, longest_warp(item));
  }
  load.fragments = num_fragments_;
  return load;
}

int64_t FragmentGrid::longest_warp(int32_t item) const {
  int64_t of_warp[kItemWarps] = {};
  const int32_t begin = first_fragment(item), end = first_fragment(item + 1);
  for (int32_t f = begin; f < end; ++f) of_warp[(f - begin) % kItemWarps] += tokens_[f];
  return *std::max_element(of_warp, of_warp + kItemWarps);
}

}  // namespace pat
