// SPDX-License-Identifier: MIT
#include "packing.h"

#include <stdexcept>
#include <string>
#include <tuple>

namespace pat {
namespace {

constexpr int64_t kPartScales[] = {1, 4, 16, 64};
constexpr int32_t kWallEighths[] = {0, 16, 8, 4, 2, 1};  // 0: no cut at all

// Python's a // b for b > 0.
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// a * b / c of non-negative values; the product of a step's picoseconds and the KV heads may pass
// 64 bits for lengths near 2^31.
int64_t mul_div(int64_t a, int64_t b, int64_t c) {
  int64_t product;
  if (!__builtin_mul_overflow(a, b, &product)) return product / c;
  return static_cast<int64_t>(static_cast<__int128>(a) * b / c);
}

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

int32_t horizon_of(const SegmentTree& tree) {
  int32_t shortest = tree.num_rows() > 0 ? tree.lens()[0] : 0;
  for (int32_t row = 1; row < tree.num_rows(); ++row) {
    shortest = std::min(shortest, tree.lens()[row]);
  }
  return std::min(64 + shortest / 32, kMaxHorizon);
}

}  // namespace

Packer::Packer(const Shape& shape, const CostModel& model)
    : shape_(shape), model_(model), prices_(shape.group_size, model) {}

// Child lists and own rows of the segments. All own rows of a segment cost the same to merge, so
// their number and their tokens are all the choice of packs needs.
void Packer::link(const SegmentTree& tree) {
  const int32_t n = tree.size();
  first_child_.fill(n, -1);
  next_sibling_.fit(n);
  own_rows_.fill(n, 0);
  own_tokens_.fill(n, 0);
  num_levels_.fit(n);
  starts_.fit(n * kNumLevels);
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
  for (int32_t u = 0; u < n; ++u) {
    const int32_t above = tree[u].parent;
    int32_t levels = 1;
    starts_[u * kNumLevels] = tree[u].begin;
    if (above >= 0) {
      levels += std::min(num_levels_[above], kMaxInherit);
      for (int32_t j = 1; j < levels; ++j) {
        starts_[u * kNumLevels + j] = starts_[above * kNumLevels + j - 1];
      }
    }
    num_levels_[u] = levels;
  }
}

// Bottom-up: the least cost of every segment and level, and who merges for it. Forced: no row reads a
// shared run in its own tail.
void Packer::choose_costs(const SegmentTree& tree, int64_t part_ps, bool forced) {
  const int32_t n = tree.size();
  const PriceTable::Price one = prices_[1];
  cost_.fit(n * kNumLevels);
  merged_rows_.fit(n * kNumLevels);
  merges_.fill(n, 0);
  Option* options = options_.fit(n);
  for (int32_t u = n - 1; u >= 0; --u) {
    const Segment& segment = tree[u];
    const int64_t own_rows = own_rows_[u];
    int64_t split_total = own_rows * (one.item_ps + part_ps) + own_tokens_[u] * one.token_ps;
    for (int32_t v = first_child_[u]; v >= 0; v = next_sibling_[v]) {
      split_total += cost_[v * kNumLevels];
    }
    for (int32_t j = 0; j < num_levels_[u]; ++j) {
      const int32_t start = starts_[u * kNumLevels + j];
      const int64_t tokens = segment.end - start;
      const int64_t own_extra = tokens * one.token_ps - (start > 0 ? 0 : part_ps);

      int32_t num_options = 0;
      if (j + 1 < kNumLevels) {
        for (int32_t v = first_child_[u]; v >= 0; v = next_sibling_[v]) {
          const int64_t extra = cost_[v * kNumLevels + j + 1] - cost_[v * kNumLevels];
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
        while (seen_rows < own_rows) {
          total += own_extra;
          --left;
          ++seen_rows;
          if (const int64_t now = candidate(); now < best) {
            best = now;
            best_segments = i;
            best_rows = seen_rows;
          }
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

      cost_[u * kNumLevels + j] = best;
      merged_rows_[u * kNumLevels + j] = best_rows;
      for (i = 0; i < best_segments; ++i) merges_[options[i].segment] |= 1u << j;
    }
  }
}

// Top-down: where each segment's pack starts, then which packs each row is in.
void Packer::choose_packs(const SegmentTree& tree) {
  const int32_t n = tree.size(), num_rows = tree.num_rows();
  level_.fit(n);
  pack_above_.fit(n);
  for (int32_t v = 0; v < n; ++v) {
    const int32_t above = tree[v].parent;
    const bool merges = above >= 0 && (merges_[v] >> level_[above] & 1);
    level_[v] = merges ? level_[above] + 1 : 0;
    // Rows in the pack of v, or merged at v, are next in the pack of the nearest segment above
    // whose run v's pack does not take along.
    pack_above_[v] = merges ? pack_above_[above] : above;
  }

  inflow_.fill(n, 0);
  pack_at_.fit(n);
  const auto merged_at = [&](int32_t u) { return merged_rows_[u * kNumLevels + level_[u]]; };
  for (int32_t u = n - 1; u >= 0; --u) {
    if (pack_above_[u] >= 0) inflow_[pack_above_[u]] += inflow_[u] + own_rows_[u];
  }
  auto* shared = packing_.shared.fit(n);
  int32_t num_entries = 0;
  packing_.num_shared = 0;
  for (int32_t u = 0; u < n; ++u) {
    const int32_t rows = inflow_[u] + own_rows_[u] - merged_at(u);
    if (rows == 0) continue;
    pack_at_[u] = packing_.num_shared;
    shared[packing_.num_shared++] = {u, starts_[u * kNumLevels + level_[u]], tree[u].end,
                                     num_entries, rows};
    num_entries += rows;
  }

  int32_t* rows = packing_.rows.fit(num_entries);
  int32_t* cursor = cursor_.fit(packing_.num_shared);
  for (int32_t i = 0; i < packing_.num_shared; ++i) cursor[i] = shared[i].first_row;
  own_seen_.fill(n, 0);
  int32_t* tail_start = packing_.tail_start.fit(num_rows);
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t home = tree.home(row);
    tail_start[row] = 0;
    if (home < 0) continue;
    const bool merged = ++own_seen_[home] <= merged_at(home);
    tail_start[row] = merged ? starts_[home * kNumLevels + level_[home]] : tree[home].end;
    for (int32_t u = merged ? pack_above_[home] : home; u >= 0; u = pack_above_[u]) {
      rows[cursor[pack_at_[u]]++] = row;
    }
  }
}

Packer::Room Packer::room_for(int64_t mean_ps, int32_t eighths) const {
  Room room;
  for (int32_t k = 0; k < kNumTiles; ++k) {
    const int64_t tokens = mul_div(mean_ps, eighths, 8) / model_.solo_token_ps[k];
    room.tokens[k] = eighths == 0 ? INT64_MAX : std::max<int64_t>(tokens, kMinChunk);
  }
  return room;
}

Packer::Cut Packer::cut(int64_t tokens, int64_t room) {
  if (tokens <= room) return {static_cast<int32_t>(tokens), 1};
  const auto total = static_cast<uint32_t>(tokens);
  const uint32_t count = ceil_div(total, static_cast<uint32_t>(room));
  const uint32_t chunk = (ceil_div(total, count) + kChunkAlign - 1) / kChunkAlign * kChunkAlign;
  return {static_cast<int32_t>(chunk), static_cast<int32_t>(ceil_div(total, chunk))};
}

// A tail that is cut has chunks for the horizon as well, empty at first.
Packer::Cut Packer::cut_tail(int64_t tokens, int64_t room, int32_t horizon) {
  Cut result = cut(tokens, room);
  if (result.num_chunks > 1) {
    result.num_chunks = static_cast<int32_t>(
        ceil_div(static_cast<uint32_t>(tokens + horizon), static_cast<uint32_t>(result.chunk)));
  }
  return result;
}

// The best limit for the packs of packing_, or for one tail a row. As limits fall, work, partials
// and items never fall, so the search ends early without changing what Python finds. nullopt: no
// cut fits the workspace, or every one takes longer than give_up_ps.
std::optional<Packer::Split> Packer::choose_split(const SegmentTree& tree, bool shared,
                                                  int64_t give_up_ps) {
  const int32_t num_rows = tree.num_rows(), num_shared = shared ? packing_.num_shared : 0;
  const int32_t* lens = tree.lens();
  const int32_t horizon = packing_.horizon;
  const PriceTable::Price one = prices_[1];
  const int64_t part_ps = model_.part_ps * shape_.group_size;

  int64_t base_ps = 0, fixed_ps = 0, longest[kNumTiles] = {};
  for (int32_t i = 0; i < num_shared; ++i) {
    const Packing::SharedPack& pack = packing_.shared[i];
    const PriceTable::Price& price = prices_[pack.num_rows];
    const int64_t tokens = pack.end - pack.start;
    base_ps += price.item_ps + tokens * price.token_ps;
    fixed_ps = std::max(fixed_ps, model_.solo_item_ps[price.tile]);
    longest[price.tile] = std::max(longest[price.tile], tokens);
  }
  if (num_rows > 0) {
    int64_t sum = 0, most = 0;
    for (int32_t row = 0; row < num_rows; ++row) {
      const int64_t tokens = lens[row] - (shared ? packing_.tail_start[row] : 0);
      sum += tokens;
      most = std::max(most, tokens);
    }
    base_ps += num_rows * one.item_ps + sum * one.token_ps;
    fixed_ps = std::max(fixed_ps, model_.solo_item_ps[one.tile]);
    longest[one.tile] = std::max(longest[one.tile], most);
  }
  const int64_t mean_ps = mul_div(base_ps, shape_.num_kv_heads, model_.num_sms);
  if (mean_ps + fixed_ps > give_up_ps) return std::nullopt;

  std::optional<Split> best;
  for (const int32_t eighths : kWallEighths) {
    const Room room = room_for(mean_ps, eighths);
    bool any_cut = eighths == 0;
    for (int32_t k = 0; k < kNumTiles; ++k) any_cut |= longest[k] > room.tokens[k];
    if (!any_cut) continue;  // equal to no cut at all

    int64_t work_ps = base_ps, wall_ps = 0, parts = 0, items = 0;
    for (int32_t i = 0; i < num_shared; ++i) {
      const Packing::SharedPack& pack = packing_.shared[i];
      const PriceTable::Price& price = prices_[pack.num_rows];
      const Cut c = cut(pack.end - pack.start, room.tokens[price.tile]);
      const int64_t pack_parts = static_cast<int64_t>(pack.num_rows) * c.num_chunks;
      parts += pack_parts;
      items += static_cast<int64_t>(price.num_tiles) * c.num_chunks;
      work_ps += (c.num_chunks - 1) * price.item_ps + pack_parts * part_ps;
      wall_ps = std::max(
          wall_ps, model_.solo_item_ps[price.tile] + c.chunk * model_.solo_token_ps[price.tile]);
    }
    int64_t tail_parts = 0, tail_chunks = 0, tail_chunk = 0;
    for (int32_t row = 0; row < num_rows; ++row) {
      const int32_t start = shared ? packing_.tail_start[row] : 0;
      const Cut c = cut_tail(lens[row] - start, room.tokens[one.tile], horizon);
      tail_chunks += c.num_chunks;
      tail_parts += start == 0 && c.num_chunks == 1 ? 0 : c.num_chunks;
      tail_chunk = std::max<int64_t>(tail_chunk, c.chunk);
    }
    if (num_rows > 0) {
      parts += tail_parts;
      items += tail_chunks * one.num_tiles;
      work_ps += (tail_chunks - num_rows) * one.item_ps + tail_parts * part_ps;
      wall_ps = std::max(
          wall_ps, model_.solo_item_ps[one.tile] + tail_chunk * model_.solo_token_ps[one.tile]);
    }
    if (parts > shape_.max_parts || items > shape_.max_items) break;
    const int64_t balanced_ps = mul_div(work_ps, shape_.num_kv_heads, model_.num_sms);
    if (!best || balanced_ps + wall_ps < best->predicted_ps) {
      best = Split{balanced_ps + wall_ps, eighths, mean_ps};
    }
    if (balanced_ps + fixed_ps >= best->predicted_ps) break;
  }
  return best;
}

void Packer::apply(const SegmentTree& tree, const Split& split) {
  const int32_t num_rows = tree.num_rows(), num_shared = packing_.num_shared;
  const Room room = room_for(split.mean_ps, split.eighths);
  int32_t* chunk = packing_.chunk.fit(num_shared + num_rows);
  int32_t* num_chunks = packing_.num_chunks.fit(num_shared + num_rows);
  const auto store = [&](int32_t i, const Cut& c) {
    chunk[i] = c.chunk;
    num_chunks[i] = c.num_chunks;
  };
  for (int32_t i = 0; i < num_shared; ++i) {
    const Packing::SharedPack& pack = packing_.shared[i];
    store(i, cut(pack.end - pack.start, room.tokens[prices_[pack.num_rows].tile]));
  }
  for (int32_t row = 0; row < num_rows; ++row) {
    store(num_shared + row, cut_tail(tree.lens()[row] - packing_.tail_start[row],
                                     room.tokens[prices_[1].tile], packing_.horizon));
  }
  packing_.predicted_ps = split.predicted_ps;
}

const Packing& Packer::pack(const SegmentTree& tree) {
  const int32_t num_rows = tree.num_rows();
  prices_.reserve(std::max(num_rows, 1));
  packing_.horizon = horizon_of(tree);
  packing_.coarsened = 0;

  std::optional<Split> chosen;
  if (shape_.sharing != Sharing::kOff && tree.size() > 0) {
    link(tree);
    for (const int64_t scale : kPartScales) {
      const bool forced = shape_.sharing == Sharing::kOn && scale == 1;
      choose_costs(tree, model_.part_ps * scale * shape_.group_size, forced);
      choose_packs(tree);
      chosen = choose_split(tree, true, INT64_MAX);
      if (chosen) break;
      ++packing_.coarsened;
    }
  }
  packing_.sharing = chosen.has_value();
  if (shape_.sharing != Sharing::kOn || !chosen) {
    const auto alone = choose_split(tree, false, chosen ? chosen->predicted_ps : INT64_MAX);
    if (alone && (!chosen || alone->predicted_ps <= chosen->predicted_ps)) {
      chosen = alone;
      packing_.sharing = false;
      packing_.num_shared = 0;
      packing_.tail_start.fill(num_rows, 0);
    }
  }
  if (!chosen) {
    throw std::invalid_argument(
        std::to_string(num_rows) + " rows of " + std::to_string(shape_.group_size) +
        " query heads per KV head need at least that many work items, but the plan holds " +
        std::to_string(shape_.max_items) + ": raise max_rows");
  }
  apply(tree, *chosen);
  return packing_;
}

}  // namespace pat
