// The host's side of csrc/cuda/primitives.cuh: the same names, on simt.h. Included by that header alone.
#pragma once

#include <cmath>
#include <cstring>

#include "launch.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define RTL_DEVICE inline
#define RTL_HOST_DEVICE inline
#define RTL_UNROLL
#define RTL_UNROLL_TWICE

// Lanes meet only at the same call; helpers take their own line, since the lanes of a warp all come through them.
#define RTL_LINE int line = __builtin_LINE()

namespace rtl {



inline int thread_index() { return int(simt::thread_index()); }
inline int64_t block_index() { return simt::block_index(); }
inline unsigned char* shared_memory() { return simt::shared_memory(); }

inline void sync_block(RTL_LINE) { simt::sync_block(line); }
inline void sync_warp(RTL_LINE) { simt::sync_warp(0xFFFFFFFFu, line); }

namespace detail {
template <class T>
T shuffle_from(T value, int source, int line) {
  static_assert(sizeof(T) % 4 == 0, "whole registers");
  T result;
  for (size_t i = 0; i < sizeof(T) / 4; i++) {
    struct {
      uint32_t value;
      int32_t source;
    } in;
    std::memcpy(&in.value, reinterpret_cast<const unsigned char*>(&value) + 4 * i, 4);
    in.source = source;
    uint32_t out;
    simt::collective(simt::Collective::kShuffle, 0xFFFFFFFFu, line, &in, sizeof in, &out, sizeof out);
    std::memcpy(reinterpret_cast<unsigned char*>(&result) + 4 * i, &out, 4);
  }
  return result;
}
}  // namespace detail

template <class T>
T shuffle(T value, int source, RTL_LINE) {
  return detail::shuffle_from(value, source, line);
}
template <class T>
T shuffle_xor(T value, int bits, RTL_LINE) {
  return detail::shuffle_from(value, (thread_index() & 31) ^ bits, line);
}
template <class T>
T shuffle_up(T value, int delta, RTL_LINE) {
  const int lane = thread_index() & 31;
  return detail::shuffle_from(value, lane >= delta ? lane - delta : lane, line);
}
inline uint32_t ballot(bool vote, RTL_LINE) {
  const unsigned char in = vote;
  uint32_t out;
  simt::collective(simt::Collective::kBallot, 0xFFFFFFFFu, line, &in, 1, &out, sizeof out);
  return out;
}

inline int first_set(uint32_t bits) { return bits ? __builtin_ctz(bits) : -1; }

inline void copy_async_16(void* shared, const void* global, bool valid) {
  simt::copy_async(shared, global, 16, valid ? 16 : 0);
}
inline void copy_async_4(void* shared, const void* global, bool valid) {
  simt::copy_async(shared, global, 4, valid ? 4 : 0);
}
inline void copy_commit() { simt::copy_commit(); }
template <int N>
void copy_wait() {
  simt::copy_wait(N);
}

namespace detail {
inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, int line) {
  unsigned char in[17];
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("misaligned matrix row at line %d", line);
  for (int i = 0; i < 16; i++) in[i] = static_cast<const unsigned char*>(row)[i];
  in[16] = transposed;
  simt::collective(simt::Collective::kMatrixLoad, 0xFFFFFFFFu, line, in, sizeof in, out, sizeof out);
}
inline void multiply(simt::Collective kind, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  struct {
    uint32_t a[4], b[2];
    float c[4];
  } in;
  for (int i = 0; i < 4; i++) in.a[i] = a[i], in.c[i] = c[i];
  for (int i = 0; i < 2; i++) in.b[i] = b[i];
  simt::collective(kind, 0xFFFFFFFFu, line, &in, sizeof in, c, sizeof c);
}
}  // namespace detail

inline void load_matrices(uint32_t (&out)[4], const void* row, RTL_LINE) { detail::load_matrices(out, row, false, line); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row, RTL_LINE) {
  detail::load_matrices(out, row, true, line);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RTL_LINE) {
  detail::multiply(simt::Collective::kMmaF16, c, a, b, line);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RTL_LINE) {
  detail::multiply(simt::Collective::kMmaBf16, c, a, b, line);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], RTL_LINE) {
  detail::multiply(simt::Collective::kMmaTf32, c, a, b, line);
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Nearest, ties away from zero: cvt.rna.
inline uint32_t to_tf32(uint32_t bits) {
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & ~0x1FFFu;
}

struct alignas(16) Chunk {
  uint32_t word[4];
};
inline Chunk load_16(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16) simt::fail("misaligned 128-bit load");
  return *static_cast<const Chunk*>(global);
}

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};
inline float to_float(float value) { return value; }
inline float to_float(bf16_t value) { return bits_float(uint32_t(value.bits) << 16); }
inline float to_float(half_t value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float sign = value.bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24));
}
template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16_t from_float<bf16_t>(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {0x7FFF};
  return {uint16_t((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half_t from_float<half_t>(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return {0x7FFF};
  if (size >= 65520.f) return {uint16_t(sign | 0x7C00)};
  if (size < 6.103515625e-05f) return {uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(size, 24))))};
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [1/2, 1)
  const int mantissa = int(std::nearbyint(std::ldexp(fraction, 11)));
  return {uint16_t(sign | (((exponent + 13) << 10) + mantissa))};
}

template <class Kernel, class Arguments>
struct HostLaunch {
  Kernel kernel;
  const Arguments* arguments;
  static void enter(const void* self) {
    auto* launch = static_cast<const HostLaunch*>(self);
    launch->kernel(*launch->arguments);
  }
};

template <class Arguments>
int launch_kernel(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared, Stream, const Arguments& args) {
  if (simt::before_launch) simt::before_launch(reinterpret_cast<const void*>(kernel));
  HostLaunch<void (*)(Arguments), Arguments> launch{kernel, &args};
  simt::launch(&decltype(launch)::enter, &launch, blocks, threads, shared);
  return 0;
}

}  // namespace rtl
