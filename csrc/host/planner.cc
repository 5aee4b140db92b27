// SPDX-License-Identifier: MIT
#include "planner.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace pat {
namespace {

constexpr int64_t kWordMax = INT32_MAX;

int64_t align(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void check(const Shape& shape, const CostModel& model, const Capacity& capacity) {
  // Below 2^31, products of prices, rows and lengths stay far from the end of 64 bits.
  const auto positive = [](const char* name, int64_t value, int bits = 31) {
    if (value < 1 || value >> bits != 0) {
      throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) +
                                  " is out of range [1, 2^" + std::to_string(bits) + ")");
    }
  };
  positive("group_size", shape.group_size);
  positive("num_kv_heads", shape.num_kv_heads);
  positive("num_sms", model.num_sms);
  positive("part_ps", model.part_ps, 24);  // where nothing fits it is raised up to 2^14 times
  positive("step_ps", model.step_ps);
  positive("merge_ps", model.merge_ps);
  positive("private_token_ps", model.private_token_ps);
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
      packer_((check(shape, model, capacity), shape), model),
      writer_(shape.group_size) {}

// Slots of the snapshot: the segments, then the tails with room to grow.
int64_t Planner::place_slots(const SegmentTree& tree, int32_t horizon) {
  int64_t slots = 0;
  int32_t* segment_slot = segment_slot_.fit(tree.size());
  int32_t* tail_slot = tail_slot_.fit(tree.num_rows());
  // Offsets past the capacity may wrap here; plan() refuses the batch before they are used.
  for (int32_t u = 0; u < tree.size(); ++u) {
    segment_slot[u] = static_cast<int32_t>(slots);
    slots = align(slots + tree[u].end - tree[u].begin, kSlotAlign);
  }
  for (int32_t row = 0; row < tree.num_rows(); ++row) {
    tail_slot[row] = static_cast<int32_t>(slots);
    slots = align(slots + tree.lens()[row] - tree.tail_begin(row) + horizon, kSlotAlign);
  }
  return slots;
}

// Partial slots by prefix sum; a row that is computed once needs none.
void Planner::number_parts(const Packing& packing) {
  const int32_t num_rows = tree_.num_rows();
  int32_t* parts = next_part_.fit(num_rows);
  std::copy_n(packing.num_chunks.data() + packing.num_shared, num_rows, parts);
  for (int32_t i = 0; i < packing.num_shared; ++i) {
    const SharedPack& pack = packing.shared[i];
    const int32_t* rows = packing.rows.data() + pack.first_row;
    for (int32_t r = 0; r < pack.num_rows; ++r) parts[rows[r]] += packing.num_chunks[i];
  }
  int32_t* part_ptr = part_ptr_.fit(num_rows + 1);
  int32_t sum = 0;
  for (int32_t row = 0; row < num_rows; ++row) {
    part_ptr[row] = sum;
    const bool is_direct = parts[row] == 1;
    const int32_t next = is_direct ? -1 : sum;
    sum += is_direct ? 0 : parts[row];
    parts[row] = next;
  }
  part_ptr[num_rows] = sum;
}

Planner::Counts Planner::count(const Packing& packing) const {
  Counts counts;
  for (int32_t i = 0; i < packing.num_shared; ++i) {
    const SharedPack& pack = packing.shared[i];
    const int64_t chunks = packing.num_chunks[i];
    int64_t num_plain = chunks;
    if (pack.chain >= 0) {
      const Chain& chain = packing.chains[pack.chain];
      const FragmentGrid grid(group_size_, pack.num_rows, chain.rows_per_item);
      --num_plain;
      counts.items += grid.num_items();
      counts.fragments += grid.num_fragments();
      counts.steps += chain.num_steps;
    }
    counts.items += num_plain * packer_.prices()[pack.num_rows].num_tiles;
    counts.entries += chunks * pack.num_rows;
    counts.splits += chunks - 1;
  }
  for (int32_t row = 0; row < tree_.num_rows(); ++row) {
    const int64_t chunks = packing.num_chunks[packing.num_shared + row];
    counts.items += chunks * packer_.prices()[1].num_tiles;
    counts.entries += chunks;
    counts.splits += std::max<int64_t>(chunks - 1, 0);
  }
  return counts;
}

// Runs, their representatives, tails, and partial slots.
void Planner::write_small_tables(int32_t horizon, int32_t* out) const {
  const int32_t num_rows = tree_.num_rows(), num_runs = tree_.size();
  int32_t* run = out + out[kHeaderOffRuns];
  int32_t* reps = out + out[kHeaderOffReps];
  for (int32_t u = 0; u < num_runs; ++u, run += kRunWords) {
    run[kRunSlot] = segment_slot_[u];
    run[kRunLength] = tree_[u].end - tree_[u].begin;
    run[kRunNext] = tree_[u].parent;
    run[kRunPosition] = tree_[u].begin;
    reps[u] = tree_[u].first_row;
  }
  int32_t* tail = out + out[kHeaderOffTails];
  for (int32_t row = 0; row < num_rows; ++row, tail += kTailWords) {
    tail[kTailSlot] = tail_slot_[row];
    tail[kTailPosition] = tree_.tail_begin(row);
    tail[kTailCapacity] = tree_.lens()[row] - tail[kTailPosition] + horizon;
    tail[3] = 0;
  }
  std::copy_n(part_ptr_.data(), num_rows + 1, out + out[kHeaderOffPartPtr]);
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
  number_parts(packing);
  const Counts counts = count(packing);
  // The tables in the order in which they lie in the buffer.
  const struct {
    int32_t offset_word;
    int64_t num_words;
  } tables[] = {
      {kHeaderOffItems, kItemWords * counts.items},
      {kHeaderOffFragments, kFragmentWords * counts.fragments},
      {kHeaderOffSteps, kStepWords * counts.steps},
      {kHeaderOffRuns, int64_t{kRunWords} * num_runs},
      {kHeaderOffTails, int64_t{kTailWords} * num_rows},
      {kHeaderOffEntries, kEntryWords * counts.entries},
      {kHeaderOffReps, num_runs},
      {kHeaderOffPartPtr, num_rows + 1},
  };
  int64_t num_words = kHeaderWords;
  for (const auto& table : tables) num_words = align(num_words, kTableAlign) + table.num_words;
  if (num_words > out_words || num_words > kWordMax) {
    throw CapacityError("the plan has " + std::to_string(num_words) + " words, the buffer holds " +
                        std::to_string(out_words));
  }

  std::fill_n(out, kHeaderWords, 0);
  int64_t end = kHeaderWords;
  for (const auto& table : tables) {
    const int64_t begin = align(end, kTableAlign);
    std::fill(out + end, out + begin, 0);
    out[table.offset_word] = static_cast<int32_t>(begin);
    end = begin + table.num_words;
  }
  writer_.write({.tree = tree_,
                 .packing = packing,
                 .prices = packer_.prices(),
                 .segment_slot = segment_slot_.data(),
                 .tail_slot = tail_slot_.data(),
                 .next_part = next_part_.data(),
                 .num_items = counts.items,
                 .items = out + out[kHeaderOffItems],
                 .fragments = out + out[kHeaderOffFragments],
                 .steps = out + out[kHeaderOffSteps],
                 .entries = out + out[kHeaderOffEntries]});
  write_small_tables(packing.horizon, out);

  out[kHeaderRows] = num_rows;
  out[kHeaderHorizon] = packing.horizon;
  for (int32_t k = 0, begin = 0; k < kNumTiles; begin += writer_.tile_count(k++)) {
    out[kHeaderItemBegin + k] = begin;
    out[kHeaderItemCount + k] = writer_.tile_count(k);
  }
  out[kHeaderRuns] = num_runs;
  out[kHeaderParts] = part_ptr_[num_rows];
  out[kHeaderSlots] = static_cast<int32_t>(slots);
  out[kHeaderWordCount] = static_cast<int32_t>(num_words);
  out[kHeaderEntries] = static_cast<int32_t>(counts.entries);
  out[kHeaderSharing] = packing.sharing;
  out[kHeaderCoarsened] = packing.coarsened;
  out[kHeaderSplits] = static_cast<int32_t>(counts.splits);
  const int64_t unshared = std::accumulate(tree_.lens(), tree_.lens() + num_rows, int64_t{0});
  out[kHeaderUnsharedTokens] = static_cast<int32_t>(std::min(unshared, kWordMax));
  out[kHeaderUniqueTokens] = static_cast<int32_t>(std::min(tree_.unique_tokens(), kWordMax));
  out[kHeaderPlannedTokens] = static_cast<int32_t>(std::min(writer_.planned_tokens(), kWordMax));
  out[kHeaderSharedPacks] = packing.num_shared;
  out[kHeaderPredictedNs] = static_cast<int32_t>(std::min(packing.predicted_ps / 1000, kWordMax));
  out[kHeaderFragments] = static_cast<int32_t>(counts.fragments);
  out[kHeaderSteps] = static_cast<int32_t>(counts.steps);
  out[kHeaderChains] = writer_.num_chain_items();
  return num_words;
}

}  // namespace pat
