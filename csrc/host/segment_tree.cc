// SPDX-License-Identifier: MIT
#include "segment_tree.h"

#include <stdexcept>
#include <string>

namespace pat {
namespace {

void check(const Batch& batch) {
  const auto fail = [](const char* what, int32_t index, int32_t value, const char* why) {
    throw std::invalid_argument(std::string(what) + "[" + std::to_string(index) +
                                "] = " + std::to_string(value) + why);
  };
  for (int32_t node = 0; node < batch.num_nodes; ++node) {
    const int32_t above = batch.parent[node];
    if (above < -1 || above >= batch.num_nodes) {
      fail("parent", node, above, " is out of range [-1, nodes)");
    }
    if (batch.length[node] < 0) fail("length", node, batch.length[node], " is negative");
  }
  for (int32_t row = 0; row < batch.num_rows; ++row) {
    const int32_t leaf = batch.leaf_of_row[row];
    if (leaf < -1 || leaf >= batch.num_nodes) {
      fail("leaf_of_row", row, leaf, " is out of range [-1, nodes)");
    }
  }
  for (int32_t row = 0; row < batch.num_rows; ++row) {
    if (batch.lens[row] < 0) {
      fail("host_lens", row, batch.lens[row], ": a sequence length is negative");
    }
  }
}

}  // namespace

// Every parent before its children, otherwise by index; breadth first when the input is not so yet.
const int32_t* SegmentTree::topological_order(const Batch& batch) {
  const int32_t n = batch.num_nodes;
  const int32_t* parent = batch.parent;
  int32_t* order = order_.fit(n);
  bool ordered = true;
  for (int32_t node = 0; node < n; ++node) {
    order[node] = node;
    ordered &= parent[node] < node;
  }
  if (ordered) return order;

  int32_t* child = first_child_.fill(n, -1);
  int32_t* sibling = next_sibling_.fit(n);
  for (int32_t node = n - 1; node >= 0; --node) {
    if (parent[node] < 0) continue;
    sibling[node] = child[parent[node]];
    child[parent[node]] = node;
  }
  int32_t num = 0;
  for (int32_t node = 0; node < n; ++node) {
    if (parent[node] < 0) order[num++] = node;
  }
  for (int32_t i = 0; i < num; ++i) {
    for (int32_t v = child[order[i]]; v >= 0; v = sibling[v]) order[num++] = v;
  }
  if (num != n) throw std::invalid_argument("the parents of the forest form a cycle");
  return order;
}

void SegmentTree::build(const Batch& batch) {
  check(batch);
  const int32_t num_nodes = batch.num_nodes;
  num_rows_ = batch.num_rows;
  lens_ = batch.lens;
  num_segments_ = 0;
  const int32_t* order = topological_order(batch);
  const int32_t* parent = batch.parent;
  Node* nodes = nodes_.fit(num_nodes);
  int32_t* home = home_.fit(num_rows_);

  for (int32_t i = 0; i < num_nodes; ++i) {
    const int32_t node = order[i], above = parent[node];
    nodes[node] = {batch.length[node] + (above >= 0 ? nodes[above].depth : 0), 0, num_rows_, -1};
  }
  // A row whose path is longer than its length is lifted to the deepest node that still fits.
  for (int32_t row = 0; row < num_rows_; ++row) {
    int32_t leaf = batch.leaf_of_row[row];
    while (leaf >= 0 && nodes[leaf].depth > batch.lens[row]) leaf = parent[leaf];
    home[row] = leaf;
    if (leaf >= 0) {
      ++nodes[leaf].count;
      nodes[leaf].first = std::min(nodes[leaf].first, row);
    }
  }
  for (int32_t i = num_nodes - 1; i >= 0; --i) {
    const Node& node = nodes[order[i]];
    const int32_t above = parent[order[i]];
    if (above < 0 || node.count == 0) continue;
    nodes[above].count += node.count;
    nodes[above].first = std::min(nodes[above].first, node.first);
  }

  // Consecutive nodes with the same rows become one segment. Rows below a node are rows below its
  // parent, so equal counts mean equal sets.
  Segment* segments = segments_.fit(num_nodes);
  for (int32_t i = 0; i < num_nodes; ++i) {
    Node& node = nodes[order[i]];
    const int32_t above = parent[order[i]], tokens = batch.length[order[i]];
    int32_t at = above >= 0 ? nodes[above].segment : -1;
    if (node.count >= 2 && tokens > 0) {
      // A node with two rows fits their int32 lengths, so its depth does too.
      const auto end = static_cast<int32_t>(node.depth);
      if (at >= 0 && segments[at].num_rows == node.count) {
        segments[at].end = end;
      } else {
        segments[num_segments_] = {at, end - tokens, end, node.count, node.first};
        at = num_segments_++;
      }
    }
    node.segment = at;
  }
  for (int32_t row = 0; row < num_rows_; ++row) {
    if (home[row] >= 0) home[row] = nodes[home[row]].segment;
  }
}

int64_t SegmentTree::unique_tokens() const {
  int64_t tokens = 0;
  for (int32_t u = 0; u < num_segments_; ++u) tokens += segments_[u].end - segments_[u].begin;
  for (int32_t row = 0; row < num_rows_; ++row) tokens += lens_[row] - tail_begin(row);
  return tokens;
}

}  // namespace pat
