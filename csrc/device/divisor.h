// SPDX-License-Identifier: MIT
// Division by a number known at launch. No CUDA in here: the tests run it on the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PAT_HOST_DEVICE __host__ __device__
#else
#define PAT_HOST_DEVICE
#endif

namespace pat {

/// Divides 0 <= n < 2^31 by `value` > 0: the device has no instruction for that, and the twenty-five it
/// takes instead come before the first load of an item. Granlund and Montgomery, "Division by invariant
/// integers using multiplication", PLDI 1994, figure 4.1, without its halving: n + high fits 32 bits.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int32_t value) : value_(value) {
    while ((uint64_t{1} << shift_) < static_cast<uint32_t>(value)) ++shift_;
    const uint64_t beyond = (uint64_t{1} << shift_) - static_cast<uint32_t>(value);
    factor_ = static_cast<uint32_t>((beyond << 32) / static_cast<uint32_t>(value) + 1);
  }

  PAT_HOST_DEVICE int32_t value() const { return value_; }

  PAT_HOST_DEVICE int32_t quotient(int32_t n) const {
#if defined(PAT_PATH_SM80)  // whose kernel lacks registers: this keeps one number, not three
    return n / value_;
#else
    const auto high = static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(n)} * factor_ >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift_);
#endif
  }

  PAT_HOST_DEVICE int32_t remainder(int32_t n) const { return n - quotient(n) * value_; }

 private:
  int32_t value_ = 1;
  uint32_t factor_ = 1, shift_ = 0;
};

}  // namespace pat
