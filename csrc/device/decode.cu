// SPDX-License-Identifier: MIT
// The forward kernel: persistent thread blocks over the work list of the plan, tile by tile.
//
// Grid: kBlocksPerSm blocks an SM, fixed, whatever the plan; counts come from the plan on the
// device, so a captured launch serves every later plan. A piece of work is (item, KV head), heads
// of one item side by side because their K and V lie side by side in memory. Wide tiles are computed
// by the whole block, the narrow one by every warp alone. Pieces are handed out by one atomic counter
// a tile, heaviest item first; which block computes a piece never changes its result.
#if defined(PAT_PATH_SM90)
#include "computer_sm90.cuh"
#include "loader_sm90.cuh"
#else
#include "attention_sm80.cuh"
#endif

namespace pat {
namespace {

/// Calls `stage` with every tile, in the order this block takes them.
/// Wide tiles are bound by tensor cores, narrow ones by memory. Where the wide ones fill the GPU, half
/// the blocks start with the narrow ones, so that the two overlap; a few wide pieces go first, so
/// that none of them is left to the end.
/// NOTE: the widest tile never comes after the one of 64 rows: on Hopper the halves of a block, which
/// part for that one, could not tell each other's barrier phases any more.
template <typename Stage>
__device__ __forceinline__ void for_each_tile(const DecodeParams& params, const Tables& tables,
                                              const Stage& stage) {
  static_assert(kNumTiles == 3, "every tile has its stage");
  const int32_t wide_pieces =
      (tables.header(kHeaderItemCount + 1) + tables.header(kHeaderItemCount + 2)) *
      params.num_kv_heads;
  const bool overlap = wide_pieces >= static_cast<int32_t>(gridDim.x) * kWorkers / 4 * 3;
  const bool wide_first = !overlap || blockIdx.x < gridDim.x / 2;
#pragma unroll 1
  for (int i = 0; i < kNumTiles; ++i) {
    switch (wide_first ? kNumTiles - 1 - i : (kNumTiles - i) % kNumTiles) {
      case 0:
        stage.template operator()<0>();
        break;
      case 1:
        stage.template operator()<1>();
        break;
      case 2:
        stage.template operator()<2>();
        break;
    }
  }
}

#if defined(PAT_PATH_SM90)

constexpr int kComputerRegisters = 176, kLoaderRegisters = 80;
static_assert(kHalves * kHalfThreads * (kComputerRegisters + kLoaderRegisters) <= 65536);

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  ptx::launch_dependents();  // the merge kernel waits for our end, but may be on its way
  const uint32_t address = ptx::shared_address(shared);
  if (threadIdx.x == 0) init_barriers(address);
  __syncthreads();
  const Tables tables{params.plan};
  if (threadIdx.x < kThreads / 2) {
    ptx::raise_registers<kComputerRegisters>();
    Computer computer(params, tables, address);
    for_each_tile(params, tables, [&]<int kTile>() { computer.drain<TileConfig<kTile>>(); });
  } else {
    ptx::lower_registers<kLoaderRegisters>();
    Loader loader(params, tables, address);
    loader.prefetch_plan();
    for_each_tile(params, tables, [&]<int kTile>() { loader.drain<TileConfig<kTile>>(); });
  }
}

#else

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Mailbox mailboxes[kWarps];
  __shared__ int32_t drawn;
  const Tables tables{params.plan};
  const uint32_t address = ptx::shared_address(shared);
  for_each_tile(params, tables, [&]<int kTile>() {
    drain<TileConfig<kTile>>(params, tables, address, mailboxes, drawn);
  });
}

#endif

}  // namespace

cudaError_t prepare_decode() {
  return cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

cudaError_t launch_decode(const DecodeParams& params, int32_t num_sms, cudaStream_t stream) {
  decode_kernel<<<num_sms * kBlocksPerSm, kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace pat
