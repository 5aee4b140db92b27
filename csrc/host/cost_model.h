// SPDX-License-Identifier: MIT
// What the planner must know of the layer, the buffers and the GPU, and the prices of packs.
// Mirrors pat_sglang/cost.py and the dataclasses of pat_sglang/packing.py and layout.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../plan_layout.h"

namespace pat {

enum class Sharing : int32_t { kAuto = 0, kOn = 1, kOff = 2 };

struct Shape {
  int32_t group_size;    // query heads per KV head
  int32_t num_kv_heads;  // every work item is computed once for each
  int64_t max_parts;     // partial slots of the workspace
  int64_t max_items;     // work items the plan buffer holds
  Sharing sharing;
};

/// Picoseconds, one entry a tile; see CostModel in pat_sglang/cost.py for the meaning of each.
struct CostModel {
  int64_t num_sms;
  int64_t item_ps[kNumTiles];
  int64_t token_ps[kNumTiles];
  int64_t reread_ps[kNumTiles];
  int64_t solo_item_ps[kNumTiles];
  int64_t solo_token_ps[kNumTiles];
  int64_t private_token_ps;
  int64_t part_ps;
  int64_t step_ps;
  int64_t merge_ps;
};

/// Sizes of the fixed buffers a plan must fit.
struct Capacity {
  int64_t rows;
  int64_t slots;  // of the slot snapshot
};

/// The batch does not fit the buffers the planner was made with (CapacityError in Python).
class CapacityError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Price of a pack by its number of rows, filled once for all calls of a planner.
class PriceTable {
 public:
  /// Work items of a chunk that have the same tile.
  struct Group {
    int64_t item_ps;   // SM time before the first token
    int64_t token_ps;  // SM time a token
    int64_t parts_ps;  // SM time of the partials of a chunk
    int32_t num_tiles;
    int32_t tile;
  };
  struct Price {
    int64_t item_ps;     // of all groups
    int64_t token_ps;    // of all groups
    int32_t num_tiles;   // work items a chunk of the pack needs
    int32_t tile;        // first (widest) tile of the pack: the one that decides how it is cut
    int32_t first_rows;  // from so many rows up to these item_ps and token_ps are the same
    int32_t num_groups;  // 1 or 2
    Group groups[2];
  };

  PriceTable(int32_t group_size, const CostModel& model) : group_size_(group_size), model_(model) {}

  /// Makes prices of 1..rows rows available to operator[].
  void reserve(int32_t rows) {
    for (auto n = static_cast<int32_t>(prices_.size()); n <= rows; ++n) {
      Price price = price_of(static_cast<int64_t>(n) * group_size_);
      const bool is_same = n > 0 && price.item_ps == prices_[n - 1].item_ps &&
                           price.token_ps == prices_[n - 1].token_ps;
      price.first_rows = is_same ? prices_[n - 1].first_rows : n;
      prices_.push_back(price);
    }
  }

  const Price& operator[](int32_t rows) const { return prices_[rows]; }

  /// Smallest tile that holds `query_rows` (at most the rows of the largest one).
  static int32_t tile_for(int64_t query_rows) {
    int32_t tile = 0;
    while (kTiles[tile].rows < query_rows) ++tile;
    return tile;
  }

 private:
  // Largest tiles first, then the smallest that holds what is left; the first tile of a pack reads
  // device memory, the others mostly find its tokens in L2.
  Price price_of(int64_t query_rows) const {
    constexpr int32_t kLargest = kNumTiles - 1;
    const int64_t num_full = query_rows / kTiles[kLargest].rows;
    const int64_t rest = query_rows % kTiles[kLargest].rows;
    const int32_t last = rest > 0 ? tile_for(rest) : kLargest;
    Price price{};
    if (last == kLargest) {
      add_group(price, kLargest, num_full + (rest > 0), query_rows);
    } else {
      if (num_full > 0) add_group(price, kLargest, num_full, query_rows - rest);
      add_group(price, last, 1, rest);
    }
    price.tile = price.groups[0].tile;
    return price;
  }

  void add_group(Price& price, int32_t tile, int64_t num_tiles, int64_t query_rows) const {
    Group& group = price.groups[price.num_groups];
    group = {.item_ps = num_tiles * model_.item_ps[tile],
             .token_ps = num_tiles * model_.reread_ps[tile],
             .parts_ps = query_rows * model_.part_ps,
             .num_tiles = static_cast<int32_t>(num_tiles),
             .tile = tile};
    if (price.num_groups == 0) group.token_ps += model_.token_ps[tile] - model_.reread_ps[tile];
    price.item_ps += group.item_ps;
    price.token_ps += group.token_ps;
    price.num_tiles += group.num_tiles;
    ++price.num_groups;
  }

  int32_t group_size_;
  CostModel model_;
  std::vector<Price> prices_;
};

}  // namespace pat
