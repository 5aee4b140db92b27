// SPDX-License-Identifier: MIT
// The forward kernel: persistent thread blocks over the work list of the plan, tile by tile.
//
// Grid: kBlocksPerSm blocks an SM, fixed, whatever the plan; counts come from the plan on the
// device, so a captured launch serves every later plan. A piece of work is (item, KV head), heads
// of one item side by side because their K and V lie side by side in memory.
#if defined(PAT_PATH_SM90)
#include "computer_sm90.cuh"
#include "loader_sm90.cuh"
#else
#include "attention_sm80.cuh"
#endif
#include "launch.h"

namespace pat {
namespace {

/// By one thread of a block, off the way to the first K. Lets the merge kernel come to SMs that have
/// nothing left to do.
__device__ __forceinline__ void start(const DecodeParams& params) {
  if (blockIdx.x == 0) {
    // NOTE: the merge kernel reads it as it starts, which is after this block has let it.
    ptx::add_release(params.counters + kStarted, static_cast<int32_t>(gridDim.x) * kWriters);
    __threadfence();
  }
  ptx::launch_dependents();
}

/// By a warp that has written all of its output. To wait for the end of the grid instead would cost the
/// merge kernel a microsecond.
__device__ __forceinline__ void end(const DecodeParams& params) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::add_release(params.counters + kEnded, 1);
}

#if defined(PAT_PATH_SM90)

constexpr int kComputerRegisters = 176, kLoaderRegisters = 80;
static_assert(kHalves * kHalfThreads * (kComputerRegisters + kLoaderRegisters) <= 65536);

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t address = ptx::shared_address(shared);
  const Tables tables{params.plan};
  if (threadIdx.x < kThreads / 2) {
    init_barriers(address);
    ptx::named_barrier(0, kThreads);  // of the block; each role comes to it by a way of its own
    if (threadIdx.x == 0) start(params);
    ptx::raise_registers<kComputerRegisters>();
    Computer(params, tables, address).run();
    end(params);
  } else {
    prefetch_tables(params, threadIdx.x - kThreads / 2, kThreads / 2);
    ptx::named_barrier(0, kThreads);
    ptx::lower_registers<kLoaderRegisters>();
    Loader(params, tables, address).run();
  }
}

#else

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ BlockShared block;
  if (threadIdx.x == 0) start(params);
  prefetch_tables(params, threadIdx.x, kThreads);
  const Tables tables{params.plan};
  drain_all(params, tables, ptx::shared_address(shared), block);
  end(params);
}

#endif

}  // namespace

cudaError_t prepare_decode() {
  return cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

cudaError_t launch_decode(const DecodeParams& params, int32_t num_sms, cudaStream_t stream) {
  return launch(decode_kernel, num_sms * kBlocksPerSm, kThreads, kSharedBytes, Start::kInOrder,
                stream, params);
}

}  // namespace pat
