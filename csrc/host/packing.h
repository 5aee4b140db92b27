// SPDX-License-Identifier: MIT
// Which rows read which KV run together, and how the runs are cut: what the planner decides.
#pragma once

#include <cstdint>

#include "fragments.h"
#include "scratch.h"

namespace pat {

/// A pack with two rows or more, or one that several rows left to the last.
struct SharedPack {
  int32_t segment;  // deepest segment of the range
  int32_t start;    // first token position; the range ends where the segment ends
  int32_t end;
  int32_t first_row;  // index in Packing::rows of the first row
  int32_t num_rows;
  int32_t chain;  // index in Packing::chains, -1: a plain pack
};

/// What a pack that is a chain has besides; its last chunk is the run that its work items share.
struct Chain {
  int32_t first_piece;  // index in Packing::pieces
  int32_t num_pieces;
  int32_t longest_tail;   // tokens
  int32_t rows_per_item;  // request rows of a work item
  int64_t num_steps;
  int64_t below_ps;  // SM time of its steps if nothing is cut
};

/// Packs of a batch and how each is cut. The shared packs come first, then one tail a row, which
/// has no chunk if a chain reads it.
struct Packing {
  Scratch<SharedPack> shared;
  int32_t num_shared = 0;
  Scratch<Chain> chains;
  int32_t num_chains = 0;
  Scratch<Piece> pieces;               // what lies below the shared run of every chain
  Scratch<uint8_t> in_chain;           // [rows]
  int64_t tail_room = 0;               // longest tail a chain reads: those beyond are separated
  Scratch<int32_t> rows;               // of all shared packs: ascending; in a chain, depth first
  Scratch<int32_t> tail_start;         // [rows] where each row's own pack starts
  Scratch<int32_t> chunk, num_chunks;  // [num_shared + rows]

  int32_t horizon = 0;
  bool sharing = false;
  int32_t coarsened = 0;
  int64_t predicted_ps = 0;
};

}  // namespace pat
