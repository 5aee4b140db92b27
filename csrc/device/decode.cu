// SPDX-License-Identifier: MIT
// The forward kernel: persistent thread blocks over the work list of the plan, tile by tile.
//
// Grid: kBlocksPerSm blocks an SM, fixed, whatever the plan; counts come from the plan on the
// device, so a captured launch serves every later plan. A piece of work is (item, KV head), heads
// of one item side by side because their K and V lie side by side in memory. A block takes one tile
// after the other: the two wide ones by the whole block, the narrow one by every warp alone. Pieces are handed
// out by one atomic counter a tile, heaviest item first; which unit computes a piece never changes
// its result.
#include "attention.cuh"

namespace pat {
namespace {

/// Computes pieces of one tile shape until none is left.
template <typename Config>
__device__ void drain(const DecodeParams& params, const Tables& tables, uint8_t* shared,
                      Mailbox& mailbox, int32_t& drawn) {
  if (tables.header(kHeaderItemCount + Config::kTile) == 0) return;
  const bool leader = threadIdx.x % Config::kUnitThreads == 0;
  auto draw = [&] { return leader ? atomicAdd(params.counters + Config::kTile, 1) : 0; };
  auto share = [&](int32_t value) {
    if constexpr (Config::kWide) {
      if (leader) drawn = value;
      __syncthreads();
      const int32_t shared_value = drawn;
      __syncthreads();
      return shared_value;
    } else {
      return __shfl_sync(0xffffffffu, value, 0);
    }
  };

  ItemAttention<Config> attention(params, tables, ptx::shared_address(shared), mailbox);
  int32_t piece = share(draw());
  while (piece < tables.header(kHeaderItemCount + Config::kTile) * params.num_kv_heads) {
    piece = share(attention.run(piece, draw));
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Mailbox mailbox;
  __shared__ int32_t drawn;
  ptx::launch_dependents();  // the merge kernel waits for our end, but may be on its way
  const Tables tables{params.plan};
  auto stage = [&]<int kTile>() {
    drain<TileConfig<kTile>>(params, tables, shared, mailbox, drawn);
    __syncthreads();  // the next tile divides the shared memory differently
  };
  static_assert(kNumTiles == 3, "every tile has its stage");
  // Wide tiles are bound by tensor cores, narrow ones by memory. Where the wide ones fill the GPU, half
  // the blocks start with the narrow ones, so that the two overlap; a few wide pieces go first, so
  // that none of them is left to the end.
  const int32_t wide_pieces =
      (tables.header(kHeaderItemCount + 1) + tables.header(kHeaderItemCount + 2)) *
      params.num_kv_heads;
  const bool overlap = wide_pieces >= static_cast<int32_t>(gridDim.x / 4 * 3);
  const bool wide_first = !overlap || blockIdx.x < gridDim.x / 2;
#pragma unroll 1
  for (int i = 0; i < kNumTiles; ++i) {
    switch (wide_first ? kNumTiles - 1 - i : i) {
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
