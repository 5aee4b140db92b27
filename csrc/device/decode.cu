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

#if defined(PAT_PATH_SM90)

constexpr int kComputerRegisters = 176, kLoaderRegisters = 80;
static_assert(kHalves * kHalfThreads * (kComputerRegisters + kLoaderRegisters) <= 65536);

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::launch_dependents();  // the merge kernel waits for our end, but may be on its way
  prefetch_tables(params);
  const uint32_t address = ptx::shared_address(shared);
  const Tables tables{params.plan};
  const bool computes = threadIdx.x < kThreads / 2;
  if (computes) init_barriers(address);
  __syncthreads();
  if (computes) {
    ptx::raise_registers<kComputerRegisters>();
    Computer(params, tables, address).run();
  } else {
    ptx::lower_registers<kLoaderRegisters>();
    Loader(params, tables, address).run();
  }
}

#else

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ BlockShared block;
  prefetch_tables(params);
  const Tables tables{params.plan};
  drain_all(params, tables, ptx::shared_address(shared), block);
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
