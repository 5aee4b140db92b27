// SPDX-License-Identifier: MIT
// tvm-ffi exports of the kernels, and every check on a tensor. Nothing below this file knows
// tensors; nothing above it checks them again.
#include <cuda_runtime_api.h>
#if defined(PAT_PATH_SM90)
#include <cuda.h>  // types of tensor maps
#endif
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <mutex>
#include <string>

#include "device/params.h"
#include "plan_layout.h"

namespace {

using tvm::ffi::TensorView;

#if defined(PAT_DTYPE_BF16)
constexpr DLDataType kElement{kDLBfloat, 16, 1};
#else
constexpr DLDataType kElement{kDLFloat, 16, 1};
#endif
constexpr DLDataType kFloat{kDLFloat, 32, 1};
constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr int kMaxDevices = 64;

bool same(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

std::string shape_of(const TensorView& t) {
  std::string text = "[";
  for (int i = 0; i < t.ndim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

/// Dimensions, dtype, device and a dense innermost layout, with the offending value in the message.
void check(const TensorView& t, const char* name, int ndim, DLDataType dtype, DLDevice device,
           int dense_dims) {
  if (t.ndim() != ndim) {
    TVM_FFI_THROW(ValueError) << name << " must have " << ndim << " dimensions, got "
                              << shape_of(t);
  }
  if (!same(t.dtype(), dtype)) {
    TVM_FFI_THROW(ValueError) << name << " must be " << tvm::ffi::DLDataTypeToString(dtype)
                              << ", got " << tvm::ffi::DLDataTypeToString(t.dtype());
  }
  if (t.device().device_type != kDLCUDA || t.device().device_id != device.device_id) {
    TVM_FFI_THROW(ValueError) << name << " must be on cuda:" << device.device_id;
  }
  int64_t stride = 1;
  for (int i = ndim - 1; i >= ndim - dense_dims; --i) {
    if (t.size(i) > 1 && t.stride(i) != stride) {
      TVM_FFI_THROW(ValueError) << name << " must be contiguous in its last " << dense_dims
                                << " dimensions, but stride " << i << " is " << t.stride(i);
    }
    stride *= t.size(i);
  }
}

bool is_64bit(const TensorView& t, const char* name) {
  if (!same(t.dtype(), kInt32) && !same(t.dtype(), kInt64)) {
    TVM_FFI_THROW(ValueError) << name << " must be int32 or int64, got "
                              << tvm::ffi::DLDataTypeToString(t.dtype());
  }
  return same(t.dtype(), kInt64);
}

void check_aligned(const TensorView& t, const char* name, int64_t slot_stride) {
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0 || slot_stride % 8 != 0) {
    TVM_FFI_THROW(ValueError) << name << " must be 16-byte aligned in every row, but the stride is "
                              << slot_stride << " elements";
  }
}

/// Elements between rows of a tensor, which the kernels multiply in 32 bits.
int32_t row_stride(const TensorView& t, const char* name) {
  if (t.stride(0) < 0 || t.stride(0) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << name << " has a stride of " << t.stride(0)
                              << " elements between rows; at most 2^31 - 1 are supported";
  }
  return static_cast<int32_t>(t.stride(0));
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(error);
  }
}

cudaStream_t current_stream(DLDevice device) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

/// Makes a tensor's device the current one: the default stream belongs to whichever is current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check_cuda(cudaGetDevice(&before_), "reading the current device");
    if (before_ != device) check_cuda(cudaSetDevice(device), "changing the current device");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

/// SMs of the current device; the first call also prepares the kernels, before any capture.
int32_t num_sms(int32_t device) {
  static std::once_flag once[kMaxDevices];
  static int32_t count[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) TVM_FFI_THROW(ValueError) << "device " << device;
  std::call_once(once[device], [device] {
    check_cuda(cudaDeviceGetAttribute(&count[device], cudaDevAttrMultiProcessorCount, device),
               "reading the SM count");
    check_cuda(pat::prepare_decode(), "raising the shared-memory limit");
  });
  return count[device];
}

#if defined(PAT_PATH_SM90)
/// Map of a cache for the copy engine, in the layout of the kernel's ring: rows of 64 elements, their
/// 16-byte chunks swizzled over 128 bytes. false: the driver has none to give.
bool encode_map(const TensorView& cache, pat::TensorMap& map) {
  static_assert(sizeof(pat::TensorMap) == sizeof(CUtensorMap));
  static const auto encode = []() -> decltype(&cuTensorMapEncodeTiled) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &status);
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) return nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  if (encode == nullptr || cache.size(0) == 0) return false;
#if defined(PAT_DTYPE_BF16)
  constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
#else
  constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
#endif
  const cuuint64_t sizes[3] = {PAT_HEAD_DIM, static_cast<cuuint64_t>(cache.size(1)),
                               static_cast<cuuint64_t>(cache.size(0))};
  const cuuint64_t strides[2] = {2 * PAT_HEAD_DIM, 2 * static_cast<cuuint64_t>(cache.stride(0))};
  const cuuint32_t box[3] = {pat::kMapElements, 1, pat::kMapTokens};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(reinterpret_cast<CUtensorMap*>(&map), kType, 3, cache.data_ptr(), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#endif

/// See pat_sglang/decode.py. false: the driver made no tensor maps, every slot was copied by itself.
bool decode(TensorView q, TensorView k_cache, TensorView v_cache, TensorView out, TensorView plan,
            TensorView slots, TensorView live_lens, TensorView partial_out, TensorView partial_lse,
            TensorView counters, double sm_scale) {
  const DLDevice device = q.device();
  check(q, "q", 3, kElement, device, 2);
  check(out, "out", 3, kElement, device, 2);
  check(k_cache, "k_cache", 3, kElement, device, 2);
  check(v_cache, "v_cache", 3, kElement, device, 2);
  check(plan, "plan", 1, kInt32, device, 1);
  check(slots, "slots", 1, kInt32, device, 1);
  check(live_lens, "live_lens", 1, kInt32, device, 1);
  check(partial_out, "partial_out", 3, kFloat, device, 3);
  check(partial_lse, "partial_lse", 2, kFloat, device, 2);
  check(counters, "counters", 1, kInt32, device, 1);
  if (q.size(2) != PAT_HEAD_DIM) {
    TVM_FFI_THROW(ValueError) << "q must be [rows, heads, " << PAT_HEAD_DIM << "], got "
                              << shape_of(q);
  }
  for (int i = 0; i < 3; ++i) {
    if (out.size(i) != q.size(i) || v_cache.size(i) != k_cache.size(i)) {
      TVM_FFI_THROW(ValueError) << "out must be shaped like q, v_cache like k_cache: q "
                                << shape_of(q) << ", out " << shape_of(out) << ", k_cache "
                                << shape_of(k_cache) << ", v_cache " << shape_of(v_cache);
    }
  }
  if (k_cache.size(2) != q.size(2) || k_cache.size(1) == 0 || q.size(1) % k_cache.size(1) != 0) {
    TVM_FFI_THROW(ValueError) << "q " << shape_of(q) << " does not fit k_cache "
                              << shape_of(k_cache);
  }
  if (partial_out.size(1) != q.size(1) || partial_out.size(2) != q.size(2) ||
      partial_lse.size(0) != partial_out.size(0) || partial_lse.size(1) != q.size(1)) {
    TVM_FFI_THROW(ValueError) << "the plan was made for another geometry: q " << shape_of(q)
                              << ", partial_out " << shape_of(partial_out);
  }
  if (counters.size(0) < pat::kNumTiles) TVM_FFI_THROW(ValueError) << "counters is too short";
  check_aligned(q, "q", q.stride(0));
  check_aligned(out, "out", out.stride(0));
  check_aligned(k_cache, "k_cache", k_cache.stride(0));
  check_aligned(v_cache, "v_cache", v_cache.stride(0));
  if (q.size(0) == 0) return true;

  const auto num_q_heads = static_cast<int32_t>(q.size(1));
  const auto num_kv_heads = static_cast<int32_t>(k_cache.size(1));
  pat::DecodeParams params{
      .k_map = {},
      .v_map = {},
      .has_maps = false,
      .q = q.data_ptr(),
      .k_cache = k_cache.data_ptr(),
      .v_cache = v_cache.data_ptr(),
      .out = out.data_ptr(),
      .plan = static_cast<const int32_t*>(plan.data_ptr()),
      .slots = static_cast<const int32_t*>(slots.data_ptr()),
      .live_lens = static_cast<const int32_t*>(live_lens.data_ptr()),
      .counters = static_cast<int32_t*>(counters.data_ptr()),
      .partial_out = static_cast<float*>(partial_out.data_ptr()),
      .partial_lse = static_cast<float*>(partial_lse.data_ptr()),
      .q_row_stride = row_stride(q, "q"),
      .out_row_stride = row_stride(out, "out"),
      .k_slot_stride = 2u * static_cast<uint32_t>(row_stride(k_cache, "k_cache")),
      .v_slot_stride = 2u * static_cast<uint32_t>(row_stride(v_cache, "v_cache")),
      .plan_words = static_cast<int32_t>(plan.size(0)),
      .slot_words = static_cast<int32_t>(slots.size(0)),
      .live_words = static_cast<int32_t>(live_lens.size(0)),
      .rows_padded = static_cast<int32_t>(q.size(0)),
      .num_q_heads = num_q_heads,
      .num_kv_heads = num_kv_heads,
      .group_size = num_q_heads / num_kv_heads,
      .scale_log2 = static_cast<float>(sm_scale * 1.4426950408889634),
  };
  const DeviceGuard guard(device.device_id);
#if defined(PAT_PATH_SM90)
  params.has_maps = encode_map(k_cache, params.k_map) && encode_map(v_cache, params.v_map);
#endif
  const int32_t sms = num_sms(device.device_id);
  const cudaStream_t stream = current_stream(device);
  check_cuda(pat::launch_decode(params, sms, stream), "launching the forward kernel");
  const cudaError_t merged = pat::launch_merge(params, sms, stream);
  if (merged != cudaSuccess) {  // it would have reset the counters of the launch before it
    cudaMemsetAsync(params.counters, 0, sizeof(int32_t) * pat::kNumTiles, stream);
    check_cuda(merged, "launching the merge kernel");
  }
#if defined(PAT_PATH_SM90)
  return params.has_maps || k_cache.size(0) == 0;
#else
  return true;  // this path copies every slot by itself
#endif
}

/// See pat_sglang/plan.py, DecodePlanner._fill.
void fill(TensorView plan, TensorView slots, TensorView filled, TensorView live_lens,
          TensorView req_to_token, TensorView req_pool_indices, TensorView seq_lens, int64_t rows,
          int64_t runs) {
  const DLDevice device = plan.device();
  check(plan, "plan", 1, kInt32, device, 1);
  check(slots, "slots", 1, kInt32, device, 1);
  check(filled, "filled", 1, kInt32, device, 1);
  check(live_lens, "live_lens", 1, kInt32, device, 1);
  check(req_to_token, "req_to_token", 2, kInt32, device, 1);
  const bool indices_are_64bit = is_64bit(req_pool_indices, "req_pool_indices");
  const bool lens_are_64bit = is_64bit(seq_lens, "seq_lens");
  check(req_pool_indices, "req_pool_indices", 1, req_pool_indices.dtype(), device, 1);
  check(seq_lens, "seq_lens", 1, seq_lens.dtype(), device, 1);
  if (req_pool_indices.size(0) < rows || seq_lens.size(0) < rows || filled.size(0) < rows) {
    TVM_FFI_THROW(ValueError) << "the plan has " << rows << " rows, but req_pool_indices has "
                              << req_pool_indices.size(0) << " and seq_lens " << seq_lens.size(0);
  }
  if (rows == 0) return;
  const pat::FillParams params{
      .plan = static_cast<const int32_t*>(plan.data_ptr()),
      .slots = static_cast<int32_t*>(slots.data_ptr()),
      .filled = static_cast<int32_t*>(filled.data_ptr()),
      .live_lens = static_cast<int32_t*>(live_lens.data_ptr()),
      .req_to_token = static_cast<const int32_t*>(req_to_token.data_ptr()),
      .req_pool_indices = req_pool_indices.data_ptr(),
      .seq_lens = seq_lens.data_ptr(),
      .req_to_token_stride = req_to_token.stride(0),
      .indices_are_64bit = indices_are_64bit,
      .lens_are_64bit = lens_are_64bit,
      .rows = static_cast<int32_t>(rows),
      .runs = static_cast<int32_t>(runs),
  };
  const DeviceGuard guard(device.device_id);
  check_cuda(pat::launch_fill(params, current_stream(device)), "launching the fill kernel");
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fill, fill);
