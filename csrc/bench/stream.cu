// SPDX-License-Identifier: MIT
// Streams the unique K and V of a batch once, reads q and writes out: what attention cannot beat.
//
// One persistent launch; every block takes an equal, contiguous share of the pieces. Three ways to
// keep bytes in flight, each at several shapes, because none of them is best by reasoning alone:
//   registers  16-byte loads, unrolled
//   cp.async   a ring in shared memory in which every thread reads back what it has fetched itself
//   bulk       one copy a piece by the TMA unit into a ring, issued by a producer warp
// Every word is folded into an xor that `digest` receives and that the output waits for, so nothing
// can be left out; scripts/bench_floor.py compares the digest with the xor of the caches.
#include "stream.h"

namespace pat::bench {
namespace {

constexpr int kWarp = 32;
constexpr int kEarly = 2;  // vectors of q a thread reads before the stream, to hide their latency
constexpr int kBatch = 4;  // and that it copies at a time after it

struct Sum {
  uint32_t words = 0;

  __device__ __forceinline__ void add(const uint4& value) {
    words ^= value.x ^ value.y ^ value.z ^ value.w;
  }
};

/// Reads 16 bytes past L1, in whole 256-byte lines of L2: a piece is never shorter.
__device__ __forceinline__ uint4 load(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// This block's share [begin, end) of `count` things, in units of 2^`shift` of them.
__device__ __forceinline__ void share(int32_t count, int shift, int32_t& begin, int32_t& end) {
  const auto block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  const int32_t units = count >> shift, each = units / blocks, more = units - each * blocks;
  begin = (block * each + min(block, more)) << shift;
  end = begin + ((each + (block < more ? 1 : 0)) << shift);
}

/// This block's share of all vectors, in units of at most 256 bytes.
__device__ __forceinline__ void share_vectors(const StreamParams& params, int32_t& begin,
                                              int32_t& end) {
  share(params.num_pieces << params.piece_shift, min(params.piece_shift, 4), begin, end);
}

/// Where a vector of the stream lies: its slot, and the vector within a slot.
struct Place {
  int32_t slot, within;

  Place() = default;
  /// Of vector `at`, or of the last one before `end`: always safe to read.
  __device__ __forceinline__ Place(const StreamParams& params, int32_t at, int32_t end) {
    at = max(min(at, end - 1), 0);
    const int32_t piece = at >> params.piece_shift;
    const int32_t head = piece / params.num_slots;  // 0 if a piece is a whole slot
    within = (head << params.piece_shift) + at - (piece << params.piece_shift);
    slot = __ldg(params.slots + piece - head * params.num_slots);
  }

  __device__ __forceinline__ const uint4* k(const StreamParams& params) const {
    return params.k + slot * params.slot_stride + within;
  }
  __device__ __forceinline__ const uint4* v(const StreamParams& params) const {
    return params.v + slot * params.slot_stride + within;
  }
};

/// A thread's part of q: the first vectors are read early, the rest when the output is written.
struct Queries {
  uint4 early[kEarly];
  int64_t at, stride;

  __device__ __forceinline__ Queries(const StreamParams& params, int thread, int threads)
      : at(static_cast<int64_t>(blockIdx.x) * threads + thread),
        stride(static_cast<int64_t>(gridDim.x) * threads) {
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      if (at + i * stride < params.q_vectors) early[i] = load(params.q + at + i * stride);
    }
  }

  /// Writes q to out once the whole warp has read its K and V.
  __device__ __forceinline__ void write(const StreamParams& params, Sum sum, int thread,
                                        int threads) const {
    const uint32_t all = __reduce_xor_sync(0xffffffffu, sum.words);
    if (thread % kWarp == 0) params.digest[(blockIdx.x * threads + thread) / kWarp] = all;
    const uint32_t nothing = all & params.zero;  // a store that has to wait for every load
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      if (at + i * stride >= params.q_vectors) return;
      uint4 value = early[i];
      value.x ^= nothing;
      params.out[at + i * stride] = value;
    }
    for (int64_t first = at + kEarly * stride; first < params.q_vectors; first += kBatch * stride) {
      uint4 values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * stride < params.q_vectors) values[i] = load(params.q + first + i * stride);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * stride >= params.q_vectors) return;
        values[i].x ^= nothing;
        params.out[first + i * stride] = values[i];
      }
    }
  }
};

template <int kThreads, int kUnroll, int kBlocks>
struct Registers {
  static constexpr int kBlockThreads = kThreads, kBlocksPerSm = kBlocks, kSharedBytes = 0;

  static __device__ __forceinline__ void run(const StreamParams& params) {
    const int thread = threadIdx.x;
    const Queries queries(params, thread, kThreads);
    int32_t begin, end;
    share_vectors(params, begin, end);
    Sum sum;
    for (int32_t at = begin + thread; at < end; at += kThreads * kUnroll) {
      Place places[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) places[u] = Place(params, at + u * kThreads, end);
      uint4 k[kUnroll], v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        k[u] = v[u] = make_uint4(0, 0, 0, 0);
        if (at + u * kThreads < end) {
          k[u] = load(places[u].k(params));
          v[u] = load(places[u].v(params));
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sum.add(k[u]);
        sum.add(v[u]);
      }
    }
    queries.write(params, sum, thread, kThreads);
  }
};

template <int kThreads, int kStages, int kBlocks>
struct CpAsync {
  static constexpr int kBlockThreads = kThreads, kBlocksPerSm = kBlocks;
  static constexpr int kSharedBytes = kStages * kThreads * 2 * 16;

  static __device__ __forceinline__ void fetch(uint32_t to, const uint4* from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from)
                 : "memory");
  }

  /// Fetches K and V of a place if it is one, and closes the group in any case.
  static __device__ __forceinline__ void fetch_step(const StreamParams& params, uint32_t to,
                                                    const Place& place, bool valid) {
    if (valid) {
      fetch(to, place.k(params));
      fetch(to + kThreads * 16, place.v(params));
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  static __device__ __forceinline__ void run(const StreamParams& params) {
    extern __shared__ __align__(128) uint4 ring[];  // [kStages][2][kThreads]
    const int thread = threadIdx.x;
    const uint32_t mine = shared_address(ring + thread);
    int32_t begin, end;
    share_vectors(params, begin, end);
    begin += thread;
    // The slots of the first round are asked for at once: every fetch of it depends on all of them.
    Place first[kStages - 1];
    int32_t all = 0;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      first[s] = Place(params, begin + s * kThreads, end);
      all |= first[s].slot;
    }
    const int32_t limit = all < 0 ? begin : end;  // no slot is negative
    Place next(params, begin + (kStages - 1) * kThreads, end);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      fetch_step(params, mine + s * kThreads * 32, first[s], begin + s * kThreads < limit);
    }
    const Queries queries(params, thread, kThreads);
    Sum sum;
    int stage = 0, free = kStages - 1;
    for (int32_t at = begin; at < end; at += kThreads) {
      fetch_step(params, mine + free * kThreads * 32, next, at + (kStages - 1) * kThreads < end);
      next = Place(params, at + kStages * kThreads, end);
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
      sum.add(ring[stage * 2 * kThreads + thread]);
      sum.add(ring[(stage * 2 + 1) * kThreads + thread]);
      free = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    queries.write(params, sum, thread, kThreads);
  }
};

/// Barriers of the bulk ring.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t to, const uint4* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// `kThreads` threads consume; one more warp copies. Half of a stage is K, half is V.
template <int kThreads, int kStageBytes, int kStages, int kBlocks>
struct Bulk {
  static constexpr int kBlockThreads = kThreads + kWarp, kBlocksPerSm = kBlocks;
  static constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8);
  static constexpr int kHalf = kStageBytes / 2 / 16;  // vectors of K in a stage

  static __device__ __forceinline__ void run(const StreamParams& params) {
    extern __shared__ __align__(128) uint4 ring[];  // [kStages][2][kHalf], then barriers
    const int thread = threadIdx.x;
    const uint32_t data = shared_address(ring), full = data + kStages * kStageBytes;
    const uint32_t empty = full + kStages * 8;
    if (thread == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(full + s * 8, 1);
        barrier_init(empty + s * 8, kThreads / kWarp);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int32_t begin, end;
    share(params.num_pieces, 0, begin, end);
    const int step = kHalf >> params.piece_shift;  // pieces a stage
    if (thread >= kThreads) {
      produce(params, data, full, empty, begin, end, step, thread - kThreads);
      return;
    }
    const Queries queries(params, thread, kThreads);
    Sum sum;
    int stage = 0;
    uint32_t parity = 0;
    for (int32_t at = begin; at < end; at += step) {
      const int32_t pieces = min(end - at, step);
      barrier_wait(full + stage * 8, parity);
      const uint4* const k = ring + stage * 2 * kHalf;
      for (int i = thread; i < pieces << params.piece_shift; i += kThreads) {
        sum.add(k[i]);
        sum.add(k[kHalf + i]);
      }
      __syncwarp();
      if (thread % kWarp == 0) barrier_arrive(empty + stage * 8);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    queries.write(params, sum, thread, kThreads);
  }

  static __device__ __forceinline__ void produce(const StreamParams& params, uint32_t data,
                                                 uint32_t full, uint32_t empty, int32_t begin,
                                                 int32_t end, int step, int lane) {
    const uint32_t bytes = 16u << params.piece_shift;
    int stage = 0;
    uint32_t parity = 1;  // a fresh barrier lets the first round pass
    for (int32_t at = begin; at < end; at += step) {
      const int32_t pieces = min(end - at, step);
      barrier_wait(empty + stage * 8, parity);
      if (lane == 0) barrier_expect(full + stage * 8, 2 * pieces * bytes);
      __syncwarp();
      for (int i = lane; i < pieces; i += kWarp) {
        const Place place(params, (at + i) << params.piece_shift, INT32_MAX);
        const uint32_t to = data + stage * kStageBytes + i * bytes;
        copy_bulk(to, place.k(params), bytes, full + stage * 8);
        copy_bulk(to + kHalf * 16, place.v(params), bytes, full + stage * 8);
      }
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
};

template <typename Variant>
__global__ void __launch_bounds__(Variant::kBlockThreads, Variant::kBlocksPerSm)
    stream_kernel(const __grid_constant__ StreamParams params) {
  Variant::run(params);
}

template <typename Variant>
cudaError_t prepare() {
  return cudaFuncSetAttribute(stream_kernel<Variant>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Variant::kSharedBytes);
}

template <typename Variant>
cudaError_t launch(const StreamParams& params, int32_t num_sms, cudaStream_t stream) {
  const int32_t blocks = num_sms * Variant::kBlocksPerSm;
  if (blocks * Variant::kBlockThreads / kWarp > kMaxWarps) return cudaErrorInvalidConfiguration;
  stream_kernel<Variant><<<blocks, Variant::kBlockThreads, Variant::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

struct Entry {
  const char* name;
  cudaError_t (*prepare)();
  cudaError_t (*launch)(const StreamParams&, int32_t, cudaStream_t);
};

#define PAT_STREAM(name, ...) \
  Entry { name, prepare<__VA_ARGS__>, launch<__VA_ARGS__> }

/// Name: threads x what one has or shares in flight x blocks of an SM.
constexpr Entry kVariants[] = {
    PAT_STREAM("registers 256x4x4", Registers<256, 4, 4>),
    PAT_STREAM("registers 512x2x3", Registers<512, 2, 3>),
    PAT_STREAM("registers 512x4x2", Registers<512, 4, 2>),
    PAT_STREAM("registers 128x4x8", Registers<128, 4, 8>),
    PAT_STREAM("cp.async 128x8x6", CpAsync<128, 8, 6>),
    PAT_STREAM("cp.async 256x4x6", CpAsync<256, 4, 6>),
    PAT_STREAM("cp.async 256x8x3", CpAsync<256, 8, 3>),
    PAT_STREAM("cp.async 512x4x3", CpAsync<512, 4, 3>),
    PAT_STREAM("cp.async 512x6x2", CpAsync<512, 6, 2>),
    PAT_STREAM("cp.async 512x12x1", CpAsync<512, 12, 1>),
    PAT_STREAM("cp.async 1024x6x1", CpAsync<1024, 6, 1>),
    PAT_STREAM("bulk 128x16Kx12x1", Bulk<128, 16384, 12, 1>),
    PAT_STREAM("bulk 256x32Kx6x1", Bulk<256, 32768, 6, 1>),
    PAT_STREAM("bulk 128x16Kx6x2", Bulk<128, 16384, 6, 2>),
    PAT_STREAM("bulk 128x16Kx3x4", Bulk<128, 16384, 3, 4>),
};
#undef PAT_STREAM
constexpr int32_t kNumVariants = sizeof(kVariants) / sizeof(kVariants[0]);

}  // namespace

int32_t num_variants() { return kNumVariants; }

const char* variant_name(int32_t variant) { return kVariants[variant].name; }

cudaError_t prepare_stream() {
  for (const Entry& variant : kVariants) {
    const cudaError_t error = variant.prepare();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_stream(int32_t variant, const StreamParams& params, int32_t num_sms,
                          cudaStream_t stream) {
  return kVariants[variant].launch(params, num_sms, stream);
}

}  // namespace pat::bench
