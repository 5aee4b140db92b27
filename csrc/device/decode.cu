// SPDX-License-Identifier: MIT
// The forward kernel: persistent thread blocks over the plan's work list, largest tiles first.
//
// Grid: kBlocksPerSm blocks an SM, fixed, whatever the plan; counts come from the plan on the
// device, so a captured launch serves every later plan. A piece of work is (item, KV head), heads
// of one item side by side because their K and V lie side by side in memory. A block takes whole-
// block tiles until they run out, then splits into units of two warps, then of one. Pieces are
// handed out by one atomic counter a tile, heaviest item first; which unit computes a piece never
// changes its result.
#include "attention.cuh"

namespace pat {
namespace {

/// Computes pieces of one tile shape until none is left.
template <typename Config>
__device__ void drain(const DecodeParams& params, const Tables& tables, uint8_t* shared,
                      int32_t (&mailbox)[kWarps], bool all_units_free) {
  if (tables.header(kHeaderItemCount + Config::kTile) == 0) return;
  const int unit = threadIdx.x / Config::kUnitThreads;
  const bool leader = threadIdx.x % Config::kUnitThreads == 0;

  // In the first non-empty tile every unit is free: piece u goes to unit u without an atomic.
  // Later tiles find blocks busy, so every piece is drawn.
  auto draw = [&] {
    const int32_t drawn = atomicAdd(params.counters + Config::kTile, 1);
    return all_units_free ? drawn + static_cast<int32_t>(gridDim.x) * Config::kUnits : drawn;
  };
  auto share = [&](int32_t value) {
    if constexpr (Config::kUnitWarps == 1) {
      return __shfl_sync(0xffffffffu, value, 0);
    } else {
      if (leader) mailbox[unit] = value;
      unit_barrier<Config>(unit);
      const int32_t shared_value = mailbox[unit];
      unit_barrier<Config>(unit);
      return shared_value;
    }
  };

  ItemAttention<Config> attention(params, tables,
                                  ptx::shared_address(shared) + unit * Config::kSliceBytes);
  // Units of one block take pieces far apart at first, so that blocks finish evenly.
  int32_t piece = all_units_free ? static_cast<int32_t>(blockIdx.x + unit * gridDim.x)
                                 : share(leader ? draw() : 0);
  while (piece < tables.header(kHeaderItemCount + Config::kTile) * params.num_kv_heads) {
    const int32_t next = leader ? draw() : 0;  // its latency hides behind the item
    attention.run(piece);
    piece = share(next);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int32_t mailbox[kWarps];
  const Tables tables{params.plan};
  bool all_units_free = true;
  auto stage = [&]<int kTile>() {
    drain<TileConfig<kTile>>(params, tables, shared, mailbox, all_units_free);
    all_units_free &= tables.header(kHeaderItemCount + kTile) == 0;
    __syncthreads();  // the next tile divides the shared memory differently
  };
  stage.template operator()<3>();
  stage.template operator()<2>();
  stage.template operator()<1>();
  stage.template operator()<0>();
  static_assert(kNumTiles == 4, "every tile has its stage");
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
