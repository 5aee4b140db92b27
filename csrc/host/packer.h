// SPDX-License-Identifier: MIT
// Segments -> packs: which rows read which KV run together. Decides exactly as
// pat_sglang/packing.py does; the comments there say why, the comments here say what makes it fast.
#pragma once

#include <cstdint>
#include <optional>

#include "cost_model.h"
#include "packing.h"
#include "scratch.h"
#include "segment_tree.h"
#include "splitter.h"

namespace pat {

inline constexpr int32_t kMaxInherit = 4;  // stops one pack may span beyond its own segment
inline constexpr int32_t kNumLevels = kMaxInherit + 1;
inline constexpr int32_t kMaxChainDepth = 4;   // levels of segments below the run a chain shares
inline constexpr int32_t kMaxChainGroup = 64;  // query heads per KV head beyond which none is made
inline constexpr int32_t kMaxHorizon = 256;

/// Chooses the packing of a batch; owns the result and the scratch memory of the choice.
class Packer {
 public:
  Packer(const Shape& shape, const CostModel& model);
  Packer(const Packer&) = delete;

  /// Valid until the next call. Raises std::invalid_argument when not even one item a row fits.
  const Packing& pack(const SegmentTree& tree);

  const PriceTable& prices() const { return prices_; }

 private:
  /// A child segment that may extend its pack upwards.
  struct Option {
    int64_t extra_per_row;
    int64_t extra;
    int32_t segment;
    int32_t num_rows;
  };

  void link(const SegmentTree& tree);
  int32_t place_starts(const SegmentTree& tree, int32_t stride);
  void price_steps(const SegmentTree& tree);
  std::optional<Split> choose_fitting(const SegmentTree& tree);
  std::optional<Split> choose_shared(const SegmentTree& tree, int64_t part_scale);
  void choose_costs(const SegmentTree& tree, int64_t part_ps, bool forced, bool chains);
  bool choose_packs(const SegmentTree& tree);
  void collect_pieces(const SegmentTree& tree, int32_t num_entries);

  Shape shape_;
  CostModel model_;
  PriceTable prices_;
  Splitter splitter_;
  Packing packing_;
  Packing with_chains_;  // put aside while packing_ is tried without

  // By segment. Levels: how many stops further up the pack starts.
  Scratch<int32_t> first_child_, next_sibling_, own_rows_, num_levels_, level_;
  Scratch<int32_t> depth_;              // levels of segments above
  Scratch<uint8_t> is_stop_;            // packs of segments below may start here
  Scratch<int64_t> own_tokens_;         // tail tokens of the own rows
  Scratch<int32_t> starts_;             // [segments, kNumLevels]
  Scratch<int64_t> cost_;               // [segments, kNumLevels]
  Scratch<int32_t> merged_rows_;        // [segments, kNumLevels], own rows that merge
  Scratch<int64_t> plain_cost_;         // cost_ if the pack is no chain; of leaves only
  Scratch<int32_t> plain_merged_rows_;  // merged_rows_ then
  Scratch<uint8_t> merges_;             // bit j: merges when the parent is at level j
  Scratch<int32_t> pack_above_;         // next pack of a row that is in this one
  Scratch<int32_t> inflow_, pack_at_;   // rows arriving from below; index of the pack, by segment
  Scratch<int32_t> own_seen_, cursor_;
  Scratch<Option> options_;

  // Chains, by segment.
  Scratch<int32_t> levels_below_;
  Scratch<int64_t> below_ps_;      // SM time of the steps below
  Scratch<uint8_t> starts_chain_;  // bit j: a chain is cheapest when the pack starts at level j
  Scratch<int32_t> chain_of_;      // segment whose chain takes this one along, -1: none
  Scratch<int32_t> first_row_;     // index in Packing::rows
  Scratch<int32_t> next_own_;      // where in Packing::rows the next own row goes
  Scratch<int32_t> next_piece_;    // next segment with the same first row
  Scratch<int32_t> piece_at_;      // first segment that begins at a row, by index in Packing::rows
};

}  // namespace pat
