// SPDX-License-Identifier: MIT
#include "item_writer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace pat {
namespace {

// Sort key of an item: by tile, heaviest first, then as created.
constexpr int kWeightShift = 31, kTileShift = 62;
constexpr int64_t kWeightMax = INT32_MAX;
uint64_t item_key(int32_t tile, int64_t weight, int32_t created) {
  const int64_t lightness = kWeightMax - std::min(weight, kWeightMax);
  return static_cast<uint64_t>(tile) << kTileShift |
         static_cast<uint64_t>(lightness) << kWeightShift | static_cast<uint64_t>(created);
}
uint64_t lightness_of(uint64_t key) { return key >> kWeightShift & kWeightMax; }
int32_t created_of(uint64_t key) { return static_cast<int32_t>(key & INT32_MAX); }

constexpr int kMaxDigitBits = 8;

}  // namespace

void ItemWriter::write(const ItemJob& job) {
  items_.fit(job.num_items);
  keys_.fit(job.num_items);
  std::fill_n(tile_count_, kNumTiles, 0);
  planned_tokens_ = 0;
  num_items_ = num_entries_ = num_fragments_ = num_steps_ = num_chain_items_ = 0;

  const Packing& packing = job.packing;
  for (int32_t i = 0; i < packing.num_shared; ++i) {
    const SharedPack& pack = packing.shared[i];
    const Chain* chain = pack.chain >= 0 ? &packing.chains[pack.chain] : nullptr;
    add_pack(
        job,
        {pack.start, pack.end, packing.chunk[i], packing.num_chunks[i], pack.segment, chain, false},
        packing.rows.data() + pack.first_row, pack.num_rows);
  }
  const bool is_one_item = job.prices[1].num_tiles == 1;
  for (int32_t row = 0; row < job.tree.num_rows(); ++row) {
    const int32_t i = packing.num_shared + row;
    if (packing.num_chunks[i] == 1 && is_one_item) {
      add_whole_tail(job, row);
      continue;
    }
    add_pack(job,
             {packing.tail_start[row], job.tree.lens()[row], packing.chunk[i],
              packing.num_chunks[i], job.tree.home(row), nullptr, true},
             &row, 1);
  }

  sort(num_items_);
  for (int32_t i = 0; i < num_items_; ++i) {
    const Item& item = items_[created_of(keys_[i])];
    std::memcpy(job.items + static_cast<int64_t>(kItemWords) * i, item.words, sizeof(item.words));
  }
}

// Word by word from registers: a copy of an item that was just put together would wait for its
// words to reach memory.
inline void ItemWriter::add_item(int32_t created, int32_t tile, int64_t weight,
                                 const ItemRows& rows, const ItemRun& run) {
  int32_t* words = items_[created].words;
  words[kItemFirstEntry] = rows.first_entry;
  words[kItemHeadOffset] = rows.head_offset;
  words[kItemQueryRows] = rows.query_rows;
  words[kItemFirstSlot] = run.first_slot;
  words[kItemFirstLength] = run.first_length;
  words[kItemNextRun] = run.next_run;
  words[kItemBeyond] = run.beyond;
  words[kItemTailPosition] = run.tail_position;
  words[kItemFirstFragment] = rows.first_fragment;
  words[kItemTailRow] = run.tail_row;
  std::fill(words + kItemTailRow + 1, words + kItemWords, 0);
  keys_[created] = item_key(tile, weight, created);
  ++tile_count_[tile];
}

void ItemWriter::add_pack(const ItemJob& job, const Range& range, const int32_t* rows,
                          int32_t num_rows) {
  const SegmentTree& tree = job.tree;
  const PriceTable::Price& price = job.prices[num_rows];
  const int64_t covered_end = range.is_tail ? range.end + job.packing.horizon : range.end;
  const int32_t num_plain = range.num_chunks - (range.chain != nullptr);
  const int32_t first_item = num_items_, first_of_pack = num_entries_;
  num_items_ += price.num_tiles * num_plain;
  num_entries_ += num_rows * range.num_chunks;
  const int32_t full_rows = kTiles[kNumTiles - 1].rows / group_size_;
  const int32_t full_heads = kTiles[kNumTiles - 1].rows % group_size_;
  int32_t u = range.segment;
  // From the last chunk to the first: the run a chunk starts to read then only moves upwards.
  for (int32_t c = range.num_chunks - 1; c >= 0; --c) {
    const int64_t a = range.start + static_cast<int64_t>(c) * range.chunk;
    const int64_t b = c == range.num_chunks - 1 ? covered_end : a + range.chunk;
    const int32_t first_entry = first_of_pack + c * num_rows;
    for (int32_t r = 0; r < num_rows; ++r) {
      int32_t* entry = job.entries + static_cast<int64_t>(kEntryWords) * (first_entry + r);
      const int32_t part = job.next_part[rows[r]];
      entry[kEntryRow] = rows[r];
      entry[kEntryPart] = part < 0 ? -1 : part + c;
    }

    int32_t begin, above, slot, tail_position = -1, tail_row = -1;
    if (range.is_tail && b > tree.tail_begin(rows[0])) {
      begin = tree.tail_begin(rows[0]);
      above = tree.home(rows[0]);
      slot = job.tail_slot[rows[0]];
      tail_position = static_cast<int32_t>(std::max<int64_t>(a, begin));
      tail_row = rows[0];
    } else {
      while (tree[u].begin >= b) u = tree[u].parent;
      begin = tree[u].begin;
      above = tree[u].parent;
      slot = job.segment_slot[u];
    }
    const int64_t first = std::max<int64_t>(a, begin);
    const int64_t beyond = std::max<int64_t>(begin - a, 0);
    const int64_t planned = std::max<int64_t>(std::min(b, range.end) - a, 0);
    const int64_t query_rows = static_cast<int64_t>(num_rows) * group_size_;
    const ItemRun run{.first_slot = static_cast<int32_t>(slot + first - begin),
                      .first_length = static_cast<int32_t>(b - first),
                      .next_run = beyond > 0 ? above : -1,
                      .beyond = static_cast<int32_t>(beyond),
                      .tail_position = tail_position,
                      .tail_row = tail_row};
    if (c == num_plain) {
      add_chain(job, *range.chain, rows, num_rows, first_entry, run, planned);
      continue;
    }
    int64_t left = query_rows;
    int32_t first_row = 0, head_offset = 0;  // of the query rows that are left
    for (int32_t t = 0; t < price.num_tiles; ++t) {
      const int32_t tile =
          left >= kTiles[kNumTiles - 1].rows ? kNumTiles - 1 : PriceTable::tile_for(left);
      const auto count = static_cast<int32_t>(std::min<int64_t>(kTiles[tile].rows, left));
      add_item(first_item + c * price.num_tiles + t, tile, planned,
               {first_entry + first_row, head_offset, count, -1}, run);
      planned_tokens_ += planned;
      // All work items of a pack but the last have the largest tile.
      left -= count;
      first_row += full_rows;
      head_offset += full_heads - group_size_;
      if (head_offset < 0) {
        head_offset += group_size_;
      } else {
        ++first_row;
      }
    }
  }
  for (int32_t r = 0; r < num_rows; ++r) {
    int32_t& part = job.next_part[rows[r]];
    if (part >= 0) part += range.num_chunks;
  }
}

// A tail of one chunk and one work item, as add_pack writes it: what most rows have.
void ItemWriter::add_whole_tail(const ItemJob& job, int32_t row) {
  const SegmentTree& tree = job.tree;
  const int32_t begin = tree.tail_begin(row), end = tree.lens()[row];
  const int32_t start = job.packing.tail_start[row];
  const int32_t first = std::max(start, begin), beyond = std::max(begin - start, 0);
  int32_t* entry = job.entries + static_cast<int64_t>(kEntryWords) * num_entries_;
  entry[kEntryRow] = row;
  entry[kEntryPart] = job.next_part[row];
  add_item(num_items_++, PriceTable::tile_for(group_size_), end - start,
           {num_entries_++, 0, group_size_, -1},
           {.first_slot = job.tail_slot[row] + first - begin,
            .first_length = end + job.packing.horizon - first,
            .next_run = beyond > 0 ? tree.home(row) : -1,
            .beyond = beyond,
            .tail_position = first,
            .tail_row = row});
  planned_tokens_ += end - start;
}

// The work items of a chain, which share `run`.
void ItemWriter::add_chain(const ItemJob& job, const Chain& chain, const int32_t* rows,
                           int32_t num_rows, int32_t first_entry, ItemRun run, int64_t planned) {
  const Piece* pieces = job.packing.pieces.data() + chain.first_piece;
  const int64_t tail_room = job.packing.tail_room;
  const FragmentGrid grid(group_size_, num_rows, chain.rows_per_item);
  RowLoad* row_loads = row_loads_.fit(num_rows + 1);
  sum_pieces(pieces, chain.num_pieces, tail_room, num_rows, row_loads);
  int32_t* next_step = next_step_.fit(grid.num_fragments());
  int32_t* fragments = job.fragments + static_cast<int64_t>(kFragmentWords) * num_fragments_;
  for (int32_t i = 0; i < grid.num_items(); ++i) {
    const FragmentLoad load = grid.load_of(row_loads, i, [&](int32_t f, int32_t steps) {
      fragments[kFragmentWords * f + kFragmentFirstStep] = next_step[f] = num_steps_;
      fragments[kFragmentWords * f + kFragmentNumSteps] = steps;
      num_steps_ += steps;
    });
    const int32_t query_rows = grid.rows_of(i) * group_size_;
    add_item(
        num_items_++, PriceTable::tile_for(query_rows), planned + load.span,
        {first_entry + grid.first_row(i), 0, query_rows, num_fragments_ + grid.first_fragment(i)},
        run);
    planned_tokens_ += planned + load.tokens;
  }
  num_chain_items_ += grid.num_items();
  num_fragments_ += grid.num_fragments();

  for (int32_t i = 0; i < chain.num_pieces; ++i) {
    const Piece& piece = pieces[i];
    if (piece.is_separated(tail_room)) continue;
    const int32_t row = rows[piece.first_row];
    const bool is_tail = piece.segment < 0;
    const int32_t slot = is_tail ? job.tail_slot[row] : job.segment_slot[piece.segment];
    const int32_t length = is_tail ? piece.tokens + job.packing.horizon : piece.tokens;
    const int32_t tail_position = is_tail ? job.tree.tail_begin(row) : -1;
    grid.for_each_fragment(piece, [&](int32_t f, int32_t lo, int32_t hi) {
      int32_t* step = job.steps + static_cast<int64_t>(kStepWords) * next_step[f]++;
      step[kStepSlot] = slot;
      step[kStepLength] = length;
      step[kStepRows] = lo | hi << kStepHiShift;
      step[kStepTailPosition] = tail_position;
    });
  }
}

// Radix sort of the keys by tile and weight, the range of the weights closed up first so that most
// batches need two passes. Stable, so the creation number needs none. A comparison sort of 1,000
// items takes five times as long.
void ItemWriter::sort(int32_t num_items) {
  uint64_t* from = keys_.data();
  uint64_t* to = sorted_keys_.fit(num_items);
  uint64_t lightest = 0, heaviest = kWeightMax, highest_tile = 0;
  for (int32_t i = 0; i < num_items; ++i) {
    lightest = std::max(lightest, lightness_of(from[i]));
    heaviest = std::min(heaviest, lightness_of(from[i]));
    highest_tile = std::max(highest_tile, from[i] >> kTileShift);
  }
  const int weight_bits = std::bit_width(lightest - std::min(lightest, heaviest));
  for (int32_t i = 0; i < num_items; ++i) {
    const uint64_t rank =
        (from[i] >> kTileShift << weight_bits) | (lightness_of(from[i]) - heaviest);
    from[i] = rank << kWeightShift | (from[i] & INT32_MAX);
  }
  const int bits = weight_bits + std::bit_width(highest_tile);
  const int passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits;
  for (int pass = 0, shift = kWeightShift; pass < passes; ++pass) {
    const int digit_bits = (bits + pass) / passes;  // they add up to all bits
    const uint64_t mask = (uint64_t{1} << digit_bits) - 1;
    int32_t position[1 << kMaxDigitBits] = {};
    for (int32_t i = 0; i < num_items; ++i) ++position[from[i] >> shift & mask];
    int32_t sum = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) sum += std::exchange(position[digit], sum);
    for (int32_t i = 0; i < num_items; ++i) to[position[from[i] >> shift & mask]++] = from[i];
    std::swap(from, to);
    shift += digit_bits;
  }
  if (from != keys_.data()) std::copy_n(from, num_items, keys_.data());
}

}  // namespace pat
