// SPDX-License-Identifier: MIT
// tvm-ffi exports of the stream kernel and the checks on its tensors. Only benchmarks load this.
#include <cuda_runtime_api.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <bit>

#include "stream.h"

namespace {

using pat::bench::StreamParams;
using tvm::ffi::TensorView;

constexpr int64_t kVectorBytes = 16;

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(error);
  }
}

/// A dense tensor of the current CUDA device, in whole vectors.
void check(const TensorView& t, const char* name, int ndim, int bits) {
  bool dense = true;
  int64_t stride = 1;
  for (int i = t.ndim() - 1; i >= 0; --i) {
    dense &= t.size(i) <= 1 || t.stride(i) == stride;
    stride *= t.size(i);
  }
  if (t.device().device_type != kDLCUDA || t.ndim() != ndim || t.dtype().bits != bits || !dense ||
      reinterpret_cast<uintptr_t>(t.data_ptr()) % kVectorBytes != 0) {
    TVM_FFI_THROW(ValueError) << name << " must be a contiguous, aligned CUDA tensor of " << ndim
                              << " dimensions of " << bits << " bits";
  }
}

int64_t vectors(const TensorView& t, int first_dim) {
  int64_t elements = 1;
  for (int i = first_dim; i < t.ndim(); ++i) elements *= t.size(i);
  return elements * t.dtype().bits / 8 / kVectorBytes;
}

int32_t num_sms() {
  int device, count;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "reading the SM count");
  return count;
}

/// Reads the K and V of `slots` once, q once, and writes q to out. `by_head`: one head of all slots
/// after the other; otherwise slot after slot with all heads. See scripts/floor.py.
void stream(TensorView k, TensorView v, TensorView slots, TensorView q, TensorView out,
            TensorView digest, int64_t variant, bool by_head) {
  check(k, "k", 3, 16);
  check(v, "v", 3, 16);
  check(slots, "slots", 1, 32);
  check(q, "q", 3, 16);
  check(out, "out", 3, 16);
  check(digest, "digest", 1, 32);
  const int64_t piece = vectors(k, by_head ? 2 : 1);
  const int64_t pieces = slots.size(0) * (by_head ? k.size(1) : 1);
  if (piece < 1 || !std::has_single_bit(static_cast<uint64_t>(piece)) ||
      piece > int64_t{1} << pat::bench::kMaxPieceShift || pieces * piece > INT32_MAX / 2 ||
      digest.size(0) < pat::bench::kMaxWarps || variant < 0 ||
      variant >= pat::bench::num_variants() || vectors(v, 1) != vectors(k, 1) ||
      vectors(out, 0) != vectors(q, 0)) {
    TVM_FFI_THROW(ValueError) << "no stream of pieces of " << piece * kVectorBytes << " bytes";
  }
  if (pieces == 0) return;
  const StreamParams params{
      .k = static_cast<const uint4*>(k.data_ptr()),
      .v = static_cast<const uint4*>(v.data_ptr()),
      .slots = static_cast<const int32_t*>(slots.data_ptr()),
      .q = static_cast<const uint4*>(q.data_ptr()),
      .out = static_cast<uint4*>(out.data_ptr()),
      .digest = static_cast<uint32_t*>(digest.data_ptr()),
      .zero = 0,
      .slot_stride = vectors(k, 1),
      .q_vectors = vectors(q, 0),
      .num_slots = static_cast<int32_t>(slots.size(0)),
      .num_pieces = static_cast<int32_t>(pieces),
      .piece_shift = std::countr_zero(static_cast<uint64_t>(piece)),
  };
  const DLDevice device = k.device();
  auto* const on =
      static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  check_cuda(pat::bench::launch_stream(static_cast<int32_t>(variant), params, num_sms(), on),
             "launching the stream kernel");
}

/// To be called once, before anything is captured.
void prepare() { check_cuda(pat::bench::prepare_stream(), "raising the shared-memory limit"); }

int64_t num_variants() { return pat::bench::num_variants(); }

tvm::ffi::String variant_name(int64_t variant) {
  return pat::bench::variant_name(static_cast<int32_t>(variant));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(stream, stream);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_variants, num_variants);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(variant_name, variant_name);
