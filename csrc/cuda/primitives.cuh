// Every device primitive the kernels use, and nothing else: positions, barriers, shuffles, asynchronous copies, matrix
// loads, tensor-core multiplies, conversions, the launch. No other file in this folder contains PTX or an intrinsic.
//
// That is what lets g++ compile the same kernels: without nvcc these names come from tests/simt/primitives_host.h, which
// runs them on the CPU and checks how they are used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"

#if !defined(__CUDACC__)
#include "primitives_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RTL_DEVICE __device__ __forceinline__
#define RTL_HOST_DEVICE __host__ __device__ __forceinline__
#define RTL_UNROLL _Pragma("unroll")
#define RTL_UNROLL_TWICE _Pragma("unroll 2")

namespace rtl {

static_assert(sizeof(Stream) == sizeof(cudaStream_t), "the same pointer");

RTL_DEVICE int thread_index() { return int(threadIdx.x); }
RTL_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
RTL_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char rtl_shared[];
  return rtl_shared;
}

RTL_DEVICE void sync_block() { __syncthreads(); }
RTL_DEVICE void sync_warp() { __syncwarp(); }

// Collectives of the whole warp.
template <class T>
RTL_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(0xFFFFFFFFu, value, source);
}
template <class T>
RTL_DEVICE T shuffle_xor(T value, int bits) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, bits);
}
template <class T>
RTL_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xFFFFFFFFu, value, delta);
}
RTL_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }

// Index of the lowest set bit, −1 if there is none.
RTL_DEVICE int first_set(uint32_t bits) { return __ffs(int(bits)) - 1; }

// Asynchronous copies from global to shared memory; zeros where not valid (the address must exist even then). They are
// visible to the thread that issued them after copy_wait<N>() has left at most N committed groups open, and to others
// after a barrier that follows it.
RTL_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
RTL_DEVICE void copy_async_4(void* shared, const void* global, bool valid) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
RTL_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
RTL_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements; lane 8j + i gives the address of row i of matrix j (16 bytes). Register j of
// lane 4g + t is row g's elements 2t, 2t + 1 of matrix j, or of its transpose. Two 16-bit elements may as well be one
// of 32 bits, untransposed.
RTL_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}
RTL_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

// c (16 × 8) += a (16 × k) · b (k × 8), k = 16 for the 16-bit types and 8 for TF32. Lane 4g + t holds c[g][2t],
// c[g][2t + 1], c[g + 8][2t], c[g + 8][2t + 1].
#define RTL_MMA(name, shape, types)                                                                          \
  RTL_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                      \
    asm volatile("mma.sync.aligned." shape ".row.col." types                                                 \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                        \
  }
RTL_MMA(mma_f16, "m16n8k16", "f32.f16.f16.f32")
RTL_MMA(mma_bf16, "m16n8k16", "f32.bf16.bf16.f32")
RTL_MMA(mma_tf32, "m16n8k8", "f32.tf32.tf32.f32")
#undef RTL_MMA

RTL_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
RTL_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// Rounded to TF32's 10 bits of mantissa; the tensor core by itself would cut the rest off.
RTL_DEVICE uint32_t to_tf32(uint32_t bits) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
  return result;
}

// 16 bytes of read-only global memory in one load.
struct alignas(16) Chunk {
  uint32_t word[4];
};
RTL_DEVICE Chunk load_16(const void* global) {
  const uint4 v = __ldg(static_cast<const uint4*>(global));
  return {{v.x, v.y, v.z, v.w}};
}

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};
RTL_DEVICE float to_float(float value) { return value; }
RTL_DEVICE float to_float(half_t value) { return __half2float(__ushort_as_half(value.bits)); }
RTL_DEVICE float to_float(bf16_t value) { return __uint_as_float(uint32_t(value.bits) << 16); }
template <class T>
RTL_DEVICE T from_float(float value);
template <>
RTL_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
RTL_DEVICE half_t from_float<half_t>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
RTL_DEVICE bf16_t from_float<bf16_t>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// Returns a cudaError_t. More than 48 KiB of shared memory has to be asked for; that touches no stream.
template <class Arguments>
int launch_kernel(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared, Stream stream,
                  const Arguments& args) {
  if (shared > (48u << 10)) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return int(error);
  }
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, stream>>>(args);
  return int(cudaGetLastError());
}

}  // namespace rtl

#endif

// The one way to launch: returns from the enclosing function if it fails, and skips an empty grid.
#define RTL_LAUNCH(blocks, threads, shared, stream, args, ...)                                        \
  do {                                                                                                \
    const int64_t rtl_blocks = (blocks);                                                              \
    if (rtl_blocks > 0x7FFFFFFF) return kGridTooLarge;                                                \
    if (rtl_blocks > 0) {                                                                             \
      const int rtl_error = ::rtl::launch_kernel(__VA_ARGS__, rtl_blocks, threads, shared, stream, args); \
      if (rtl_error != 0) return rtl_error;                                                           \
    }                                                                                                 \
  } while (false)
