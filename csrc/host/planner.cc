// SPDX-License-Identifier: MIT
#include "planner.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace pat {
namespace {

constexpr int64_t kWordMax = INT32_MAX;

int64_t align(int64_t slots) { return (slots + kSlotAlign - 1) / kSlotAlign * kSlotAlign; }

// Sort key of an item: by tile, heaviest first, then as created.
constexpr int kWeightShift = 31, kTileShift = 62;
uint64_t item_key(int32_t tile, int64_t planned, int32_t created) {
  return static_cast<uint64_t>(tile) << kTileShift |
         static_cast<uint64_t>(kWordMax - planned) << kWeightShift | static_cast<uint64_t>(created);
}
int32_t created_of(uint64_t key) { return static_cast<int32_t>(key & kWordMax); }

void check(const Shape& shape, const CostModel& model, const Capacity& capacity) {
  const auto positive = [](const char* name, int64_t value) {
    // Below 2^31, products of prices, rows and lengths stay far from the end of 64 bits.
    if (value < 1 || value > kWordMax) {
      throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) +
                                  " is out of range [1, 2^31)");
    }
  };
  positive("group_size", shape.group_size);
  positive("num_kv_heads", shape.num_kv_heads);
  positive("num_sms", model.num_sms);
  positive("part_ps", model.part_ps);
  for (int32_t k = 0; k < kNumTiles; ++k) {
    positive("item_ps", model.item_ps[k]);
    positive("token_ps", model.token_ps[k]);
    positive("reread_ps", model.reread_ps[k]);
    positive("solo_item_ps", model.solo_item_ps[k]);
    positive("solo_token_ps", model.solo_token_ps[k]);
  }
  if (capacity.slots > kWordMax) {
    throw std::invalid_argument("slots = " + std::to_string(capacity.slots) +
                                " do not fit int32 offsets");
  }
}

}  // namespace

Planner::Planner(const Shape& shape, const CostModel& model, const Capacity& capacity)
    : capacity_(capacity),
      group_size_(shape.group_size),
      packer_((check(shape, model, capacity), shape), model) {}

// Slots of the snapshot: the segments, then the tails with room to grow.
int64_t Planner::place_slots(const SegmentTree& tree, int32_t horizon) {
  int64_t slots = 0;
  int32_t* segment_slot = segment_slot_.fit(tree.size());
  int32_t* tail_slot = tail_slot_.fit(tree.num_rows());
  // Offsets past the capacity may wrap here; plan() refuses the batch before they are used.
  for (int32_t u = 0; u < tree.size(); ++u) {
    segment_slot[u] = static_cast<int32_t>(slots);
    slots = align(slots + tree[u].end - tree[u].begin);
  }
  for (int32_t row = 0; row < tree.num_rows(); ++row) {
    tail_slot[row] = static_cast<int32_t>(slots);
    slots = align(slots + tree.lens()[row] - tree.tail_begin(row) + horizon);
  }
  return slots;
}

// Partial slots by prefix sum; a row with a single item needs none.
void Planner::number_parts(const Packing& packing) {
  const int32_t num_rows = tree_.num_rows();
  int32_t* parts = next_part_.fill(num_rows, 0);
  for (int32_t i = 0; i < packing.num_shared; ++i) {
    const Packing::SharedPack& pack = packing.shared[i];
    const int32_t* rows = packing.rows.data() + pack.first_row;
    for (int32_t r = 0; r < pack.num_rows; ++r) parts[rows[r]] += packing.num_chunks[i];
  }
  int32_t* part_ptr = part_ptr_.fit(num_rows + 1);
  uint8_t* direct = direct_.fit(num_rows);
  part_ptr[0] = 0;
  for (int32_t row = 0; row < num_rows; ++row) {
    const int32_t chunks = packing.num_chunks[packing.num_shared + row];
    direct[row] = packing.tail_start[row] == 0 && chunks == 1;
    if (!direct[row]) parts[row] += chunks;
    part_ptr[row + 1] = part_ptr[row] + parts[row];
  }
  std::copy_n(part_ptr, num_rows, parts);
}

void Planner::write_items(const Packing& packing, int32_t* entries) {
  Item* items = items_.data();
  uint64_t* keys = keys_.data();
  std::fill_n(tile_count_, kNumTiles, 0);
  planned_tokens_ = 0;
  int32_t num_items = 0, num_entries = 0;

  struct Range {
    int64_t start, end;
    int32_t chunk, num_chunks, segment;
  };
  const auto add_pack = [&](const Range& range, const int32_t* rows, int32_t num_rows,
                            bool is_tail) {
    const PriceTable::Price& price = packer_.prices()[num_rows];
    const int64_t covered_end = is_tail ? range.end + packing.horizon : range.end;
    int32_t u = range.segment;
    // From the last chunk to the first: the run a chunk starts to read then only moves upwards.
    for (int32_t c = range.num_chunks - 1; c >= 0; --c) {
      const int64_t a = range.start + static_cast<int64_t>(c) * range.chunk;
      const int64_t b = c == range.num_chunks - 1 ? covered_end : a + range.chunk;
      const int32_t first_entry = num_entries + c * num_rows;
      for (int32_t r = 0; r < num_rows; ++r) {
        int32_t* entry = entries + static_cast<int64_t>(kEntryWords) * (first_entry + r);
        entry[kEntryRow] = rows[r];
        entry[kEntryPart] = direct_[rows[r]] ? -1 : next_part_[rows[r]] + c;
      }

      int32_t begin, above, slot, tail_position = -1;
      if (is_tail && b > tree_.tail_begin(rows[0])) {
        begin = tree_.tail_begin(rows[0]);
        above = tree_.home(rows[0]);
        slot = tail_slot_[rows[0]];
        tail_position = static_cast<int32_t>(std::max<int64_t>(a, begin));
      } else {
        while (tree_[u].begin >= b) u = tree_[u].parent;
        begin = tree_[u].begin;
        above = tree_[u].parent;
        slot = segment_slot_[u];
      }
      const int64_t first = std::max<int64_t>(a, begin);
      const int64_t beyond = std::max<int64_t>(begin - a, 0);
      const int64_t planned = std::max<int64_t>(std::min(b, range.end) - a, 0);

      int64_t offset = 0;
      const int64_t query_rows = static_cast<int64_t>(num_rows) * group_size_;
      for (int32_t t = 0; t < price.num_tiles; ++t) {
        const int64_t left = query_rows - offset;
        const int32_t tile =
            left >= kTiles[kNumTiles - 1].rows ? kNumTiles - 1 : PriceTable::tile_for(left);
        const int64_t count = std::min<int64_t>(kTiles[tile].rows, left);
        const int32_t created = num_items + c * price.num_tiles + t;
        items[created] = {{static_cast<int32_t>(first_entry + offset / group_size_),
                           static_cast<int32_t>(offset % group_size_), static_cast<int32_t>(count),
                           static_cast<int32_t>(slot + first - begin),
                           static_cast<int32_t>(b - first), beyond > 0 ? above : -1,
                           static_cast<int32_t>(beyond), tail_position}};
        keys[created] = item_key(tile, planned, created);
        ++tile_count_[tile];
        planned_tokens_ += planned;
        offset += count;
      }
    }
    for (int32_t r = 0; r < num_rows; ++r) next_part_[rows[r]] += range.num_chunks;
    num_items += price.num_tiles * range.num_chunks;
    num_entries += num_rows * range.num_chunks;
  };

  for (int32_t i = 0; i < packing.num_shared; ++i) {
    const Packing::SharedPack& pack = packing.shared[i];
    add_pack({pack.start, pack.end, packing.chunk[i], packing.num_chunks[i], pack.segment},
             packing.rows.data() + pack.first_row, pack.num_rows, false);
  }
  for (int32_t row = 0; row < tree_.num_rows(); ++row) {
    const int32_t i = packing.num_shared + row;
    add_pack({packing.tail_start[row], tree_.lens()[row], packing.chunk[i], packing.num_chunks[i],
              tree_.home(row)},
             &row, 1, true);
  }
}

// Radix sort of the keys by tile and weight, bytes that are equal in all keys skipped. Stable, so
// the creation number needs no pass. A comparison sort of 1,000 items takes five times as long.
void Planner::sort_items(int32_t num_items) {
  uint64_t* from = keys_.data();
  uint64_t* to = sorted_keys_.fit(num_items);
  uint64_t all_or = 0, all_and = ~uint64_t{0};
  for (int32_t i = 0; i < num_items; ++i) {
    all_or |= from[i];
    all_and &= from[i];
  }
  for (int shift = kWeightShift; shift < 64; shift += 8) {
    if (((all_or ^ all_and) >> shift & 0xff) == 0) continue;
    int32_t position[256] = {};
    for (int32_t i = 0; i < num_items; ++i) ++position[from[i] >> shift & 0xff];
    int32_t sum = 0;
    for (int32_t& count : position) sum += std::exchange(count, sum);
    for (int32_t i = 0; i < num_items; ++i) to[position[from[i] >> shift & 0xff]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys_.data()) std::copy_n(from, num_items, keys_.data());
}

int64_t Planner::plan(const Batch& batch, int32_t* out, int64_t out_words) {
  if (batch.num_rows > capacity_.rows) {
    throw CapacityError("the batch has " + std::to_string(batch.num_rows) +
                        " rows, the planner was made for " + std::to_string(capacity_.rows) +
                        ": raise max_rows");
  }
  tree_.build(batch);
  const Packing& packing = packer_.pack(tree_);
  const int64_t slots = place_slots(tree_, packing.horizon);
  if (slots > capacity_.slots) {
    throw CapacityError("the batch has " + std::to_string(tree_.unique_tokens()) +
                        " unique KV tokens, the slot snapshot holds " +
                        std::to_string(capacity_.slots) + " with headroom: raise max_tokens");
  }

  const int32_t num_rows = tree_.num_rows(), num_runs = tree_.size();
  int64_t num_items = 0, num_entries = 0, num_splits = 0;
  for (int32_t i = 0; i < packing.num_shared + num_rows; ++i) {
    const int64_t rows = i < packing.num_shared ? packing.shared[i].num_rows : 1;
    const int64_t chunks = packing.num_chunks[i];
    num_items += chunks * packer_.prices()[static_cast<int32_t>(rows)].num_tiles;
    num_entries += chunks * rows;
    num_splits += chunks - 1;
  }
  const int64_t off_runs = kHeaderWords + kItemWords * num_items;
  const int64_t off_tails = off_runs + int64_t{kRunWords} * num_runs;
  const int64_t off_entries = off_tails + int64_t{kTailWords} * num_rows;
  const int64_t off_reps = off_entries + kEntryWords * num_entries;
  const int64_t off_part_ptr = off_reps + num_runs;
  const int64_t num_words = off_part_ptr + num_rows + 1;
  if (num_words > out_words || num_words > kWordMax) {
    throw CapacityError("the plan has " + std::to_string(num_words) + " words, the buffer holds " +
                        std::to_string(out_words));
  }

  number_parts(packing);
  items_.fit(num_items);
  keys_.fit(num_items);
  write_items(packing, out + off_entries);
  sort_items(static_cast<int32_t>(num_items));

  std::fill_n(out, kHeaderWords, 0);
  out[kHeaderRows] = num_rows;
  out[kHeaderHorizon] = packing.horizon;
  for (int32_t k = 0, begin = 0; k < kNumTiles; begin += tile_count_[k++]) {
    out[kHeaderItemBegin + k] = begin;
    out[kHeaderItemCount + k] = tile_count_[k];
  }
  out[kHeaderOffItems] = kHeaderWords;
  out[kHeaderOffRuns] = static_cast<int32_t>(off_runs);
  out[kHeaderOffTails] = static_cast<int32_t>(off_tails);
  out[kHeaderOffEntries] = static_cast<int32_t>(off_entries);
  out[kHeaderOffReps] = static_cast<int32_t>(off_reps);
  out[kHeaderOffPartPtr] = static_cast<int32_t>(off_part_ptr);
  out[kHeaderWordCount] = static_cast<int32_t>(num_words);
  out[kHeaderRuns] = num_runs;
  out[kHeaderParts] = part_ptr_[num_rows];
  out[kHeaderSlots] = static_cast<int32_t>(slots);
  out[kHeaderEntries] = static_cast<int32_t>(num_entries);
  out[kHeaderSharing] = packing.sharing;
  out[kHeaderCoarsened] = packing.coarsened;
  out[kHeaderSplits] = static_cast<int32_t>(num_splits);
  out[kHeaderPlannedTokens] = static_cast<int32_t>(std::min(planned_tokens_, kWordMax));
  out[kHeaderSharedPacks] = packing.num_shared;
  out[kHeaderPredictedNs] = static_cast<int32_t>(std::min(packing.predicted_ps / 1000, kWordMax));

  for (int64_t i = 0; i < num_items; ++i) {
    const Item& item = items_[created_of(keys_[i])];
    std::memcpy(out + kHeaderWords + kItemWords * i, item.words, sizeof(item.words));
  }
  int32_t* run = out + off_runs;
  for (int32_t u = 0; u < num_runs; ++u, run += kRunWords) {
    run[kRunSlot] = segment_slot_[u];
    run[kRunLength] = tree_[u].end - tree_[u].begin;
    run[kRunNext] = tree_[u].parent;
    run[kRunPosition] = tree_[u].begin;
    out[off_reps + u] = tree_[u].first_row;
  }
  int32_t* tail = out + off_tails;
  for (int32_t row = 0; row < num_rows; ++row, tail += kTailWords) {
    tail[kTailSlot] = tail_slot_[row];
    tail[kTailPosition] = tree_.tail_begin(row);
    tail[kTailCapacity] = tree_.lens()[row] - tail[kTailPosition] + packing.horizon;
    tail[3] = 0;
  }
  std::copy_n(part_ptr_.data(), num_rows + 1, out + off_part_ptr);
  return num_words;
}

}  // namespace pat
