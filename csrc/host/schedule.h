// SPDX-License-Identifier: MIT
// In which time the GPU is done with a set of work items. Mirrors predict of pat_sglang/packing.py,
// which says why.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "../plan_layout.h"

namespace pat {

inline constexpr int32_t kPiecesPerSm[] = {2, 2, 1};  // work items of each tile side by side
// After so many waves, items of one length end at any time.
inline constexpr int32_t kWavesInStep = 8;

// (a * b - less) / c of non-negative values; the product of a step's picoseconds and the KV heads
// may pass 64 bits for lengths near 2^31.
inline int64_t mul_div(int64_t a, int64_t b, int64_t c, int64_t less = 0) {
  int64_t product;
  if (!__builtin_mul_overflow(a, b, &product)) return (product - less) / c;
  return static_cast<int64_t>((static_cast<__int128>(a) * b - less) / c);
}

/// Work items of one KV head, in buckets by solo time.
class Schedule {
 public:
  /// Adds `items` work items of a tile that last at most `solo_ps` each and take `work_ps` of SM
  /// time together, partials included.
  void add(int32_t tile, int64_t items, int64_t solo_ps, int64_t work_ps) {
    const int32_t index = bucket_of(solo_ps);
    Bucket& bucket = buckets_[index];
    bucket.eighths += items * (8 / kPiecesPerSm[tile]);
    bucket.items += items;
    bucket.work_ps += work_ps;
    bucket.longest_ps = std::max(bucket.longest_ps, solo_ps);
    int64_t& longest_ps = tile == 0 ? longest_narrow_ps_ : longest_wide_ps_;
    longest_ps = std::max(longest_ps, solo_ps);
    lowest_ = std::min(lowest_, index);
    highest_ = std::max(highest_, index);
  }

  /// When all are done, longest first, for every KV head.
  int64_t predict(int64_t num_kv_heads, int64_t num_sms) const {
    int64_t at_once_ps = 0, end_ps = 0;  // the longest that starts at once; the last of the others
    int64_t eighths = 0, work_ps = 0;    // of the longer buckets
    for (int32_t i = highest_; i >= lowest_; --i) {
      const Bucket& bucket = buckets_[i];
      if (bucket.items == 0) continue;
      const int64_t longer_ps = work_ps;
      eighths += bucket.eighths;
      work_ps += bucket.work_ps;
      if (eighths * num_kv_heads <= 8 * num_sms) {
        at_once_ps = std::max(at_once_ps, bucket.longest_ps);
        continue;
      }
      const int64_t start_ps =
          mul_div(work_ps, num_kv_heads, num_sms, bucket.work_ps / bucket.items);
      const int64_t waves = (bucket.eighths * num_kv_heads + 8 * num_sms - 1) / (8 * num_sms);
      const int64_t before_ps = mul_div(longer_ps, num_kv_heads, num_sms);
      // Waves of 2^31 items of 2^61 ps each pass 64 bits; then the other bound is the lower one.
      int64_t in_waves_ps;
      if (__builtin_mul_overflow(waves, bucket.longest_ps, &in_waves_ps) ||
          __builtin_add_overflow(in_waves_ps, before_ps, &in_waves_ps)) {
        in_waves_ps = INT64_MAX;
      }
      const int64_t drain_ps =
          bucket.longest_ps / (8 * kWavesInStep) * std::min<int64_t>(waves, kWavesInStep);
      end_ps = std::max({end_ps, std::min(start_ps + bucket.longest_ps, in_waves_ps),
                         mul_div(work_ps, num_kv_heads, num_sms) + drain_ps});
    }
    if (eighths * num_kv_heads <= 4 * num_sms) {  // none shares its SM
      at_once_ps = std::max(longest_wide_ps_, mul_div(longest_narrow_ps_, 3, 4));
    }
    const int64_t mean_ps = mul_div(work_ps, num_kv_heads, num_sms);
    const int64_t beside_ps = mul_div(std::min(mean_ps, at_once_ps), 9, 8);
    return std::max({mean_ps, at_once_ps, beside_ps, end_ps});
  }

  /// Takes over the work items of another schedule instead of its own.
  void reset_to(const Schedule& other) {
    clear();
    if (other.lowest_ > other.highest_) return;
    std::copy(other.buckets_ + other.lowest_, other.buckets_ + other.highest_ + 1,
              buckets_ + other.lowest_);
    lowest_ = other.lowest_;
    highest_ = other.highest_;
    longest_narrow_ps_ = other.longest_narrow_ps_;
    longest_wide_ps_ = other.longest_wide_ps_;
  }

  /// Forgets all work items.
  void clear() {
    if (lowest_ <= highest_) std::fill(buckets_ + lowest_, buckets_ + highest_ + 1, Bucket{});
    lowest_ = kNumBuckets;
    highest_ = -1;
    longest_narrow_ps_ = longest_wide_ps_ = 0;
  }

 private:
  static constexpr int32_t kNumBuckets = 256;  // four an octave of 64 bits

  struct Bucket {
    int64_t eighths;  // of an SM
    int64_t items;
    int64_t work_ps;
    int64_t longest_ps;
  };

  static int32_t bucket_of(int64_t solo_ps) {
    const auto x = static_cast<uint64_t>(std::max<int64_t>(solo_ps, 8));
    const int32_t bits = std::bit_width(x);
    return 4 * bits + static_cast<int32_t>(x >> (bits - 3) & 3);
  }

  Bucket buckets_[kNumBuckets] = {};
  int32_t lowest_ = kNumBuckets;
  int32_t highest_ = -1;
  int64_t longest_narrow_ps_ = 0, longest_wide_ps_ = 0;
};

}  // namespace pat
