// SPDX-License-Identifier: MIT
// Elements of the arrays of a step, which the engine may keep in 32 or 64 bits.
#pragma once

#include "ptx.cuh"

namespace pat {

/// An element below 2^31 of an int32 or int64 array: of the latter, the low half.
__device__ __forceinline__ int32_t element(const void* array, bool is_64bit, int32_t index) {
  return ptx::load_l2(static_cast<const int32_t*>(array) + (is_64bit ? 2 * index : index));
}

}  // namespace pat
