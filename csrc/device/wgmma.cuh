// SPDX-License-Identifier: MIT
// Warpgroup MMA of Hopper: m64 x n64 or n128 x k16, operands in 128-byte-swizzled panels.
// Shared-memory descriptors and instruction forms: PTX ISA, "Asynchronous warpgroup-level matrix
// instructions".
#pragma once

#include "config.cuh"

#if defined(PAT_PATH_SM90)

namespace pat::wgmma {

/// Descriptor of an operand that starts at `address`. Groups of 8 rows are 1024 bytes apart, panels
/// kPanelBytes (read only where the operand is wider than a panel and transposed: V).
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kPanelStride = uint64_t{kPanelBytes >> 4} << 16;
  return kSwizzle128 | kGroupStride | kPanelStride | ((address & 0x3ffff) >> 4);
}

/// To add to a descriptor so that it starts `bytes` later.
__device__ constexpr uint64_t offset(uint32_t bytes) { return bytes >> 4; }

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
__device__ __forceinline__ void mma_scores(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." PAT_WGMMA_TYPE
      " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
      : PAT_ACC4(0), PAT_ACC4(1), PAT_ACC4(2), PAT_ACC4(3), PAT_ACC4(4), PAT_ACC4(5), PAT_ACC4(6),
        PAT_ACC4(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

/// c (64 x 128) += a b: a 64 x 16 in registers, b 16 x 128 in shared memory, columns fastest.
__device__ __forceinline__ void mma_registers(float (&c)[16][4], const uint32_t (&a)[4],
                                              uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." PAT_WGMMA_TYPE
               " "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : PAT_ACC4(0), PAT_ACC4(1), PAT_ACC4(2), PAT_ACC4(3), PAT_ACC4(4), PAT_ACC4(5),
                 PAT_ACC4(6), PAT_ACC4(7), PAT_ACC4(8), PAT_ACC4(9), PAT_ACC4(10), PAT_ACC4(11),
                 PAT_ACC4(12), PAT_ACC4(13), PAT_ACC4(14), PAT_ACC4(15)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// The same for 64 columns.
__device__ __forceinline__ void mma_registers(float (&c)[8][4], const uint32_t (&a)[4],
                                              uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." PAT_WGMMA_TYPE
               " "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : PAT_ACC4(0), PAT_ACC4(1), PAT_ACC4(2), PAT_ACC4(3), PAT_ACC4(4), PAT_ACC4(5),
                 PAT_ACC4(6), PAT_ACC4(7)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef PAT_ACC4
#undef PAT_WGMMA_TYPE

}  // namespace pat::wgmma

#endif
