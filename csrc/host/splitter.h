// SPDX-License-Identifier: MIT
// Packs -> work items: how runs are cut along the tokens, and chains along their rows, so that no
// work item lasts much longer than a limit. Mirrors choose_split of pat_sglang/packing.py.
#pragma once

#include <cstdint>
#include <optional>

#include "cost_model.h"
#include "fragments.h"
#include "packing.h"
#include "schedule.h"
#include "scratch.h"
#include "segment_tree.h"

namespace pat {

inline constexpr int32_t kMinChunk = 64;
inline constexpr int32_t kChunkAlign = 64;

/// A limit on the solo time of work items (in 1/16 of the mean, 0: none), and what it leads to.
struct Split {
  int64_t predicted_ps;
  int32_t wall;
  int64_t mean_ps;
};

class Splitter {
 public:
  /// `prices` must outlive the splitter.
  Splitter(const Shape& shape, const CostModel& model, const PriceTable& prices);

  /// The best limit for the packs of `packing`, or, if not `shared`, for one tail a row. nullopt:
  /// no cut fits the workspace, or every one takes longer than give_up_ps.
  std::optional<Split> choose(const SegmentTree& tree, const Packing& packing, bool shared,
                              int64_t give_up_ps);

  /// Writes the cuts of a choice to `packing`, the last with chains or one without.
  void apply(const SegmentTree& tree, const Split& split, Packing& packing);

 private:
  /// Tokens under a limit.
  struct Room {
    int64_t tokens[kNumTiles];  // of the longest chunk of each tile
    int64_t tail;               // of the longest tail in a chain, which a warp alone may compute
    int64_t span;               // of the steps of a work item, see FragmentLoad
  };
  /// A tail that a pack of its own may read.
  struct Tail {
    int32_t tokens;
    bool has_parts;  // even when it is not cut
  };
  struct Cut {
    int32_t chunk;
    int32_t num_chunks;
    int32_t num_empty = 0;  // further ones of a tail, without a token at first
  };
  /// What a plan takes of the workspace, and its SM time.
  struct Sums {
    int64_t work_ps = 0;
    int64_t parts = 0;
    int64_t items = 0;
  };

  static constexpr int32_t kMaxTries = 8;
  /// The steps of a chain for each number of rows an item that was looked at. They depend on the
  /// limit only through the separated tails, and which these are, only through their number.
  struct Tried {
    int32_t num_separated;  // -1: nothing is known
    uint32_t known;         // bit i: try i is filled in
    FragmentLoad loads[kMaxTries];
  };
  struct ChainCut {
    Cut run = {};
    int32_t rows_per_item = 0;  // 0: no step is left, the chain is a plain pack
    int32_t tile = 0;           // of its work items
    int64_t num_items = 0;
    int64_t num_steps = 0;
    int64_t solo_ps = 0;  // of its longest work item
    int64_t parts = 0;    // without those of the plain chunks
    int64_t work_ps = 0;  // with the plain chunks
  };

  Room room_for(int64_t mean_ps, int32_t wall) const;
  bool decides_as_before(const Room& room) const;
  Cut cut(int64_t tokens, int32_t tile, const Room& room);
  Cut cut_tail(int64_t tokens, const Room& room, int32_t horizon);
  int64_t list_tails(const SegmentTree& tree, const Packing& packing, bool shared);
  ChainCut cut_chain(const Packing& packing, const SharedPack& pack, const Room& room);
  ChainCut without_steps(const SharedPack& pack, const Room& room, int32_t rows_per_item,
                         int32_t num_separated);
  int64_t add_chunks(int32_t num_rows, const Cut& cut, int64_t tokens, bool has_parts, Sums& sums);
  void add_tail(const Tail& tail, const Room& room, int32_t horizon, Sums& sums);
  void sum_whole_tails();
  Sums add_tails(const Room& room, int32_t horizon);
  bool add_chain(const Packing& packing, const SharedPack& pack, const Room& room, Sums& sums);

  Shape shape_;
  CostModel model_;
  const PriceTable& prices_;
  int32_t tried_rows_[kMaxTries];  // rows of a chain's items, widest first
  int32_t num_tries_ = 0;
  Schedule schedule_;     // of the limit that is tried
  Schedule whole_tails_;  // the tails outside of chains when none is cut
  Sums whole_sums_;       // of these
  Room within_ = {};      // the most that was held against each limit and found within it
  bool is_cut_ = false;   // whether something was not, and was cut by the limit
  Scratch<Tail> tails_, chain_tails_;  // outside of chains, and in chains
  int32_t num_tails_ = 0, num_chain_tails_ = 0;
  int64_t longest_tail_ = 0, longest_chain_tail_ = 0;
  Scratch<Tried> tried_;        // [chains]
  Scratch<RowLoad> row_loads_;  // [rows + 1] of every chain, without the separated tails
};

}  // namespace pat
