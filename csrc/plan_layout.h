// SPDX-License-Identifier: MIT
// Word layout of a plan: what the planner writes and the kernels read, as int32 words.
// The tables and the meaning of every word are described in pat_sglang/layout.py, which is the same
// layout in Python; tests/test_planner.py reads this file and compares the two.
// Plain C++17 constants without includes beyond <cstdint>, so that host and device code share it.
#pragma once

#include <cstdint>

namespace pat {

/// Shape of a work item: query rows (request row x head of the group) x KV tokens a step.
struct TileShape {
  int32_t rows;
  int32_t tokens;
};

/// Same tiles in the same order as TILES in pat_sglang/cost.py.
inline constexpr int32_t kNumTiles = 3;
inline constexpr TileShape kTiles[kNumTiles] = {{16, 64}, {64, 64}, {128, 64}};
inline constexpr int32_t kFragmentRows = 16;  // query rows of one warp's MMA
inline constexpr int32_t kItemWarps = 4;      // warps of an item, see pat_sglang/cost.py

// Header: int32 [kHeaderWords]. Offsets are in words from the start of the plan; every table starts
// at a multiple of kTableAlign.
inline constexpr int32_t kHeaderWords = 32;
inline constexpr int32_t kTableAlign = 4;
inline constexpr int32_t kHeaderRows = 0;
inline constexpr int32_t kHeaderSharedPacks = 1;
inline constexpr int32_t kHeaderItemBegin = 2;  // [kNumTiles], first item of each tile
inline constexpr int32_t kHeaderItemCount = 5;  // [kNumTiles], items of each tile
inline constexpr int32_t kHeaderOffItems = 8;
inline constexpr int32_t kHeaderOffEntries = 9;
inline constexpr int32_t kHeaderOffRuns = 10;
inline constexpr int32_t kHeaderOffFragments = 11;
inline constexpr int32_t kHeaderOffSteps = 12;
inline constexpr int32_t kHeaderOffPartPtr = 13;
inline constexpr int32_t kHeaderOffTails = 14;
inline constexpr int32_t kHeaderUniqueTokens = 15;  // every shared one once
// The kernels of a layer read no word from here on: they touch two sectors of L2.
inline constexpr int32_t kHeaderParts = 16;
inline constexpr int32_t kHeaderSlots = 17;
inline constexpr int32_t kHeaderWordCount = 18;
inline constexpr int32_t kHeaderEntries = 19;
inline constexpr int32_t kHeaderSharing = 20;
inline constexpr int32_t kHeaderCoarsened = 21;
inline constexpr int32_t kHeaderSplits = 22;
inline constexpr int32_t kHeaderPlannedTokens = 23;
inline constexpr int32_t kHeaderHorizon = 24;
inline constexpr int32_t kHeaderPredictedNs = 25;
inline constexpr int32_t kHeaderFragments = 26;
inline constexpr int32_t kHeaderSteps = 27;
inline constexpr int32_t kHeaderChains = 28;  // items with fragments
inline constexpr int32_t kHeaderOffReps = 29;
inline constexpr int32_t kHeaderUnsharedTokens = 30;  // the sum of the rows' lengths
inline constexpr int32_t kHeaderRuns = 31;

// Item: int32 [items, kItemWords], items of one tile side by side, heaviest first.
// All rows of an item read its shared run: the first run, then upwards. The rows of a chain then read
// what is their own, fragment by fragment.
inline constexpr int32_t kItemWords = 12;
inline constexpr int32_t kItemFirstEntry = 0;     // entry of the first query row
inline constexpr int32_t kItemHeadOffset = 1;     // head of the group of the first query row
inline constexpr int32_t kItemQueryRows = 2;      // query rows of the item, at most the tile's
inline constexpr int32_t kItemFirstSlot = 3;      // offset of the first run in the slot snapshot
inline constexpr int32_t kItemFirstLength = 4;    // tokens of the first run (a bound for a tail)
inline constexpr int32_t kItemNextRun = 5;        // run read after the first, -1: none
inline constexpr int32_t kItemBeyond = 6;         // tokens read beyond the first run
inline constexpr int32_t kItemTailPosition = 7;   // token position of a tail piece, -1: no tail
inline constexpr int32_t kItemFirstFragment = 8;  // of the first 16 query rows, -1: no chain
inline constexpr int32_t kItemTailRow = 9;        // request row of the tail piece, -1: no tail

// Fragment: int32 [fragments, kFragmentWords], 16 query rows of a chain.
inline constexpr int32_t kFragmentWords = 2;
inline constexpr int32_t kFragmentFirstStep = 0;
inline constexpr int32_t kFragmentNumSteps = 1;

// Step: int32 [steps, kStepWords], one contiguous piece of the snapshot, read by some rows of a fragment.
inline constexpr int32_t kStepWords = 4;
inline constexpr int32_t kStepSlot = 0;          // offset in the slot snapshot
inline constexpr int32_t kStepLength = 1;        // tokens (a bound for a tail)
inline constexpr int32_t kStepRows = 2;          // query rows [lo, hi) of the fragment, as one word
inline constexpr int32_t kStepTailPosition = 3;  // as kItemTailPosition
inline constexpr int32_t kStepHiShift = 8;       // that word is lo | hi << kStepHiShift
inline constexpr int32_t kStepRowMask = (1 << kStepHiShift) - 1;  // lo or hi, once shifted down

// Entry: int32 [entries, kEntryWords].
inline constexpr int32_t kEntryWords = 2;
inline constexpr int32_t kEntryRow = 0;   // request row
inline constexpr int32_t kEntryPart = 1;  // partial slot, -1: the item writes the output itself

// Run: int32 [runs, kRunWords], one a segment.
inline constexpr int32_t kRunWords = 4;
inline constexpr int32_t kRunSlot = 0;      // offset in the slot snapshot
inline constexpr int32_t kRunLength = 1;    // tokens
inline constexpr int32_t kRunNext = 2;      // run above (parent), -1: a root
inline constexpr int32_t kRunPosition = 3;  // first token position

// Tail: int32 [rows, kTailWords].
inline constexpr int32_t kTailWords = 4;
inline constexpr int32_t kTailSlot = 0;      // offset in the slot snapshot
inline constexpr int32_t kTailPosition = 1;  // first private token position
inline constexpr int32_t kTailCapacity = 2;  // tokens, the horizon included

inline constexpr int32_t kSlotAlign = 4;  // every run and tail starts at a multiple of this

}  // namespace pat
