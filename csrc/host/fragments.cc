// SPDX-License-Identifier: MIT
#include "fragments.h"

namespace pat {

void sum_pieces(const Piece* pieces, int32_t num_pieces, int64_t tail_room, int32_t num_rows,
                RowLoad* loads) {
  std::fill_n(loads, num_rows + 1, RowLoad{});
  for (int32_t i = 0; i < num_pieces; ++i) {
    const Piece& piece = pieces[i];
    if (piece.is_separated(tail_room)) continue;
    RowLoad& first = loads[piece.first_row];
    RowLoad& behind = loads[piece.last_row + 1];
    first.begun_tokens += piece.tokens;
    ++first.begun_steps;
    behind.ended_tokens += piece.tokens;
    ++behind.ended_steps;
  }
  for (int32_t row = 1; row <= num_rows; ++row) {
    loads[row].begun_tokens += loads[row - 1].begun_tokens;
    loads[row].ended_tokens += loads[row - 1].ended_tokens;
    loads[row].begun_steps += loads[row - 1].begun_steps;
    loads[row].ended_steps += loads[row - 1].ended_steps;
  }
}

}  // namespace pat
