// SPDX-License-Identifier: MIT
// Warpgroup MMA of Hopper: m64 x n64 or n128 x k16, operands in 128-byte-swizzled panels.
// Shared-memory descriptors and instruction forms: PTX ISA, "Asynchronous warpgroup-level matrix
// instructions".
#pragma once

#include "config.cuh"

#if defined(PAT_PATH_SM90)

namespace pat::wgmma {

/// Low word of the descriptor of an operand that starts at `address`, to which offset() may be added.
/// Groups of 8 rows are 1024 bytes apart, panels kPanelBytes (read only where the operand is wider than
/// a panel and transposed: V).
__device__ __forceinline__ uint32_t descriptor(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint32_t{kPanelBytes >> 4} << 16;
}

/// To add to a descriptor so that it starts `bytes` later.
__device__ constexpr uint32_t offset(uint32_t bytes) { return bytes >> 4; }

/// Its high word, always the same: 128-byte swizzle, and the groups' distance.
inline constexpr uint32_t kDescriptorHigh = uint32_t{1} << 30 | uint32_t{1024 >> 4};

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving uses of an accumulator across a fence or a wait.
template <int kBlocks>
__device__ __forceinline__ void pin(float (&c)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}

#if defined(PAT_DTYPE_BF16)
#define PAT_WGMMA_TYPE "bf16.bf16"
#else
#define PAT_WGMMA_TYPE "f16.f16"
#endif

#define PAT_ACC4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])

/// c (64 x 64) = a b^T, or += when `accumulate`: a 64 x 16 in registers, b 64 x 16 in shared memory, d
/// fastest.
__device__ __forceinline__ void mma_scores(float (&c)[8][4], const uint32_t (&a)[4], uint32_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 d;\nsetp.ne.b32 p, %37, 0;\nmov.b64 d, {%36, %38};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." PAT_WGMMA_TYPE
      " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, d, p, 1, 1, 0;\n}\n"
      : PAT_ACC4(0), PAT_ACC4(1), PAT_ACC4(2), PAT_ACC4(3), PAT_ACC4(4), PAT_ACC4(5), PAT_ACC4(6),
        PAT_ACC4(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(accumulate)),
        "n"(kDescriptorHigh));
}

/// c (64 x 128) += a b: a 64 x 16 in registers, b 16 x 128 in shared memory, columns fastest.
__device__ __forceinline__ void mma_output(float (&c)[16][4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n.reg .b64 d;\nmov.b64 d, {%68, %69};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." PAT_WGMMA_TYPE
      " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, d, 1, 1, 1, 1;\n}\n"
      : PAT_ACC4(0), PAT_ACC4(1), PAT_ACC4(2), PAT_ACC4(3), PAT_ACC4(4), PAT_ACC4(5), PAT_ACC4(6),
        PAT_ACC4(7), PAT_ACC4(8), PAT_ACC4(9), PAT_ACC4(10), PAT_ACC4(11), PAT_ACC4(12),
        PAT_ACC4(13), PAT_ACC4(14), PAT_ACC4(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh));
}

/// The same for 64 columns.
__device__ __forceinline__ void mma_output(float (&c)[8][4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n.reg .b64 d;\nmov.b64 d, {%36, %37};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." PAT_WGMMA_TYPE
      " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, d, 1, 1, 1, 1;\n}\n"
      : PAT_ACC4(0), PAT_ACC4(1), PAT_ACC4(2), PAT_ACC4(3), PAT_ACC4(4), PAT_ACC4(5), PAT_ACC4(6),
        PAT_ACC4(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh));
}

#undef PAT_ACC4
#undef PAT_WGMMA_TYPE

}  // namespace pat::wgmma

#endif
