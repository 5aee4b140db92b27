// SPDX-License-Identifier: MIT
// Scratch memory that survives from call to call: grows, never shrinks, never clears by itself.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>

namespace pat {

template <typename T>
class Scratch {
 public:
  /// Room for `size` elements of unspecified content; what was there before is lost.
  T* fit(size_t size) {
    if (size > capacity_) {
      capacity_ = std::max(size, 2 * capacity_);
      data_ = std::make_unique_for_overwrite<T[]>(capacity_);
    }
    return data_.get();
  }

  /// Room for `size` elements, all equal to `value`.
  T* fill(size_t size, T value) {
    std::fill_n(fit(size), size, value);
    return data_.get();
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](size_t index) { return data_[index]; }
  const T& operator[](size_t index) const { return data_[index]; }

 private:
  std::unique_ptr<T[]> data_;
  size_t capacity_ = 0;
};

}  // namespace pat
