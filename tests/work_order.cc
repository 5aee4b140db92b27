// SPDX-License-Identifier: MIT
// Random grids and plans played through tile_work: every piece is computed once, the halves of a block agree
// where they join, and each worker has one first piece at most. And Divisor, against the division it stands for.
#include "device/work_order.h"

#include <cstdio>
#include <random>
#include <vector>

namespace {

using pat::kNumTiles;
using pat::TileWork;
using pat::Worker;

std::mt19937 random_bits(1);
int32_t below(int32_t bound) { return static_cast<int32_t>(random_bits() % bound); }

struct Progress {  // of a worker
  int tile = 0, turn = 0;
};

const char* play(int32_t blocks, int32_t count, const int32_t (&pieces)[kNumTiles]) {
  std::vector<int> computed[kNumTiles];
  for (int t = 0; t < kNumTiles; ++t) computed[t].assign(pieces[t], 0);
  std::vector<Progress> of(blocks * count);
  std::vector<bool> had_first(blocks * count);
  int32_t counters[kNumTiles] = {};
  for (int32_t running = blocks * count; running > 0;) {
    const int32_t block = below(blocks), index = below(count);
    Progress& mine = of[block * count + index];
    if (mine.tile == kNumTiles) continue;
    const TileWork work = tile_work(pieces, Worker{block, blocks, index, count}, mine.tile);
    const bool joint = work.tile == kNumTiles - 1;
    const int32_t from = joint ? 0 : index, to = joint ? count : index + 1;
    bool together = true;
    for (int32_t i = from; i < to; ++i) {
      const Progress& other = of[block * count + i];
      if (other.tile > mine.tile) return "a worker has passed the joint tile alone";
      together = together && other.tile == mine.tile;
      const TileWork its = tile_work(pieces, Worker{block, blocks, i, count}, mine.tile);
      if (its.first != work.first || its.drawn_from != work.drawn_from) return "workers differ";
    }
    if (!together) continue;
    const bool is_first = mine.turn == 0 && work.first >= 0;
    int32_t piece = work.pieces;
    if (is_first) {
      piece = work.first;
    } else if (work.drawn_from < work.pieces) {
      piece = work.drawn_from + counters[work.tile]++;
    }
    if (piece < 0) return "a negative piece";
    if (piece < work.pieces) ++computed[work.tile][piece];
    for (int32_t i = from; i < to; ++i) {
      Progress& each = of[block * count + i];
      if (is_first && had_first[block * count + i]) return "a worker has two first pieces";
      had_first[block * count + i] = had_first[block * count + i] || is_first;
      each.turn = 1;
      if (piece < work.pieces) continue;
      each = {each.tile + 1, 0};
      running -= each.tile == kNumTiles;
    }
  }
  for (const std::vector<int>& of_tile : computed) {
    for (const int times : of_tile) {
      if (times != 1) return "a piece was computed more or less than once";
    }
  }
  return nullptr;
}

}  // namespace

int main() {
  for (int i = 0; i < 20000; ++i) {
    const int32_t count = 1 + below(2), blocks = 1 + below(i % 3 ? 12 : 140);
    const int32_t workers = blocks * count;
    int32_t pieces[kNumTiles];
    for (int32_t& n : pieces) n = below(2) * below(below(2) ? 4 : below(2) ? workers + 3 : 4 * workers);
    if (const char* error = play(blocks, count, pieces)) {
      std::printf("%s: %d blocks of %d, pieces %d %d %d\n", error, blocks, count, pieces[0],
                  pieces[1], pieces[2]);
      return 1;
    }
  }
  for (int i = 0; i < 1000000; ++i) {
    const int32_t value = 1 + below(1 << (1 + below(30)));
    const int32_t n = i % 16 ? below(1 << (1 + below(30))) : INT32_MAX - below(3);
    const pat::Divisor divisor(value);
    if (divisor.quotient(n) != n / value || divisor.remainder(n) != n % value) {
      std::printf("%d / %d is not %d\n", n, value, divisor.quotient(n));
      return 1;
    }
  }
}
