// SPDX-License-Identifier: MIT
// The loading warps: they draw the work, read the plan and bring Q, K and V, up to kStages entries
// ahead of the computing warps and across the borders of items.
#pragma once

#include "copy.cuh"
#include "pipeline_sm90.cuh"
#include "work_list.cuh"

#if defined(PAT_PATH_SM90)

namespace pat {

class Loader {
 public:
  __device__ Loader(const DecodeParams& params, const Tables& tables, uint32_t shared)
      : params_(params),
        tables_(tables),
        warp_(ptx::uniform(threadIdx.x / 32 % kWarps)),
        lane_(threadIdx.x % 32),
        plan_tokens_(tables.header(kHeaderUniqueTokens)),
        half_(ptx::uniform(threadIdx.x / kHalfThreads % kHalves)),
        first_half_(shared, 0),
        mine_(shared, half_),
        pair_(mine_, warp_),
        slots_(shared + kSlotsOffset + (half_ * kWarps + warp_) * kSlotsBytes),
        lane_offset_(warp_ * kSliceBytes + copied_first(lane_)) {}

  /// Loads pieces until none is left.
  /// NOTE: what is known of a tile is computed for every piece anew, from L1: registers are scarcer.
  __device__ void run() {
    int turn = 0;  // 0: this is the first piece of the tile
#pragma unroll 1
    for (int i = 0; i < kNumTiles;) {
      const TileWork work = tile_work(params_, tables_, i, half_, kWorkers);
      int32_t piece = work.pieces;
      if (turn == 0 && work.first >= 0) {
        piece = work.first;
      } else if (work.drawn_from < work.pieces) {
        piece = draw(work, turn & 1);
      }
      if (piece < work.pieces) {
        load(ptx::uniform(work.tile), ptx::uniform(piece), work.pieces);
        turn = turn == 2 ? 1 : turn + 1;
      } else {
        ++i;
        turn = 0;
      }
    }
    announce({.piece = -1});
    arrive(mine_.q_full());
  }

 private:
  /// What a stage holds of this warp: its part of an entry of all warps, or a slice of its partner.
  enum Use { kEntry, kSlice };

  static constexpr int32_t kLongRun = 1024, kShortRun = 128;   // tokens
  static constexpr int64_t kSmallPlan = int64_t{256} << 20;    // bytes, five times an H100's L2
  static constexpr int32_t kReadOnce = 1 << 2 * kStepHiShift;  // in a step's word of rows

  /// Whether a chain starts with its private runs. Every other one does: shared runs come from L2,
  /// private ones from device memory, and both should be busy all the time.
  /// NOTE: to the halves of a joint item the order costs a rendezvous. The next such piece fills it;
  /// where no block has a second one, only a long run is worth it.
  __device__ __forceinline__ static bool is_private_first(int tile, int32_t piece, int32_t pieces,
                                                          int32_t tokens) {
    const bool is_only_round = is_joint(tile) && pieces <= static_cast<int32_t>(gridDim.x);
    return piece % 2 == 1 && tokens >= (is_only_round ? kLongRun : kShortRun);
  }

  /// Whether the plan has so few K and V that what earlier kernels wrote can stay in L2 and need not be
  /// written back while this one reads. A large plan displaces it anyhow, and had better do so at once.
  __device__ __forceinline__ bool is_small() const {
    constexpr int64_t kTokenBytes = 2 * kHeadDim * sizeof(Element);
    return int64_t{plan_tokens_} * params_.num_kv_heads.value() < kSmallPlan / kTokenBytes;
  }

  /// Whether the first run is a tail that no other item reads and that L2 should give up first: in a
  /// small plan, and where it would displace runs that others read again.
  __device__ __forceinline__ bool evicts_run(const Item& item) const {
    return item.tail_position >= 0 && item.query_rows == params_.group_size.value() &&
           (is_small() || tables_.header(kHeaderSharedPacks) > 0);
  }

  /// The next piece of a tile, for one half or for both.
  __device__ __forceinline__ int32_t draw(const TileWork& work, int turn) const {
    const bool both = is_joint(work.tile);
    const uint32_t drawn = (both ? first_half_ : mine_).drawn(work.tile, turn);
    if ((!both || half_ == 0) && warp_ == 0 && lane_ == 0) {
      ptx::store_shared(drawn, draw_piece(params_, work));
    }
    // The word is written again two turns later, when all have been here once more.
    ptx::named_barrier(both ? kLoadersOfBlock : kLoadersOfHalf + half_,
                       both ? kHalves * kHalfThreads : kHalfThreads);
    return ptx::load_shared(drawn);
  }

  __device__ __forceinline__ Item item_of(int tile, int32_t piece) const {
    return {tables_,
            tables_.header(kHeaderItemBegin + tile) + params_.num_kv_heads.quotient(piece)};
  }

  /// `pieces`: of this tile.
  __device__ __forceinline__ void load(int tile, int32_t piece, int32_t pieces) {
    Item item = item_of(tile, piece);
    const int32_t kv_head = params_.num_kv_heads.remainder(piece);
    // All that the first loads of K and Q wait for is asked for at once. (A plain load of the slots
    // ptxas moves behind the wait for the previous item.)
    const int32_t early_token = first_token(tile) + lane_;
    const int32_t early_slot = lane_ < kSliceTokens && early_token < item.first_length
                                   ? ptx::load_l2(params_.slots + item.first_slot + early_token)
                                   : 0;
    const QueryRows query_rows(params_, tables_, item, first_row(tile, half_, warp_), kv_head);
    item.clip(params_.live_lens);
    const bool is_chain = item.first_fragment >= 0;
    const bool private_first = is_chain && is_private_first(tile, piece, pieces, item.tokens());
    Box box{piece, item.tokens(), item.query_rows, item.first_entry, item.head_offset, tile};
    if (is_narrow(tile)) {  // all of it is one stream of each warp
      box.phases[0] = kStreams;
      box.phases[1] = kNothing;
    } else {
      box.phases[0] = private_first ? kStreams : kSharedRun;
      box.phases[1] = !is_chain ? kNothing : private_first ? kSharedRun : kStreams;
    }
    announce(box);
    // Of a wide item the rows the partner owns, of a narrow one the same for all.
    if (!is_narrow(tile) || warp_ == 0) query_rows.issue(params_, mine_.q() + warp_ * kSliceBytes);
    arrive(mine_.q_full());

    column_ = (kv_head * kHeadDim + lane_ % kRowChunks * 8) * sizeof(Element);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const bool is_shared = (i == 0) != private_first;
      if (is_shared) {
        load_run(item, tile, early_slot);
      } else if (is_chain) {
        load_steps(tile, piece);
      }
      const bool ends_streams = is_narrow(tile) ? i == 1 : is_chain && !is_shared;
      if (ends_streams) {
        await_empty();
        arrive_slice(kSlice, Slice::kEnd);
      }
    }
  }

  /// Token of the shared run with which this warp's first slice starts.
  __device__ int32_t first_token(int tile) const {
    return (is_joint(tile) ? half_ * kBlockRows : 0) + warp_ * kSliceTokens;
  }

  /// The run all rows of the item share; this warp's slices of it. Slots are fetched a slice ahead;
  /// `early_slot`: those of the first slice as far as they are in the first run.
  __device__ __forceinline__ void load_run(const Item& item, int tile, int32_t early_slot) {
    const bool narrow = is_narrow(tile);
    if (!narrow) stage_ = 0;
    const int32_t stride = is_joint(tile) ? kHalves * kBlockRows : kBlockRows;
    const int32_t tokens = ptx::uniform(item.tokens());
    SlotWalk walk(item);
    const auto fetch = [&](int32_t first) {
      return lane_ < kSliceTokens && first + lane_ < tokens
                 ? walk.slot(tables_, params_.slots, first + lane_)
                 : 0;
    };
    int32_t first = first_token(tile);
    // A stream has slices with tokens only, an entry has those of all four warps.
    const int32_t end = narrow ? tokens : tokens + warp_ * kSliceTokens;
    const bool evicts = evicts_run(item);
    int32_t slot = first + lane_ < item.first_length ? early_slot : fetch(first);
    for (; first < end; first += stride) {
      const int32_t next_slot = fetch(first + stride);
      const int32_t valid = min(max(tokens - first, 0), kSliceTokens);
      load_slices(narrow ? kSlice : kEntry, slot, Slice::pack(valid, Slice::kAllRows, 0),
                  evicts && first < item.first_length);
      slot = next_slot;
    }
  }

  /// The steps of the partner's own rows; of a narrow item, this warp's slices of all steps.
  /// NOTE: the item is read again, from L1, rather than kept in registers since load().
  __device__ __forceinline__ void load_steps(int tile, int32_t piece) {
    Item item = item_of(tile, piece);
    item.clip(params_.live_lens);
    const int32_t first = first_row(tile, half_, warp_);
    if (first >= ptx::uniform(item.query_rows)) return;
    int2 fragment = tables_.fragment(item.first_fragment + first / kFragmentRows);
    fragment.y = ptx::uniform(fragment.y);
    // A stream's next slice, from the start of a step. Slices of a narrow item are dealt in turn,
    // without a break from the shared run to the last step.
    int32_t offset = 0, stride = kSliceTokens;
    if (is_narrow(tile)) {
      stride = kBlockRows;
      offset =
          (warp_ * kSliceTokens - whole_slices(ptx::uniform(item.tokens()))) & (kBlockRows - 1);
    }
    for (int32_t batch = 0; batch < fragment.y; batch += 32) {
      const int32_t count = min(fragment.y - batch, 32);
      Step mine{};  // lane l's of this batch: one latency for all of them
      if (lane_ < count) {
        const int32_t index = fragment.x + batch + lane_;
        mine = load_step(tables_, params_, index, item, first);
        // A tail of a row whose query rows are all in this fragment.
        const bool has_all_rows = params_.group_size.remainder(kFragmentRows) == 0;
        if (is_small() && has_all_rows && tables_.step(index).w >= 0) mine.rows |= kReadOnce;
      }
      // The step that has the token `offset` from the start of this one; false: none of the batch.
      int32_t step = -1, from = 0, length = 0, rows = 0;
      const auto seek = [&] {
        while (offset >= length) {
          offset -= whole_slices(length);
          if (++step >= count) return false;
          from = __shfl_sync(0xffffffffu, mine.slot, step);
          length = __shfl_sync(0xffffffffu, mine.length, step);
          rows = __shfl_sync(0xffffffffu, mine.rows, step);
        }
        return true;
      };
      const auto fetch = [&] {
        const int32_t token = offset + lane_;
        return lane_ < kSliceTokens && token < length ? __ldg(params_.slots + from + token) : 0;
      };
      bool more = seek();
      int32_t slot = more ? fetch() : 0;
      while (more) {
        const int32_t word =
            Slice::pack(min(length - offset, kSliceTokens), rows & (kReadOnce - 1), 0);
        const bool read_once = (rows & kReadOnce) != 0;
        offset += stride;
        more = seek();
        const int32_t next_slot = more ? fetch() : 0;
        load_slices(kSlice, slot, word, read_once);
        slot = next_slot;
      }
    }
  }

  /// The next item, once the computing warps have begun the previous one and have its Q.
  __device__ __forceinline__ void announce(const Box& box) {
    ptx::barrier_wait(mine_.q_empty(), q_parity_ ^ 1);
    if (warp_ == 0 && lane_ == 0) {
      const uint32_t to = mine_.box(q_parity_);
      ptx::store_shared_x4(to, {box.piece, box.tokens, box.query_rows, box.first_entry});
      ptx::store_shared_x4(to + 16, {box.head_offset, box.tile, box.phases[0], box.phases[1]});
    }
    q_parity_ ^= 1;
  }

  /// This warp's copies so far, and what lane 0 has stored.
  __device__ __forceinline__ void arrive(uint32_t barrier) {
    ptx::barrier_arrive_after_cp_async(barrier);
    if (lane_ == 0) ptx::barrier_arrive(barrier, 1);
  }

  /// Until the stage's last use, of either kind, is over.
  __device__ __forceinline__ void await_empty() {
    if ((entries_ >> stage_ & 1) != 0) {
      ptx::barrier_wait(mine_.entry_empty(stage_), entry_empty_.of(stage_));
      entry_empty_.advance(stage_);
    } else {
      ptx::barrier_wait(pair_.slice_empty(stage_), slice_empty_.of(stage_));
      slice_empty_.advance(stage_);
    }
  }

  /// The barrier that says what this stage is used for has arrived.
  __device__ __forceinline__ uint32_t full(Use use) const {
    return use == kEntry ? mine_.entry_full(stage_) : pair_.slice_full(stage_);
  }

  /// Behind the loads of a stage.
  __device__ __forceinline__ void to_next_stage(Use use) {
    const uint32_t bit = 1u << stage_;
    entries_ = use == kEntry ? entries_ | bit : entries_ & ~bit;
    stage_ = next_stage(stage_);
  }

  __device__ __forceinline__ void arrive_slice(Use use, int32_t word) {
    if (lane_ == 0) ptx::store_shared(pair_.slice(stage_), word);
    arrive(full(use));
    to_next_stage(use);
  }

  /// K, then V of this warp's slice of two ring entries. `slot`: lane l's, of token l.
  __device__ __forceinline__ void load_slices(Use use, int32_t slot, int32_t word, bool read_once) {
    const uint64_t policy = ptx::l2_policy(ptx::uniform(read_once));
    const int32_t first = __shfl_sync(0xffffffffu, slot, 0);
    const bool follows = lane_ >= kSliceTokens || slot == first + lane_;
    const bool whole = params_.has_maps && Slice::valid(word) == kSliceTokens;
    if (__all_sync(0xffffffffu, whole && follows)) {
      copy_slice(params_.k_map, use, first, word, policy);
      copy_slice(params_.v_map, use, first, word, policy);
      return;
    }
    __syncwarp();  // all lanes have read those of the slice before
    if (lane_ < kSliceTokens) ptx::store_shared(slots_ + lane_ * 4, slot);
    __syncwarp();
    gather_slice(params_.k_cache, params_.k_slot_stride, use, word, policy);
    gather_slice(params_.v_cache, params_.v_slot_stride, use, word, policy);
  }

  /// 16 slots side by side, by the copy engine.
  __device__ __forceinline__ void copy_slice(const TensorMap& map, Use use, int32_t first,
                                             int32_t word, uint64_t policy) {
    await_empty();
    if (lane_ == 0) {
      const uint32_t barrier = full(use);
      const uint32_t to = mine_.entry(stage_) + warp_ * kSliceBytes;
      ptx::store_shared(pair_.slice(stage_), word);
      ptx::barrier_arrive(barrier, kLoaderArrivals - 1);
      ptx::barrier_arrive_expecting(barrier, kPanels * kSliceBytes);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        ptx::copy_tile(to + panel * kPanelBytes, &map, panel * kMapElements,
                       column_ / (kHeadDim * sizeof(Element)), first, barrier, policy);
      }
    }
    to_next_stage(use);
  }

  /// 16 slots wherever they are.
  __device__ __forceinline__ void gather_slice(const void* cache, uint32_t slot_stride, Use use,
                                               int32_t word, uint64_t policy) {
    await_empty();
    const char* from = ptx::opaque(static_cast<const char*>(cache) + column_);
    const uint32_t to = mine_.entry(stage_) + lane_offset_;
    const uint32_t slots = slots_ + copied_row(lane_, 0) * 4;
    if (Slice::valid(word) == kSliceTokens) {
#pragma unroll
      for (int four = 0; four < kCopyPasses; four += 4) {
        const uint4 v = ptx::load_shared_x4(slots + four * 4);
        const uint32_t slot[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::cp_async_16(copied_to(to, four + i), from + uint64_t{slot[i]} * slot_stride, policy);
        }
      }
    } else {  // tokens that do not exist become zeros
#pragma unroll 1
      for (int pass = 0; pass < kCopyPasses; ++pass) {
        const uint32_t slot = ptx::load_shared(slots + pass * 4);
        ptx::cp_async_16(copied_to(to, pass), from + uint64_t{slot} * slot_stride,
                         copied_row(lane_, pass) < Slice::valid(word), policy);
      }
    }
    arrive_slice(use, word);
  }

  const DecodeParams& params_;
  const Tables& tables_;
  const int warp_, lane_;
  const int32_t plan_tokens_;  // asked for before anything waits
  const int half_;
  const Half first_half_, mine_;
  const Pair pair_;
  const uint32_t slots_;        // where this warp keeps those of the slice at hand
  const uint32_t lane_offset_;  // of this lane's first chunk within an entry
  int stage_ = 0;
  uint32_t entries_ = 0;  // stages whose last use was an entry
  // A stage nobody has used yet is waited for as a slice of the phase before the first, which is over.
  Parities slice_empty_{~0u}, entry_empty_{0};
  uint32_t column_;  // bytes to this lane's 16-byte chunk of a slot's K or V
  uint32_t q_parity_ = 0;
};

}  // namespace pat

#endif
