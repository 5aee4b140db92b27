// SPDX-License-Identifier: MIT
#include "splitter.h"

#include <algorithm>

namespace pat {
namespace {

constexpr int32_t kWalls[] = {0, 32, 24, 16, 12, 8, 4, 2, 1};  // 0: no cut at all
constexpr int32_t kChainRows[] = {128, 64, 16};                // query rows of a chain's items

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

}  // namespace

Splitter::Splitter(const Shape& shape, const CostModel& model, const PriceTable& prices)
    : shape_(shape), model_(model), prices_(prices) {
  // Forced sharing: an item of one row would share nothing.
  const bool forced = shape.sharing == Sharing::kOn;
  for (const int32_t query_rows : kChainRows) {
    const int32_t rows = query_rows / shape.group_size;
    if (rows > (forced ? 1 : 0)) tried_rows_[num_tries_++] = rows;
  }
  while (!forced && num_tries_ > 0 && tried_rows_[num_tries_ - 1] > 1) {
    tried_rows_[num_tries_] = tried_rows_[num_tries_ - 1] / 2;
    ++num_tries_;
  }
}

Splitter::Room Splitter::room_for(int64_t mean_ps, int32_t wall) const {
  const int64_t limit_ps = mul_div(mean_ps, wall, 16);
  Room room;
  const auto tokens_at = [&](int64_t token_ps, int64_t least) {
    return wall == 0 ? INT64_MAX : std::max(limit_ps / token_ps, least);
  };
  for (int32_t k = 0; k < kNumTiles; ++k) {
    room.tokens[k] = tokens_at(model_.solo_token_ps[k], kMinChunk);
  }
  room.tail = tokens_at(kItemWarps * model_.private_token_ps, kMinChunk);
  room.span = tokens_at(model_.private_token_ps, 0);
  return room;
}

// Whether a limit, lower than the last one that was tried, leads to the same cuts: what was beyond
// the last one is beyond this one, so only what was within may differ, and the sizes of chunks.
bool Splitter::decides_as_before(const Room& room) const {
  bool same = !is_cut_ && within_.tail <= room.tail && within_.span <= room.span;
  for (int32_t k = 0; k < kNumTiles; ++k) same &= within_.tokens[k] <= room.tokens[k];
  return same;
}

Splitter::Cut Splitter::cut(int64_t tokens, int32_t tile, const Room& limits) {
  const int64_t room = limits.tokens[tile];
  if (tokens <= room) {
    within_.tokens[tile] = std::max(within_.tokens[tile], tokens);
    return {static_cast<int32_t>(tokens), 1};
  }
  is_cut_ = true;
  const auto total = static_cast<uint32_t>(tokens);
  const uint32_t count = ceil_div(total, static_cast<uint32_t>(room));
  const uint32_t chunk = (ceil_div(total, count) + kChunkAlign - 1) / kChunkAlign * kChunkAlign;
  return {static_cast<int32_t>(chunk), static_cast<int32_t>(ceil_div(total, chunk))};
}

// A tail that is cut has chunks for the horizon as well, empty at first, unless the last one grows by a
// quarter at most: see _empty_chunks in Python.
Splitter::Cut Splitter::cut_tail(int64_t tokens, const Room& room, int32_t horizon) {
  Cut result = cut(tokens, prices_[1].tile, room);
  if (result.num_chunks > 1) {
    const int64_t beyond =
        tokens + horizon - static_cast<int64_t>(result.num_chunks) * result.chunk;
    if (4 * beyond > result.chunk) {
      result.num_empty = static_cast<int32_t>(
          ceil_div(static_cast<uint32_t>(beyond), static_cast<uint32_t>(result.chunk)));
    }
  }
  return result;
}

// Of the rows an item whose steps are within the limit, those of least work; none is: the fewest.
Splitter::ChainCut Splitter::cut_chain(const Packing& packing, const SharedPack& pack,
                                       const Room& room) {
  const Chain& chain = packing.chains[pack.chain];
  const Piece* pieces = packing.pieces.data() + chain.first_piece;
  int32_t num_separated = 0;
  int64_t longest_tail = chain.longest_tail;  // of those that are not separated
  if (chain.longest_tail > room.tail) {
    longest_tail = 0;
    for (int32_t i = 0; i < chain.num_pieces; ++i) {
      const bool is_separated = pieces[i].is_separated(room.tail);
      num_separated += is_separated;
      if (pieces[i].segment < 0 && !is_separated) {
        longest_tail = std::max<int64_t>(longest_tail, pieces[i].tokens);
      }
    }
  }
  within_.tail = std::max(within_.tail, longest_tail);
  if (num_separated == chain.num_pieces) return {};
  Tried& tried = tried_[pack.chain];
  RowLoad* row_loads = row_loads_.data() + chain.first_piece + pack.chain;
  if (tried.num_separated != num_separated) {
    tried.num_separated = num_separated;
    tried.known = 0;
    sum_pieces(pieces, chain.num_pieces, room.tail, pack.num_rows, row_loads);
  }
  const RowLoad& unique = row_loads[pack.num_rows];  // every piece counted once

  // Of several numbers that make a single item the last gives the same as the first.
  int32_t i = 0;
  while (i + 1 < num_tries_ && tried_rows_[i + 1] >= pack.num_rows) ++i;
  ChainCut best{};
  for (; i < num_tries_; ++i) {
    ChainCut c = without_steps(pack, room, tried_rows_[i], num_separated);
    c.work_ps += unique.begun_tokens * model_.token_ps[0] + unique.begun_steps * model_.step_ps;
    // Pieces that are in several fragments only add to the work.
    if (best.rows_per_item > 0 && c.work_ps >= best.work_ps) continue;
    if ((tried.known >> i & 1) == 0) {
      const FragmentGrid grid(shape_.group_size, pack.num_rows, tried_rows_[i]);
      tried.loads[i] = grid.load(row_loads);
      tried.known |= 1u << i;
    }
    const FragmentLoad& load = tried.loads[i];
    const bool is_last_resort = best.rows_per_item == 0 && i + 1 == num_tries_;
    if (load.span <= room.span) {
      within_.span = std::max(within_.span, load.span);
    } else if (!is_last_resort) {
      continue;
    }
    c.num_steps = load.steps;
    c.work_ps += (load.tokens - unique.begun_tokens) * model_.reread_ps[0] +
                 (load.steps - unique.begun_steps) * model_.step_ps;
    c.solo_ps += load.span * model_.private_token_ps;
    if (best.rows_per_item == 0 || c.work_ps < best.work_ps) best = c;
  }
  return best;
}

// A chain whose work items have `rows_per_item` rows, as if there were nothing below its run.
Splitter::ChainCut Splitter::without_steps(const SharedPack& pack, const Room& room,
                                           int32_t rows_per_item, int32_t num_separated) {
  const int64_t query_rows =
      static_cast<int64_t>(std::min(rows_per_item, pack.num_rows)) * shape_.group_size;
  const int32_t tile = PriceTable::tile_for(query_rows);
  ChainCut c{.run = cut(pack.end - pack.start, tile, room),
             .rows_per_item = rows_per_item,
             .tile = tile,
             .num_items = (pack.num_rows + rows_per_item - 1) / rows_per_item};
  const int64_t num_plain = c.run.num_chunks - 1;
  const int64_t plain_tokens = num_plain * c.run.chunk;
  const int64_t tokens = pack.end - pack.start - plain_tokens;
  const PriceTable::Price& price = prices_[pack.num_rows];
  c.parts = num_plain > 0 || pack.start > 0 ? pack.num_rows : num_separated;
  c.work_ps = num_plain * price.item_ps + plain_tokens * price.token_ps +
              c.num_items * model_.item_ps[tile] +
              tokens * (model_.token_ps[tile] + (c.num_items - 1) * model_.reread_ps[tile]) +
              (num_plain * pack.num_rows + c.parts) * model_.part_ps * shape_.group_size;
  c.solo_ps = model_.solo_item_ps[tile] + tokens * model_.solo_token_ps[tile];
  return c;
}

// The chunks of a plain pack, the last taken for as long as the others. Returns their SM time.
int64_t Splitter::add_chunks(int32_t num_rows, const Cut& cut, int64_t tokens, bool has_parts,
                             Sums& sums) {
  const PriceTable::Price& price = prices_[num_rows];
  int64_t sum_ps = 0;
  for (int32_t i = 0; i < price.num_groups; ++i) {
    const PriceTable::Group& group = price.groups[i];
    const int64_t chunk_ps = group.item_ps + (has_parts ? group.parts_ps : 0);
    const int64_t empty_ps = cut.num_empty * chunk_ps;
    const int64_t work_ps = cut.num_chunks * chunk_ps + tokens * group.token_ps;
    const int64_t solo_ps = model_.solo_item_ps[group.tile];
    if (cut.num_empty > 0) {
      schedule_.add(group.tile, static_cast<int64_t>(cut.num_empty) * group.num_tiles, solo_ps,
                    empty_ps);
    }
    schedule_.add(group.tile, static_cast<int64_t>(cut.num_chunks) * group.num_tiles,
                  solo_ps + cut.chunk * model_.solo_token_ps[group.tile], work_ps);
    sum_ps += work_ps + empty_ps;
  }
  const int64_t chunks = static_cast<int64_t>(cut.num_chunks) + cut.num_empty;
  sums.work_ps += sum_ps;
  sums.items += chunks * price.num_tiles;
  sums.parts += has_parts ? chunks * num_rows : 0;
  return sum_ps;
}

// Lists the tails outside of chains, and those in chains, which a limit may separate. Returns the
// SM time of the former if none is cut and partials are free.
int64_t Splitter::list_tails(const SegmentTree& tree, const Packing& packing, bool shared) {
  const int32_t num_rows = tree.num_rows();
  const bool any_chain = shared && packing.num_chains > 0;
  Tail* tails = tails_.fit(num_rows);
  Tail* chain_tails = chain_tails_.fit(any_chain ? num_rows : 0);
  num_tails_ = num_chain_tails_ = 0;
  longest_tail_ = longest_chain_tail_ = 0;
  int64_t num_tokens = 0;
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t start = shared ? packing.tail_start[row] : 0;
    const int32_t tokens = tree.lens()[row] - start;
    if (any_chain && packing.in_chain[row]) {
      chain_tails[num_chain_tails_++] = {tokens, start > 0};
      longest_chain_tail_ = std::max<int64_t>(longest_chain_tail_, tokens);
    } else {
      tails[num_tails_++] = {tokens, start > 0};
      longest_tail_ = std::max<int64_t>(longest_tail_, tokens);
      num_tokens += tokens;
    }
  }
  return num_tails_ * prices_[1].item_ps + num_tokens * prices_[1].token_ps;
}

void Splitter::add_tail(const Tail& tail, const Room& room, int32_t horizon, Sums& sums) {
  const Cut c = cut_tail(tail.tokens, room, horizon);
  add_chunks(1, c, tail.tokens, tail.has_parts || c.num_chunks > 1, sums);
}

// What the tails outside of chains take when none is cut: the same for most limits.
void Splitter::sum_whole_tails() {
  schedule_.clear();
  whole_sums_ = {};
  for (int32_t i = 0; i < num_tails_; ++i) {
    const Tail& tail = tails_[i];
    add_chunks(1, {tail.tokens, 1}, tail.tokens, tail.has_parts, whole_sums_);
  }
  whole_tails_.reset_to(schedule_);
}

// Begins the sums and the schedule of a limit with all packs of one row.
Splitter::Sums Splitter::add_tails(const Room& room, int32_t horizon) {
  Sums sums;
  const int32_t tile = prices_[1].tile;
  if (longest_tail_ <= room.tokens[tile]) {
    within_.tokens[tile] = longest_tail_;
    schedule_.reset_to(whole_tails_);
    sums = whole_sums_;
  } else {
    schedule_.clear();
    for (int32_t i = 0; i < num_tails_; ++i) add_tail(tails_[i], room, horizon, sums);
  }
  if (longest_chain_tail_ > room.tail) {
    for (int32_t i = 0; i < num_chain_tails_; ++i) {
      const Tail& tail = chain_tails_[i];
      if (tail.tokens > room.tail) add_tail(tail, room, horizon, sums);
    }
  }
  return sums;
}

// false: the pack is no chain under this limit.
bool Splitter::add_chain(const Packing& packing, const SharedPack& pack, const Room& room,
                         Sums& sums) {
  const ChainCut c = cut_chain(packing, pack, room);
  if (c.rows_per_item == 0) return false;
  int64_t items_ps = c.work_ps;
  if (c.run.num_chunks > 1) {
    const Cut plain{c.run.chunk, c.run.num_chunks - 1};
    const int64_t tokens = static_cast<int64_t>(plain.num_chunks) * plain.chunk;
    items_ps -= add_chunks(pack.num_rows, plain, tokens, true, sums);
  }
  schedule_.add(c.tile, c.num_items, c.solo_ps, items_ps);
  sums.work_ps += items_ps;
  sums.items += c.num_items;
  sums.parts += c.parts;
  return true;
}

// As limits fall, work, partials and items of plain packs and tails never fall, so the search ends
// early, also at the plan to beat, without changing what Python finds; those of chains may fall,
// when a tail is separated.
std::optional<Split> Splitter::choose(const SegmentTree& tree, const Packing& packing, bool shared,
                                      int64_t give_up_ps) {
  const int32_t num_shared = shared ? packing.num_shared : 0;
  const int32_t num_chains = shared ? packing.num_chains : 0;
  if (num_chains > 0) {
    const Chain& last = packing.chains[num_chains - 1];
    tried_.fit(num_chains);
    row_loads_.fit(last.first_piece + last.num_pieces +
                   num_chains);  // a piece or more for each row
  }

  // SM time if nothing is cut and partials are free.
  int64_t uncut_ps = list_tails(tree, packing, shared);
  for (int32_t i = 0; i < num_shared; ++i) {
    const SharedPack& pack = packing.shared[i];
    const PriceTable::Price& price = prices_[pack.num_rows];
    uncut_ps += price.item_ps + static_cast<int64_t>(pack.end - pack.start) * price.token_ps;
    if (pack.chain >= 0) {
      uncut_ps += packing.chains[pack.chain].below_ps;
      tried_[pack.chain].num_separated = -1;
    }
  }
  const int64_t mean_ps = mul_div(uncut_ps, shape_.num_kv_heads, model_.num_sms);
  if (num_chains == 0 && mean_ps > give_up_ps) return std::nullopt;

  sum_whole_tails();
  std::optional<Split> best;
  for (const int32_t wall : kWalls) {
    const Room room = room_for(mean_ps, wall);
    if (wall != 0 && decides_as_before(room)) continue;

    within_ = {};
    is_cut_ = false;
    Sums sums = add_tails(room, packing.horizon);
    for (int32_t i = 0; i < num_shared; ++i) {
      const SharedPack& pack = packing.shared[i];
      if (pack.chain >= 0 && add_chain(packing, pack, room, sums)) continue;
      const int64_t tokens = pack.end - pack.start;
      const Cut c = cut(tokens, prices_[pack.num_rows].tile, room);
      add_chunks(pack.num_rows, c, tokens, true, sums);
    }
    if (sums.parts > shape_.max_parts || sums.items > shape_.max_items) {
      if (num_chains > 0) continue;
      break;
    }
    const int64_t predicted_ps = schedule_.predict(shape_.num_kv_heads, model_.num_sms) +
                                 (sums.parts > 0 ? model_.merge_ps : 0);
    if (!best || predicted_ps < best->predicted_ps) best = Split{predicted_ps, wall, mean_ps};
    const int64_t balanced_ps = mul_div(sums.work_ps, shape_.num_kv_heads, model_.num_sms);
    if (num_chains == 0 && (balanced_ps >= best->predicted_ps || balanced_ps > give_up_ps)) break;
  }
  return best;
}

void Splitter::apply(const SegmentTree& tree, const Split& split, Packing& packing) {
  const int32_t num_rows = tree.num_rows(), num_shared = packing.num_shared;
  const Room room = room_for(split.mean_ps, split.wall);
  int32_t* chunk = packing.chunk.fit(num_shared + num_rows);
  int32_t* num_chunks = packing.num_chunks.fit(num_shared + num_rows);
  const auto store = [&](int32_t i, const Cut& c) {
    chunk[i] = c.chunk;
    num_chunks[i] = c.num_chunks + c.num_empty;
  };
  for (int32_t i = 0; i < num_shared; ++i) {
    SharedPack& pack = packing.shared[i];
    Cut run = cut(pack.end - pack.start, prices_[pack.num_rows].tile, room);
    if (pack.chain >= 0) {
      const ChainCut c = cut_chain(packing, pack, room);
      if (c.rows_per_item > 0) {
        run = c.run;
        packing.chains[pack.chain].rows_per_item = c.rows_per_item;
        packing.chains[pack.chain].num_steps = c.num_steps;
      } else {
        pack.chain = -1;
      }
    }
    store(i, run);
  }
  packing.tail_room = room.tail;
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t tokens = tree.lens()[row] - packing.tail_start[row];
    const bool has_pack = !packing.in_chain[row] || tokens > packing.tail_room;
    store(num_shared + row, has_pack ? cut_tail(tokens, room, packing.horizon) : Cut{0, 0});
  }
  packing.predicted_ps = split.predicted_ps;
}

}  // namespace pat
