// SPDX-License-Identifier: MIT
// Segments -> packs -> cuts: which rows read which KV run together, and how runs are cut along the
// tokens. Decides exactly as pat_sglang/packing.py does; the comments there say why, the comments
// here say what makes it fast.
#pragma once

#include <cstdint>
#include <optional>

#include "cost_model.h"
#include "scratch.h"
#include "segment_tree.h"

namespace pat {

inline constexpr int32_t kMaxInherit = 4;  // levels one pack may span beyond its own
inline constexpr int32_t kNumLevels = kMaxInherit + 1;
inline constexpr int32_t kMinChunk = 64;
inline constexpr int32_t kChunkAlign = 32;
inline constexpr int32_t kMaxHorizon = 256;

/// Packs of a batch and how each is cut. The shared packs come first, then one tail a row.
struct Packing {
  /// One pack with two rows or more, or one that several rows left to the last.
  struct SharedPack {
    int32_t segment;  // deepest segment of the range
    int32_t start;    // first token position; the range ends where the segment ends
    int32_t end;
    int32_t first_row;  // index in `rows` of the first row
    int32_t num_rows;
  };

  Scratch<SharedPack> shared;
  int32_t num_shared = 0;
  Scratch<int32_t> rows;               // rows of all shared packs, ascending in each
  Scratch<int32_t> tail_start;         // [rows] where each row's own pack starts
  Scratch<int32_t> chunk, num_chunks;  // [num_shared + rows]

  int32_t horizon = 0;
  bool sharing = false;
  int32_t coarsened = 0;
  int64_t predicted_ps = 0;
};

/// Chooses the packing of a batch; owns the result and the scratch memory of the choice.
class Packer {
 public:
  Packer(const Shape& shape, const CostModel& model);

  /// Valid until the next call. Raises std::invalid_argument when not even one item a row fits.
  const Packing& pack(const SegmentTree& tree);

  const PriceTable& prices() const { return prices_; }

 private:
  /// A limit on the solo time of work items (in 1/8 of the mean, 0: none), and what it leads to.
  struct Split {
    int64_t predicted_ps;
    int32_t eighths;
    int64_t mean_ps;
  };
  /// Longest chunk of each tile under a limit.
  struct Room {
    int64_t tokens[kNumTiles];
  };
  struct Cut {
    int32_t chunk;
    int32_t num_chunks;
  };
  /// A child segment that may extend its pack upwards.
  struct Option {
    int64_t extra_per_row;
    int64_t extra;
    int32_t segment;
    int32_t num_rows;
  };

  void link(const SegmentTree& tree);
  void choose_costs(const SegmentTree& tree, int64_t part_ps, bool forced);
  void choose_packs(const SegmentTree& tree);
  std::optional<Split> choose_split(const SegmentTree& tree, bool shared, int64_t give_up_ps);
  void apply(const SegmentTree& tree, const Split& split);

  Room room_for(int64_t mean_ps, int32_t eighths) const;
  static Cut cut(int64_t tokens, int64_t room);
  static Cut cut_tail(int64_t tokens, int64_t room, int32_t horizon);

  Shape shape_;
  CostModel model_;
  PriceTable prices_;
  Packing packing_;

  // By segment. Levels: how many segments further up the pack may start.
  Scratch<int32_t> first_child_, next_sibling_, own_rows_, num_levels_, level_;
  Scratch<int64_t> own_tokens_;        // tail tokens of the own rows
  Scratch<int32_t> starts_;            // [segments, kNumLevels]
  Scratch<int64_t> cost_;              // [segments, kNumLevels]
  Scratch<int32_t> merged_rows_;       // [segments, kNumLevels], own rows that merge
  Scratch<uint8_t> merges_;            // bit j: merges when the parent is at level j
  Scratch<int32_t> pack_above_;        // next pack of a row that is in this one
  Scratch<int32_t> inflow_, pack_at_;  // rows arriving from below; index of the pack, by segment
  Scratch<int32_t> own_seen_, cursor_;
  Scratch<Option> options_;
};

}  // namespace pat
