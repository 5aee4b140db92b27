// SPDX-License-Identifier: MIT
#include "packer.h"

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace pat {
namespace {

constexpr int64_t kPartScales[] = {1, 4, 16, 64};
constexpr int64_t kMaxPartScale = 16384;
constexpr int32_t kStrideFactor = 4;

// Python's a // b for b > 0.
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

int32_t horizon_of(const SegmentTree& tree) {
  int32_t shortest = tree.num_rows() > 0 ? tree.lens()[0] : 0;
  for (int32_t row = 1; row < tree.num_rows(); ++row) {
    shortest = std::min(shortest, tree.lens()[row]);
  }
  return std::min(64 + shortest / 32, kMaxHorizon);
}

}  // namespace

Packer::Packer(const Shape& shape, const CostModel& model)
    : shape_(shape),
      model_(model),
      prices_(shape.group_size, model),
      splitter_(shape, model, prices_) {}

// Child lists and own rows of the segments. All own rows of a segment cost the same to merge, so
// their number and their tokens are all the choice of packs needs.
void Packer::link(const SegmentTree& tree) {
  const int32_t n = tree.size();
  first_child_.fill(n, -1);
  next_sibling_.fit(n);
  own_rows_.fill(n, 0);
  own_tokens_.fill(n, 0);
  for (int32_t u = n - 1; u >= 0; --u) {
    const int32_t above = tree[u].parent;
    if (above < 0) continue;
    next_sibling_[u] = first_child_[above];
    first_child_[above] = u;
  }
  for (int32_t row = 0; row < tree.num_rows(); ++row) {
    const int32_t home = tree.home(row);
    if (home < 0) continue;
    ++own_rows_[home];
    own_tokens_[home] += tree.lens()[row] - tree[home].end;
  }
  if (shape_.group_size <= kMaxChainGroup) price_steps(tree);
}

// Where the pack of each segment may start: there, or at one of the nearest stops above. Returns the
// number of levels of the tree.
int32_t Packer::place_starts(const SegmentTree& tree, int32_t stride) {
  const int32_t n = tree.size();
  depth_.fit(n);
  is_stop_.fit(n);
  num_levels_.fit(n);
  starts_.fit(n * kNumLevels);
  int32_t deepest = 0;
  for (int32_t u = 0; u < n; ++u) {
    const int32_t above = tree[u].parent;
    int32_t depth = 0, levels = 1;
    starts_[u * kNumLevels] = tree[u].begin;
    if (above >= 0) {
      depth = depth_[above] + 1;
      const int32_t step = is_stop_[above];
      levels = std::min(num_levels_[above] + step, kNumLevels);
      for (int32_t j = 1; j < levels; ++j) {
        starts_[u * kNumLevels + j] = starts_[above * kNumLevels + j - step];
      }
    }
    depth_[u] = depth;
    is_stop_[u] = depth % stride == 0;
    num_levels_[u] = levels;
    deepest = std::max(deepest, depth);
  }
  return deepest + 1;
}

// What the steps of a chain cost, and how many levels of segments they have.
void Packer::price_steps(const SegmentTree& tree) {
  const int32_t n = tree.size();
  levels_below_.fill(n, 0);
  below_ps_.fill(n, 0);
  for (int32_t u = n - 1; u >= 0; --u) {
    below_ps_[u] += own_tokens_[u] * model_.token_ps[0] + own_rows_[u] * model_.step_ps;
    const int32_t above = tree[u].parent;
    if (above < 0) continue;
    const int64_t query_rows = static_cast<int64_t>(tree[u].num_rows) * shape_.group_size;
    const int64_t fragments = (query_rows + kFragmentRows - 1) / kFragmentRows;
    const int64_t token_ps = model_.token_ps[0] + (fragments - 1) * model_.reread_ps[0];
    below_ps_[above] +=
        (tree[u].end - tree[u].begin) * token_ps + fragments * model_.step_ps + below_ps_[u];
    levels_below_[above] = std::max(levels_below_[above], levels_below_[u] + 1);
  }
}

// Bottom-up: the least cost of every segment and level, and who merges for it. Forced: no row reads
// a shared run in its own tail. Without chains comes second: a segment with nothing below costs what
// it cost the first time as a plain pack.
void Packer::choose_costs(const SegmentTree& tree, int64_t part_ps, bool forced, bool chains) {
  const int32_t n = tree.size();
  const PriceTable::Price one = prices_[1];
  cost_.fit(n * kNumLevels);
  merged_rows_.fit(n * kNumLevels);
  plain_cost_.fit(n * kNumLevels);
  plain_merged_rows_.fit(n * kNumLevels);
  merges_.fill(n, 0);
  starts_chain_.fill(n, 0);
  Option* options = options_.fit(n);
  for (int32_t u = n - 1; u >= 0; --u) {
    const bool is_leaf = first_child_[u] < 0;
    if (is_leaf && !chains) {
      std::copy_n(&plain_cost_[u * kNumLevels], num_levels_[u], &cost_[u * kNumLevels]);
      std::copy_n(&plain_merged_rows_[u * kNumLevels], num_levels_[u],
                  &merged_rows_[u * kNumLevels]);
      continue;
    }
    const Segment& segment = tree[u];
    const int32_t own_rows = own_rows_[u];
    int64_t split_total = own_rows * (one.item_ps + part_ps) + own_tokens_[u] * one.token_ps;
    for (int32_t v = first_child_[u]; v >= 0; v = next_sibling_[v]) {
      split_total += cost_[v * kNumLevels];
    }
    const bool may_chain =
        chains && shape_.group_size <= kMaxChainGroup && levels_below_[u] <= kMaxChainDepth;
    for (int32_t j = 0; j < num_levels_[u]; ++j) {
      const int32_t start = starts_[u * kNumLevels + j];
      const int64_t tokens = segment.end - start;
      const int64_t own_extra = tokens * one.token_ps - (start > 0 ? 0 : part_ps);

      int32_t num_options = 0;
      const int32_t below = j + is_stop_[u];  // level of a child that merges
      if (below > 0 && below < kNumLevels) {
        for (int32_t v = first_child_[u]; v >= 0; v = next_sibling_[v]) {
          const int64_t extra = cost_[v * kNumLevels + below] - cost_[v * kNumLevels];
          options[num_options++] = {floor_div(extra, tree[v].num_rows), extra, v, tree[v].num_rows};
        }
        if (num_options > 1) {
          std::sort(options, options + num_options, [](const Option& a, const Option& b) {
            return std::tie(a.extra_per_row, a.segment) < std::tie(b.extra_per_row, b.segment);
          });
        }
      }

      int64_t total = split_total;
      int32_t left = segment.num_rows;
      const auto candidate = [&] {
        if (left == 0) return total;
        const PriceTable::Price& price = prices_[left];
        return total + price.item_ps + tokens * price.token_ps + left * part_ps;
      };
      int64_t best = candidate();
      int32_t best_segments = 0, best_rows = 0, seen_rows = 0, i = 0;
      const auto take_own_rows = [&] {  // they sort as one group, behind equal segments
        const auto take = [&](int32_t rows) {
          total += rows * own_extra;
          left -= rows;
          seen_rows += rows;
        };
        while (seen_rows < own_rows) {
          // As long as the pack's price stays, each row changes the cost by as much: the best of
          // these is the first or the last.
          const int32_t same =
              std::min<int32_t>(own_rows - seen_rows, left - prices_[left - 1].first_rows);
          const int32_t tried = own_extra < part_ps ? same : 1;
          take(tried);
          if (const int64_t now = candidate(); now < best) {
            best = now;
            best_segments = i;
            best_rows = seen_rows;
          }
          take(same - tried);
        }
      };
      for (; i < num_options;) {
        if (!forced && options[i].extra_per_row > own_extra) take_own_rows();
        total += options[i].extra;
        left -= options[i].num_rows;
        ++i;
        if (const int64_t now = candidate(); now < best) {
          best = now;
          best_segments = i;
          best_rows = seen_rows;
        }
      }
      if (!forced) take_own_rows();

      if (is_leaf) {
        plain_cost_[u * kNumLevels + j] = best;
        plain_merged_rows_[u * kNumLevels + j] = best_rows;
      }
      if (may_chain) {
        const PriceTable::Price& price = prices_[segment.num_rows];
        const int64_t chain = price.item_ps + tokens * price.token_ps + below_ps_[u] +
                              (start > 0 ? segment.num_rows * part_ps : 0);
        if (chain < best) {
          best = chain;
          best_segments = 0;
          best_rows = 0;
          starts_chain_[u] |= 1u << j;
        }
      }

      cost_[u * kNumLevels + j] = best;
      merged_rows_[u * kNumLevels + j] = best_rows;
      for (i = 0; i < best_segments; ++i) merges_[options[i].segment] |= 1u << j;
    }
  }
}

// Top-down: where each segment's pack starts, then which packs each row is in. false: the workspace
// does not hold the partials even if nothing is cut; packing_ is of no use then.
bool Packer::choose_packs(const SegmentTree& tree) {
  const int32_t n = tree.size(), num_rows = tree.num_rows();
  level_.fit(n);
  pack_above_.fit(n);
  chain_of_.fit(n);
  packing_.num_chains = 0;
  for (int32_t v = 0; v < n; ++v) {
    const int32_t above = tree[v].parent;
    const bool merges = above >= 0 && (merges_[v] >> level_[above] & 1);
    level_[v] = merges ? level_[above] + is_stop_[above] : 0;
    // Rows in the pack of v, or merged at v, are next in the pack of the nearest segment above
    // whose run v's pack does not take along.
    pack_above_[v] = merges ? pack_above_[above] : above;
    chain_of_[v] = above >= 0 ? chain_of_[above] : -1;
    if (chain_of_[v] < 0 && (starts_chain_[v] >> level_[v] & 1)) {
      chain_of_[v] = v;
      ++packing_.num_chains;
    }
  }

  // Within a chain nothing merges: all rows flow through its segments to the one that starts it.
  inflow_.fill(n, 0);
  pack_at_.fit(n);
  first_row_.fit(n);
  next_own_.fit(n);
  const auto merged_at = [&](int32_t u) { return merged_rows_[u * kNumLevels + level_[u]]; };
  for (int32_t u = n - 1; u >= 0; --u) {
    if (pack_above_[u] >= 0) inflow_[pack_above_[u]] += inflow_[u] + own_rows_[u];
  }
  SharedPack* shared = packing_.shared.fit(n);
  int32_t num_entries = 0;
  int64_t num_parts = 0;
  int32_t num_chains = 0;
  packing_.num_shared = 0;
  for (int32_t u = 0; u < n; ++u) {
    const int32_t above = tree[u].parent;
    const bool in_chain = chain_of_[u] >= 0;
    if (in_chain && chain_of_[u] != u) {  // depth first: its rows before the own rows of the parent
      first_row_[u] = next_own_[u] = next_own_[above];
      next_own_[above] += tree[u].num_rows;
      continue;
    }
    const int32_t start = starts_[u * kNumLevels + level_[u]];
    const int32_t rows = inflow_[u] + own_rows_[u] - merged_at(u);
    if (!in_chain) num_parts += own_rows_[u] - (start > 0 ? 0 : merged_at(u));  // of the tails
    if (!in_chain || start > 0) num_parts += rows;
    if (num_parts > shape_.max_parts) return false;
    if (rows == 0) continue;
    pack_at_[u] = packing_.num_shared;
    shared[packing_.num_shared++] = {u,           start, tree[u].end,
                                     num_entries, rows,  in_chain ? num_chains++ : -1};
    next_own_[u] = num_entries;
    num_entries += rows;
  }

  int32_t* rows = packing_.rows.fit(num_entries);
  int32_t* cursor = cursor_.fit(packing_.num_shared);
  for (int32_t i = 0; i < packing_.num_shared; ++i) cursor[i] = shared[i].first_row;
  own_seen_.fill(n, 0);
  int32_t* tail_start = packing_.tail_start.fit(num_rows);
  uint8_t* in_chain = packing_.in_chain.fill(num_rows, 0);
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t home = tree.home(row);
    tail_start[row] = 0;
    if (home < 0) continue;
    int32_t u = home;
    if (chain_of_[home] >= 0) {
      in_chain[row] = 1;
      tail_start[row] = tree[home].end;
      rows[next_own_[home]++] = row;
      u = pack_above_[chain_of_[home]];
    } else {
      const bool merged = ++own_seen_[home] <= merged_at(home);
      tail_start[row] = merged ? starts_[home * kNumLevels + level_[home]] : tree[home].end;
      if (merged) u = pack_above_[home];
    }
    for (; u >= 0; u = pack_above_[u]) rows[cursor[pack_at_[u]]++] = row;
  }
  if (packing_.num_chains > 0) collect_pieces(tree, num_entries);
  return true;
}

// The segments below the shared run of every chain and the tails of its rows, by first row. Of the
// segments that begin at one row the deepest has the highest index, so that it is listed last.
void Packer::collect_pieces(const SegmentTree& tree, int32_t num_entries) {
  piece_at_.fill(num_entries, -1);
  next_piece_.fit(tree.size());
  int32_t num_segments = 0;
  for (int32_t v = tree.size() - 1; v >= 0; --v) {
    if (chain_of_[v] < 0 || chain_of_[v] == v) continue;
    next_piece_[v] = std::exchange(piece_at_[first_row_[v]], v);
    ++num_segments;
  }
  Chain* chain = packing_.chains.fit(packing_.num_chains);
  Piece* pieces = packing_.pieces.fit(num_segments + tree.num_rows());
  int32_t num_pieces = 0;
  for (int32_t i = 0; i < packing_.num_shared; ++i) {
    const SharedPack& pack = packing_.shared[i];
    if (pack.chain < 0) continue;
    *chain = {};
    chain->first_piece = num_pieces;
    chain->below_ps = below_ps_[pack.segment];
    for (int32_t r = 0; r < pack.num_rows; ++r) {
      for (int32_t v = piece_at_[pack.first_row + r]; v >= 0; v = next_piece_[v]) {
        pieces[num_pieces++] = {v, r, r + tree[v].num_rows - 1, tree[v].end - tree[v].begin};
      }
      const int32_t row = packing_.rows[pack.first_row + r];
      const int32_t tokens = tree.lens()[row] - packing_.tail_start[row];
      pieces[num_pieces++] = {-1, r, r, tokens};
      chain->longest_tail = std::max(chain->longest_tail, tokens);
    }
    chain->num_pieces = num_pieces - chain->first_piece;
    ++chain;
  }
}

// The best plan that shares, left in packing_: with chains where they are additively cheapest or,
// if there are any, without; a sum does not see how evenly the items load the GPU.
std::optional<Split> Packer::choose_shared(const SegmentTree& tree, int64_t part_scale) {
  const int64_t part_ps = model_.part_ps * part_scale * shape_.group_size;
  const bool forced = shape_.sharing == Sharing::kOn && part_scale == 1;
  choose_costs(tree, part_ps, forced, true);
  std::optional<Split> chains, plain;
  if (choose_packs(tree)) chains = splitter_.choose(tree, packing_, true, INT64_MAX);
  if (packing_.num_chains == 0) return chains;
  std::swap(packing_, with_chains_);
  packing_.horizon = with_chains_.horizon;
  packing_.coarsened = with_chains_.coarsened;
  choose_costs(tree, part_ps, forced, false);
  if (choose_packs(tree)) {
    plain = splitter_.choose(tree, packing_, true, chains ? chains->predicted_ps : INT64_MAX);
  }
  if (plain && (!chains || plain->predicted_ps < chains->predicted_ps)) return plain;
  std::swap(packing_, with_chains_);
  return chains;
}

// The best plan that shares under the first stride and price of partials under which one fits.
std::optional<Split> Packer::choose_fitting(const SegmentTree& tree) {
  int32_t num_depths = 1;
  for (int32_t stride = 1; stride < kStrideFactor * num_depths; stride *= kStrideFactor) {
    num_depths = place_starts(tree, stride);
    for (const int64_t scale : kPartScales) {
      const int64_t price = std::min(stride * scale, kMaxPartScale);
      if (const auto chosen = choose_shared(tree, price)) return chosen;
      ++packing_.coarsened;
      if (price == kMaxPartScale) break;
    }
  }
  return std::nullopt;
}

const Packing& Packer::pack(const SegmentTree& tree) {
  const int32_t num_rows = tree.num_rows();
  prices_.reserve(std::max(num_rows, 1));
  packing_.horizon = horizon_of(tree);
  packing_.coarsened = 0;

  std::optional<Split> chosen;
  if (shape_.sharing != Sharing::kOff && tree.size() > 0) {
    link(tree);
    chosen = choose_fitting(tree);
  }
  packing_.sharing = chosen.has_value();
  if (shape_.sharing != Sharing::kOn || !chosen) {
    const auto alone =
        splitter_.choose(tree, packing_, false, chosen ? chosen->predicted_ps : INT64_MAX);
    if (alone && (!chosen || alone->predicted_ps <= chosen->predicted_ps)) {
      chosen = alone;
      packing_.sharing = false;
      packing_.num_shared = packing_.num_chains = 0;
      packing_.tail_start.fill(num_rows, 0);
      packing_.in_chain.fill(num_rows, 0);
    }
  }
  if (!chosen) {
    throw std::invalid_argument(
        std::to_string(num_rows) + " rows of " + std::to_string(shape_.group_size) +
        " query heads per KV head need at least that many work items, but the plan holds " +
        std::to_string(shape_.max_items) + ": raise max_rows");
  }
  splitter_.apply(tree, *chosen, packing_);
  return packing_;
}

}  // namespace pat
