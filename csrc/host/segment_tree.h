// SPDX-License-Identifier: MIT
// Nodes of a prefix forest -> segments: maximal runs of tokens shared by one set of rows (two or
// more). Mirrors build_segment_tree of pat_sglang/forest.py; children and own rows are implied by
// the parent links and `home`, in ascending order, instead of being stored as lists.
#pragma once

#include <cstdint>

#include "scratch.h"

namespace pat {

/// What the caller knows of a batch; every array is on the host.
struct Batch {
  const int32_t* parent;  // [num_nodes], -1: a root; any order
  const int32_t* length;  // [num_nodes], tokens
  int32_t num_nodes;
  const int32_t* leaf_of_row;  // [num_rows], deepest node of each row, -1: none
  const int32_t* lens;         // [num_rows], sequence lengths as the host knows them
  int32_t num_rows;
};

struct Segment {
  int32_t parent;    // index of the segment above, -1: a root
  int32_t begin;     // first token position
  int32_t end;       // one past the last token position
  int32_t num_rows;  // rows below
  int32_t first_row;
};

class SegmentTree {
 public:
  /// Raises std::invalid_argument for a batch that describes no forest, naming the value.
  void build(const Batch& batch);

  int32_t size() const { return num_segments_; }
  const Segment& operator[](int32_t index) const { return segments_[index]; }
  int32_t num_rows() const { return num_rows_; }
  const int32_t* lens() const { return lens_; }
  /// [rows] deepest segment of each row, -1: the row shares nothing.
  int32_t home(int32_t row) const { return home_[row]; }
  /// [rows] first private token position.
  int32_t tail_begin(int32_t row) const { return home_[row] < 0 ? 0 : segments_[home_[row]].end; }
  /// KV tokens of the batch, every shared token counted once.
  int64_t unique_tokens() const;

 private:
  struct Node {
    int64_t depth;    // token position where the node ends
    int32_t count;    // rows below
    int32_t first;    // smallest row below
    int32_t segment;  // deepest segment at or above the node
  };

  const int32_t* topological_order(const Batch& batch);

  int32_t num_segments_ = 0, num_rows_ = 0;
  const int32_t* lens_ = nullptr;
  Scratch<Segment> segments_;
  Scratch<int32_t> home_;

  Scratch<Node> nodes_;
  Scratch<int32_t> order_, first_child_, next_sibling_;
};

}  // namespace pat
