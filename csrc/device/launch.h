// SPDX-License-Identifier: MIT
// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

namespace pat {

enum class Start {
  kInOrder,  // when the kernel before it in the stream has ended
  // On Hopper already when the blocks of that kernel have ended or let it (ptx::launch_dependents), as its
  // programmatic dependent. Every block must then wait for it itself (ptx::wait_for_previous_kernel)
  // before it reads what that kernel writes or writes what that one uses, and before it ends: the
  // next kernel of the stream waits for this one only.
  kEarly,
};

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 blocks, int threads, int shared_bytes,
                   Start start, cudaStream_t stream, Params... params) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
#if defined(PAT_PATH_SM90)
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = start == Start::kEarly ? 1 : 0;
#else
  static_cast<void>(start);  // Ampere has no such thing
#endif
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace pat
