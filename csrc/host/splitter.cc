// SPDX-License-Identifier: MIT
#include "splitter.h"

#include <algorithm>

namespace pat {
namespace {

constexpr int32_t kWallEighths[] = {0, 16, 8, 4, 2, 1};  // 0: no cut at all
constexpr int32_t kChainRows[] = {128, 64, 16};          // query rows of a chain's items

// a * b / c of non-negative values; the product of a step's picoseconds and the KV heads may pass
// 64 bits for lengths near 2^31.
int64_t mul_div(int64_t a, int64_t b, int64_t c) {
  int64_t product;
  if (!__builtin_mul_overflow(a, b, &product)) return product / c;
  return static_cast<int64_t>(static_cast<__int128>(a) * b / c);
}

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

Splitter::Room Splitter::room_for(int64_t mean_ps, int32_t eighths) const {
  const int64_t limit_ps = mul_div(mean_ps, eighths, 8);
  Room room;
  for (int32_t k = 0; k < kNumTiles; ++k) {
    const int64_t tokens = limit_ps / model_.solo_token_ps[k];
    room.tokens[k] = eighths == 0 ? INT64_MAX : std::max<int64_t>(tokens, kMinChunk);
  }
  room.steps = eighths == 0 ? INT64_MAX : limit_ps / model_.solo_token_ps[0];
  return room;
}

Splitter::Cut Splitter::cut(int64_t tokens, int64_t room) {
  if (tokens <= room) return {static_cast<int32_t>(tokens), 1};
  const auto total = static_cast<uint32_t>(tokens);
  const uint32_t count = ceil_div(total, static_cast<uint32_t>(room));
  const uint32_t chunk = (ceil_div(total, count) + kChunkAlign - 1) / kChunkAlign * kChunkAlign;
  return {static_cast<int32_t>(chunk), static_cast<int32_t>(ceil_div(total, chunk))};
}

// A tail that is cut has chunks for the horizon as well, empty at first.
Splitter::Cut Splitter::cut_tail(int64_t tokens, int64_t room, int32_t horizon) {
  Cut result = cut(tokens, room);
  if (result.num_chunks > 1) {
    result.num_chunks = static_cast<int32_t>(
        ceil_div(static_cast<uint32_t>(tokens + horizon), static_cast<uint32_t>(result.chunk)));
  }
  return result;
}

// Of the rows an item whose steps are within the limit, those of least work; none is: the fewest.
Splitter::ChainCut Splitter::cut_chain(const Packing& packing, const SharedPack& pack,
                                       const Room& room) {
  const Chain& chain = packing.chains[pack.chain];
  const Piece* pieces = packing.pieces.data() + chain.first_piece;
  const int64_t tail_room = room.tokens[0];
  int32_t num_separated = 0;
  if (chain.longest_tail > tail_room) {
    for (int32_t i = 0; i < chain.num_pieces; ++i) {
      num_separated += pieces[i].is_separated(tail_room);
    }
  }
  if (num_separated == chain.num_pieces) return {};
  Tried& tried = tried_[pack.chain];
  RowLoad* row_loads = row_loads_.data() + chain.first_piece + pack.chain;
  if (tried.num_separated != num_separated) {
    tried.num_separated = num_separated;
    tried.known = 0;
    sum_pieces(pieces, chain.num_pieces, tail_room, pack.num_rows, row_loads);
  }
  const RowLoad& unique = row_loads[pack.num_rows];  // every piece counted once

  // Of several numbers that make a single item the last gives the same as the first.
  int32_t i = 0;
  while (i + 1 < num_tries_ && tried_rows_[i + 1] >= pack.num_rows) ++i;
  ChainCut best{};
  for (; i < num_tries_; ++i) {
    ChainCut c = without_steps(pack, room, tried_rows_[i], num_separated);
    c.sums.work_ps +=
        unique.begun_tokens * model_.token_ps[0] + unique.begun_steps * model_.step_ps;
    // Pieces that are in several fragments only add to the work.
    if (best.rows_per_item > 0 && c.sums.work_ps >= best.sums.work_ps) continue;
    if ((tried.known >> i & 1) == 0) {
      const FragmentGrid grid(shape_.group_size, pack.num_rows, tried_rows_[i]);
      tried.loads[i] = grid.load(row_loads);
      tried.known |= 1u << i;
    }
    const FragmentLoad& load = tried.loads[i];
    const bool is_last_resort = best.rows_per_item == 0 && i + 1 == num_tries_;
    if (load.longest_warp > room.steps && !is_last_resort) continue;
    c.num_steps = load.steps;
    c.sums.work_ps += (load.tokens - unique.begun_tokens) * model_.reread_ps[0] +
                      (load.steps - unique.begun_steps) * model_.step_ps;
    c.solo_ps += load.longest_warp * model_.solo_token_ps[0];
    if (best.rows_per_item == 0 || c.sums.work_ps < best.sums.work_ps) best = c;
  }
  return best;
}

// A chain whose work items have `rows_per_item` rows, as if there were nothing below its run.
Splitter::ChainCut Splitter::without_steps(const SharedPack& pack, const Room& room,
                                           int32_t rows_per_item, int32_t num_separated) const {
  const int64_t query_rows =
      static_cast<int64_t>(std::min(rows_per_item, pack.num_rows)) * shape_.group_size;
  const int32_t tile = PriceTable::tile_for(query_rows);
  ChainCut c{.run = cut(pack.end - pack.start, room.tokens[tile]), .rows_per_item = rows_per_item};
  const int64_t num_plain = c.run.num_chunks - 1;
  const int64_t plain_tokens = num_plain * c.run.chunk;
  const int64_t tokens = pack.end - pack.start - plain_tokens;
  const int64_t num_items = (pack.num_rows + rows_per_item - 1) / rows_per_item;
  if (num_plain > 0) {
    const PriceTable::Price& price = prices_[pack.num_rows];
    c.sums.items = num_plain * price.num_tiles;
    c.sums.work_ps = num_plain * price.item_ps + plain_tokens * price.token_ps;
    c.sums.wall_ps =
        model_.solo_item_ps[price.tile] + c.run.chunk * model_.solo_token_ps[price.tile];
  }
  const bool has_parts = num_plain > 0 || pack.start > 0;
  c.sums.parts = num_plain * pack.num_rows + (has_parts ? pack.num_rows : num_separated);
  c.sums.items += num_items;
  c.sums.work_ps += num_items * model_.item_ps[tile] +
                    tokens * (model_.token_ps[tile] + (num_items - 1) * model_.reread_ps[tile]) +
                    c.sums.parts * model_.part_ps * shape_.group_size;
  c.solo_ps = model_.solo_item_ps[tile] + tokens * model_.solo_token_ps[tile];
  return c;
}

// false: the pack is no chain under this limit.
bool Splitter::add_chain(const Packing& packing, const SharedPack& pack, const Room& room,
                         Sums& sums) {
  const ChainCut c = cut_chain(packing, pack, room);
  if (c.rows_per_item == 0) return false;
  sums.parts += c.sums.parts;
  sums.items += c.sums.items;
  sums.work_ps += c.sums.work_ps;
  sums.wall_ps = std::max({sums.wall_ps, c.sums.wall_ps, c.solo_ps});
  return true;
}

// As limits fall, work, partials and items of plain packs and tails never fall, so the search ends
// early without changing what Python finds; those of chains may fall, when a tail is separated.
std::optional<Split> Splitter::choose(const SegmentTree& tree, const Packing& packing, bool shared,
                                      int64_t give_up_ps) {
  const int32_t num_rows = tree.num_rows(), num_shared = shared ? packing.num_shared : 0;
  const int32_t num_chains = shared ? packing.num_chains : 0;
  const int32_t* lens = tree.lens();
  const PriceTable::Price one = prices_[1];
  const int64_t part_ps = model_.part_ps * shape_.group_size;
  const auto tail_start = [&](int32_t row) { return shared ? packing.tail_start[row] : 0; };
  const auto in_chain = [&](int32_t row) { return num_chains > 0 && packing.in_chain[row]; };

  if (num_chains > 0) {
    const Chain& last = packing.chains[num_chains - 1];
    tried_.fit(num_chains);
    row_loads_.fit(last.first_piece + last.num_pieces +
                   num_chains);  // a piece or more for each row
  }

  // Plain packs uncut; all that chains cost depends on the limit, but they have a part in the mean.
  int64_t packs_ps = 0, chains_ps = 0, fixed_ps = 0, longest[kNumTiles] = {};
  for (int32_t i = 0; i < num_shared; ++i) {
    const SharedPack& pack = packing.shared[i];
    const PriceTable::Price& price = prices_[pack.num_rows];
    const int64_t tokens = pack.end - pack.start;
    const int64_t pack_ps = price.item_ps + tokens * price.token_ps;
    if (pack.chain >= 0) {
      chains_ps += pack_ps + packing.chains[pack.chain].below_ps;
      tried_[pack.chain].num_separated = -1;
      continue;
    }
    packs_ps += pack_ps;
    fixed_ps = std::max(fixed_ps, model_.solo_item_ps[price.tile]);
    longest[price.tile] = std::max(longest[price.tile], tokens);
  }
  int64_t num_tails = 0, num_tail_tokens = 0, longest_tail = 0;
  for (int32_t row = 0; row < num_rows; ++row) {
    if (in_chain(row)) continue;
    const int64_t tokens = lens[row] - tail_start(row);
    ++num_tails;
    num_tail_tokens += tokens;
    longest_tail = std::max(longest_tail, tokens);
  }
  if (num_tails > 0) {
    fixed_ps = std::max(fixed_ps, model_.solo_item_ps[one.tile]);
    longest[one.tile] = std::max(longest[one.tile], longest_tail);
  }
  const int64_t uncut_ps =
      packs_ps + chains_ps + num_tails * one.item_ps + num_tail_tokens * one.token_ps;
  const int64_t mean_ps = mul_div(uncut_ps, shape_.num_kv_heads, model_.num_sms);
  if (mean_ps + fixed_ps > give_up_ps) return std::nullopt;

  std::optional<Split> best;
  for (const int32_t eighths : kWallEighths) {
    const Room room = room_for(mean_ps, eighths);
    bool any_cut = eighths == 0 || num_chains > 0;
    for (int32_t k = 0; k < kNumTiles; ++k) any_cut |= longest[k] > room.tokens[k];
    if (!any_cut) continue;  // equal to no cut at all

    Sums sums{packs_ps, 0, 0, 0};
    for (int32_t i = 0; i < num_shared; ++i) {
      const SharedPack& pack = packing.shared[i];
      const PriceTable::Price& price = prices_[pack.num_rows];
      const int64_t tokens = pack.end - pack.start;
      if (pack.chain >= 0) {
        if (add_chain(packing, pack, room, sums)) continue;
        sums.work_ps += price.item_ps + tokens * price.token_ps;
      }
      const Cut c = cut(tokens, room.tokens[price.tile]);
      const int64_t parts = static_cast<int64_t>(pack.num_rows) * c.num_chunks;
      sums.parts += parts;
      sums.items += static_cast<int64_t>(price.num_tiles) * c.num_chunks;
      sums.work_ps += (c.num_chunks - 1) * price.item_ps + parts * part_ps;
      sums.wall_ps = std::max(sums.wall_ps, model_.solo_item_ps[price.tile] +
                                                c.chunk * model_.solo_token_ps[price.tile]);
    }
    int64_t tail_tokens = num_tail_tokens, tail_parts = 0, tail_chunks = 0, tail_chunk = 0;
    for (int32_t row = 0; row < num_rows; ++row) {
      const int32_t start = tail_start(row), tokens = lens[row] - start;
      if (in_chain(row)) {
        if (tokens <= room.tokens[0]) continue;
        tail_tokens += tokens;
      }
      const Cut c = cut_tail(tokens, room.tokens[one.tile], packing.horizon);
      tail_chunks += c.num_chunks;
      tail_parts += start == 0 && c.num_chunks == 1 ? 0 : c.num_chunks;
      tail_chunk = std::max<int64_t>(tail_chunk, c.chunk);
    }
    if (tail_chunks > 0) {
      sums.parts += tail_parts;
      sums.items += tail_chunks * one.num_tiles;
      sums.work_ps += tail_chunks * one.item_ps + tail_tokens * one.token_ps + tail_parts * part_ps;
      sums.wall_ps = std::max(sums.wall_ps, model_.solo_item_ps[one.tile] +
                                                tail_chunk * model_.solo_token_ps[one.tile]);
    }
    if (sums.parts > shape_.max_parts || sums.items > shape_.max_items) {
      if (num_chains > 0) continue;
      break;
    }
    const int64_t balanced_ps = mul_div(sums.work_ps, shape_.num_kv_heads, model_.num_sms);
    if (!best || balanced_ps + sums.wall_ps < best->predicted_ps) {
      best = Split{balanced_ps + sums.wall_ps, eighths, mean_ps};
    }
    if (num_chains == 0 && balanced_ps + fixed_ps >= best->predicted_ps) break;
  }
  return best;
}

void Splitter::apply(const SegmentTree& tree, const Split& split, Packing& packing) {
  const int32_t num_rows = tree.num_rows(), num_shared = packing.num_shared;
  const Room room = room_for(split.mean_ps, split.eighths);
  int32_t* chunk = packing.chunk.fit(num_shared + num_rows);
  int32_t* num_chunks = packing.num_chunks.fit(num_shared + num_rows);
  const auto store = [&](int32_t i, const Cut& c) {
    chunk[i] = c.chunk;
    num_chunks[i] = c.num_chunks;
  };
  for (int32_t i = 0; i < num_shared; ++i) {
    SharedPack& pack = packing.shared[i];
    Cut run = cut(pack.end - pack.start, room.tokens[prices_[pack.num_rows].tile]);
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
  packing.tail_room = room.tokens[0];
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t tokens = tree.lens()[row] - packing.tail_start[row];
    const bool has_pack = !packing.in_chain[row] || tokens > packing.tail_room;
    store(num_shared + row,
          has_pack ? cut_tail(tokens, room.tokens[prices_[1].tile], packing.horizon) : Cut{0, 0});
  }
  packing.predicted_ps = split.predicted_ps;
}

}  // namespace pat
