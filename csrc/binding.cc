// SPDX-License-Identifier: MIT
// tvm-ffi exports of the kernels, and every check on a tensor. Nothing below this file knows
// tensors; nothing above it checks them again.
#include <cuda_runtime_api.h>
#if defined(PAT_PATH_SM90)
#include <cuda.h>  // types of tensor maps
#endif
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device/params.h"
#include "plan_layout.h"

namespace {

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Tensor;
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

/// A tensor's first element.
template <typename T = void>
T* data_of(const TensorView& t) {
  return static_cast<T*>(static_cast<void*>(static_cast<char*>(t.data_ptr()) + t.byte_offset()));
}

bool is_aligned(const TensorView& t) { return reinterpret_cast<uintptr_t>(data_of(t)) % 16 == 0; }

void check_aligned(const TensorView& t, const char* name) {
  if (!is_aligned(t)) TVM_FFI_THROW(ValueError) << name << " must be 16-byte aligned";
}

/// The same for every row of 16-bit elements.
void check_rows_aligned(const TensorView& t, const char* name) {
  check_aligned(t, name);
  if (t.stride(0) % 8 != 0) {
    TVM_FFI_THROW(ValueError) << name << " must be 16-byte aligned in every row, but the stride is "
                              << t.stride(0) << " elements";
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
    changed_ = before_ != device;
    if (changed_) check_cuda(cudaSetDevice(device), "changing the current device");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
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
  return encode(reinterpret_cast<CUtensorMap*>(&map), kType, 3, data_of(cache), sizes, strides, box,
                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
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
  if (q.size(1) == 0) TVM_FFI_THROW(ValueError) << "q must have heads, got " << shape_of(q);
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
  check_rows_aligned(q, "q");
  check_rows_aligned(out, "out");
  check_rows_aligned(k_cache, "k_cache");
  check_rows_aligned(v_cache, "v_cache");
  check_aligned(plan, "plan");  // 16 bytes of it are read at a time, of partial_out too
  check_aligned(partial_out, "partial_out");
  if (q.size(0) == 0) return true;

  const auto num_q_heads = static_cast<int32_t>(q.size(1));
  const auto num_kv_heads = static_cast<int32_t>(k_cache.size(1));
  pat::DecodeParams params{
      .k_map = {},
      .v_map = {},
      .has_maps = false,
      .q = data_of(q),
      .k_cache = data_of(k_cache),
      .v_cache = data_of(v_cache),
      .out = data_of(out),
      .plan = data_of<int32_t>(plan),
      .slots = data_of<int32_t>(slots),
      .live_lens = data_of<int32_t>(live_lens),
      .counters = data_of<int32_t>(counters),
      .partial_out = data_of<float>(partial_out),
      .partial_lse = data_of<float>(partial_lse),
      .q_row_stride = row_stride(q, "q"),
      .out_row_stride = row_stride(out, "out"),
      .k_slot_stride = 2u * static_cast<uint32_t>(row_stride(k_cache, "k_cache")),
      .v_slot_stride = 2u * static_cast<uint32_t>(row_stride(v_cache, "v_cache")),
      .plan_words = static_cast<int32_t>(plan.size(0)),
      .slot_words = static_cast<int32_t>(slots.size(0)),
      .live_words = static_cast<int32_t>(live_lens.size(0)),
      .rows_padded = static_cast<int32_t>(q.size(0)),
      .num_q_heads = num_q_heads,
      .num_kv_heads = pat::Divisor(num_kv_heads),
      .group_size = pat::Divisor(num_q_heads / num_kv_heads),
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

/// The buffers of one DecodePlanner, bound and checked once: a step passes only what changes.
class PlanBuffers {
 public:
  /// words, slots, filled, live_lens: of the plan, on its device. ring: int32 [buffers, words] on
  /// the host; pinned, or uploads are slow.
  PlanBuffers(Tensor words, Tensor slots, Tensor filled, Tensor live_lens, Tensor ring)
      : words_(std::move(words)),
        slots_(std::move(slots)),
        filled_(std::move(filled)),
        live_lens_(std::move(live_lens)),
        ring_(std::move(ring)),
        device_(words_.device()) {
    check(words_, "words", 1, kInt32, device_, 1);
    check(slots_, "slots", 1, kInt32, device_, 1);
    check(filled_, "filled", 1, kInt32, device_, 1);
    check(live_lens_, "live_lens", 1, kInt32, device_, 1);
    const DLDeviceType type = ring_.device().device_type;
    if (ring_.ndim() != 2 || !same(ring_.dtype(), kInt32) || !ring_.IsContiguous() ||
        (type != kDLCPU && type != kDLCUDAHost)) {
      TVM_FFI_THROW(ValueError) << "ring must be a contiguous 2-D int32 tensor on the host, got "
                                << tvm::ffi::DLDataTypeToString(ring_.dtype()) << " "
                                << shape_of(ring_) << " on device type " << type;
    }
    if (ring_.size(1) != words_.size(0) || words_.size(0) < pat::kHeaderWords ||
        words_.size(0) > INT32_MAX || live_lens_.size(0) != filled_.size(0)) {
      TVM_FFI_THROW(ValueError) << "the buffers do not fit each other: words " << shape_of(words_)
                                << ", ring " << shape_of(ring_) << ", live_lens "
                                << shape_of(live_lens_) << ", filled " << shape_of(filled_);
    }
    if (!is_aligned(words_) || !is_aligned(ring_) || words_.size(0) % 4 != 0) {
      TVM_FFI_THROW(ValueError) << "words and every buffer of the ring must be whole 16 bytes, "
                                   "16-byte aligned, but words has "
                                << words_.size(0) << " elements";
    }
    buffers_.resize(ring_.size(0));
  }

  /// Waits for the uploads: nobody else knows that the device reads the ring. Errors are ignored, as
  /// the driver may be gone at the end of a process.
  ~PlanBuffers() {
    for (const Buffer& buffer : buffers_) {
      if (buffer.read == nullptr) continue;
      cudaEventSynchronize(buffer.read);
      cudaEventDestroy(buffer.read);
    }
  }
  PlanBuffers(const PlanBuffers&) = delete;
  PlanBuffers& operator=(const PlanBuffers&) = delete;

  /// Waits until the device has read what was last uploaded from a buffer of the ring. Does not spoil a
  /// capture, which upload() then refuses: without a tensor there is no telling the current stream.
  void acquire(int64_t turn) {
    const Buffer& buffer = at(turn);
    if (buffer.read == nullptr) return;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "allowing a wait");
    const cudaError_t waited = cudaEventSynchronize(buffer.read);
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "forbidding it again");
    check_cuda(waited, "waiting for an upload");
  }

  /// Uploads the plan that lies in a buffer of the ring and gathers its slots. false: the device cannot
  /// read the buffer, the copy engine had to.
  bool upload(int64_t turn, TensorView seq_lens, TensorView req_to_token,
              TensorView req_pool_indices) {
    Buffer& buffer = at(turn);
    const int32_t* words = data_of<int32_t>(ring_) + turn * ring_.size(1);
    const int32_t count = words[pat::kHeaderWordCount], rows = words[pat::kHeaderRows];
    if (count < pat::kHeaderWords || count > words_.size(0) || rows < 0 || rows > filled_.size(0)) {
      TVM_FFI_THROW(ValueError) << "buffer " << turn
                                << " of the ring holds no plan that fits: " << count << " words, "
                                << rows << " rows";
    }
    auto* plan = data_of<int32_t>(words_);
    pat::FillParams params = step_params(rows, seq_lens, req_to_token, req_pool_indices);
    params.runs = plan + words[pat::kHeaderOffRuns];
    params.reps = plan + words[pat::kHeaderOffReps];
    params.tails = plan + words[pat::kHeaderOffTails];
    params.fresh = true;
    params.num_runs = words[pat::kHeaderRuns];

    const DeviceGuard guard(device_.device_id);
    const cudaStream_t stream = stream_of_step();
    prepare(buffer, words);
    const bool by_kernel = buffer.on_device != nullptr;
    rows_ = kBroken;  // until the launches have succeeded: the words may be neither plan's
    check_cuda(by_kernel ? pat::launch_upload(buffer.on_device, plan, count, stream)
                         : cudaMemcpyAsync(plan, words, sizeof(int32_t) * count,
                                           cudaMemcpyHostToDevice, stream),
               "uploading the plan");
    // NOTE: after the fill kernel, which between the two would not be the upload's dependent.
    const cudaError_t filled = pat::launch_fill(params, by_kernel, stream);
    check_cuda(cudaEventRecord(buffer.read, stream), "recording an upload");
    check_cuda(filled, "launching the fill kernel");
    tails_ = params.tails;
    rows_ = rows;
    return by_kernel;
  }

  /// Appends slots up to the true lengths, in a later step of the plan that was uploaded last.
  void append(TensorView seq_lens, TensorView req_to_token, TensorView req_pool_indices) {
    if (rows_ == kBroken) TVM_FFI_THROW(RuntimeError) << "the last upload failed: plan anew";
    pat::FillParams params = step_params(rows_, seq_lens, req_to_token, req_pool_indices);
    params.tails = tails_;
    if (rows_ == 0) return;
    const DeviceGuard guard(device_.device_id);
    check_cuda(pat::launch_fill(params, false, stream_of_step()), "launching the fill kernel");
  }

  /// Appends each row's one new slot, whatever plan there is when it runs: may be captured.
  void append_one(TensorView seq_lens, TensorView new_slots) {
    const bool lens_are_64bit = is_64bit(seq_lens, "seq_lens");
    const bool slots_are_64bit = is_64bit(new_slots, "new_slots");
    check(seq_lens, "seq_lens", 1, seq_lens.dtype(), device_, 1);
    check(new_slots, "new_slots", 1, new_slots.dtype(), device_, 1);
    if (seq_lens.size(0) != new_slots.size(0)) {
      TVM_FFI_THROW(ValueError) << "seq_lens has " << seq_lens.size(0) << " rows, new_slots "
                                << new_slots.size(0);
    }
    const pat::AppendParams params{
        .plan = data_of<int32_t>(words_),
        .slots = data_of<int32_t>(slots_),
        .filled = data_of<int32_t>(filled_),
        .live_lens = data_of<int32_t>(live_lens_),
        .seq_lens = data_of(seq_lens),
        .new_slots = data_of(new_slots),
        .lens_are_64bit = lens_are_64bit,
        .slots_are_64bit = slots_are_64bit,
        .rows = static_cast<int32_t>(std::min(seq_lens.size(0), filled_.size(0))),
    };
    if (params.rows == 0) return;
    const DeviceGuard guard(device_.device_id);
    check_cuda(pat::launch_append(params, current_stream(device_)), "launching the append kernel");
  }

 private:
  struct Buffer {
    cudaEvent_t read = nullptr;       // its last upload has been done; none before the first
    const void* on_device = nullptr;  // its address there, none: the copy engine must be used
  };

  Buffer& at(int64_t turn) {
    if (turn < 0 || turn >= static_cast<int64_t>(buffers_.size())) {
      TVM_FFI_THROW(ValueError) << "the ring has " << buffers_.size() << " buffers, not buffer "
                                << turn;
    }
    return buffers_[turn];
  }

  /// The stream of a step. Not one that is being captured: the launch has the plan's row count and
  /// table offsets in its arguments, a replay would fill a later plan by them.
  cudaStream_t stream_of_step() const {
    const cudaStream_t stream = current_stream(device_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether the stream is captured");
    if (status != cudaStreamCaptureStatusNone) {
      TVM_FFI_THROW(RuntimeError)
          << "plan() and advance() cannot be captured in a CUDA graph: call "
             "them before the capture and before every replay";
    }
    return stream;
  }

  /// Before the first upload from a buffer; the device is current.
  static void prepare(Buffer& buffer, const int32_t* words) {
    if (buffer.read != nullptr) return;
    check_cuda(cudaEventCreateWithFlags(&buffer.read, cudaEventDisableTiming), "making an event");
    void* address = nullptr;
    if (cudaHostGetDevicePointer(&address, const_cast<int32_t*>(words), 0) == cudaSuccess) {
      buffer.on_device = address;
    } else {
      cudaGetLastError();  // not mapped is no error of ours
    }
  }

  /// What every step passes, checked.
  pat::FillParams step_params(int32_t rows, const TensorView& seq_lens,
                              const TensorView& req_to_token, const TensorView& req_pool_indices) {
    check(req_to_token, "req_to_token", 2, kInt32, device_, 1);
    const bool indices_are_64bit = is_64bit(req_pool_indices, "req_pool_indices");
    const bool lens_are_64bit = is_64bit(seq_lens, "seq_lens");
    check(req_pool_indices, "req_pool_indices", 1, req_pool_indices.dtype(), device_, 1);
    check(seq_lens, "seq_lens", 1, seq_lens.dtype(), device_, 1);
    if (req_pool_indices.size(0) < rows || seq_lens.size(0) < rows) {
      TVM_FFI_THROW(ValueError) << "the plan has " << rows << " rows, but req_pool_indices has "
                                << req_pool_indices.size(0) << " and seq_lens " << seq_lens.size(0);
    }
    return {
        .runs = nullptr,
        .reps = nullptr,
        .tails = nullptr,
        .slots = data_of<int32_t>(slots_),
        .filled = data_of<int32_t>(filled_),
        .live_lens = data_of<int32_t>(live_lens_),
        .req_to_token = data_of<int32_t>(req_to_token),
        .req_pool_indices = data_of(req_pool_indices),
        .seq_lens = data_of(seq_lens),
        .req_to_token_stride = req_to_token.stride(0),
        .indices_are_64bit = indices_are_64bit,
        .lens_are_64bit = lens_are_64bit,
        .fresh = false,
        .rows = rows,
        .num_runs = 0,
    };
  }

  const Tensor words_, slots_, filled_, live_lens_,
      ring_;  // held: the device may be at work on them
  const DLDevice device_;
  std::vector<Buffer> buffers_;
  const int32_t* tails_ = nullptr;  // of the current plan
  static constexpr int32_t kBroken = -1;
  int32_t rows_ = 0;  // of the current plan; kBroken: there is none, an upload has failed
};

/// See pat_sglang/transfer.py, Transfer. Returns its functions for the bound buffers, in its order.
Array<Function> bind_plan(Tensor words, Tensor slots, Tensor filled, Tensor live_lens,
                          Tensor ring) {
  auto buffers = std::make_shared<PlanBuffers>(
      std::move(words), std::move(slots), std::move(filled), std::move(live_lens), std::move(ring));
  return {
      Function::FromTyped([buffers](int64_t turn) { buffers->acquire(turn); }),
      Function::FromTyped([buffers](int64_t turn, TensorView seq_lens, TensorView req_to_token,
                                    TensorView req_pool_indices) {
        return buffers->upload(turn, seq_lens, req_to_token, req_pool_indices);
      }),
      Function::FromTyped(
          [buffers](TensorView seq_lens, TensorView req_to_token, TensorView req_pool_indices) {
            buffers->append(seq_lens, req_to_token, req_pool_indices);
          }),
      Function::FromTyped([buffers](TensorView seq_lens, TensorView new_slots) {
        buffers->append_one(seq_lens, new_slots);
      }),
  };
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode, decode);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_plan, bind_plan);
