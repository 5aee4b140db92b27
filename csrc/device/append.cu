// SPDX-License-Identifier: MIT
// What a step does on the device before its layers, inside the graph: each row's new slot is
// appended to its tail in the snapshot, so that a step which keeps its plan launches nothing.
//
// One thread a row of the graph. Everything but addresses is read from the plan on the device, as a
// replay may find any plan there. A row that the fill kernel has brought up to its length already, in the
// same step, is left alone. One that cannot be served, as it has not grown by exactly one token or
// has outgrown its tail, is marked as the fill kernel marks it: its output is NaN until it is filled.
#include "element.cuh"
#include "launch.h"
#include "params.h"
#include "plan_layout.h"

namespace pat {
namespace {

constexpr int kAppendThreads = 128;

__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ AppendParams params) {
  const int32_t row = blockIdx.x * kAppendThreads + threadIdx.x;
  if (row >= params.rows || row >= params.plan[kHeaderRows]) return;
  const int32_t length = element(params.seq_lens, params.lens_are_64bit, row);
  const int32_t have = params.live_lens[row];
  if (length == have) return;
  static_assert(kTailWords == 4 && kTailSlot == 0 && kTailPosition == 1 && kTailCapacity == 2);
  const int32_t* tails = params.plan + params.plan[kHeaderOffTails];
  const int4 tail = reinterpret_cast<const int4*>(tails)[row];
  const int32_t position = have - tail.y;  // negative, too, of a row that is marked
  const bool fits = length == have + 1 && position >= 0 && position < tail.z;
  if (fits) {
    params.slots[tail.x + position] = element(params.new_slots, params.slots_are_64bit, row);
    params.filled[row] = length;
  }
  params.live_lens[row] = fits ? length : -1;
}

}  // namespace

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream) {
  const int32_t blocks = (params.rows + kAppendThreads - 1) / kAppendThreads;
  return launch(append_kernel, blocks, kAppendThreads, 0, Start::kInOrder, stream, params);
}

}  // namespace pat
