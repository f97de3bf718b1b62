// Every kernel there is, by name: what launch.cu launches, what is compiled ahead of time, what the report lists.
//
// RTL_KERNELS(X) calls X(name, threads, bytes of shared memory, kernel) for each.
#pragma once

#include "depthwise.cuh"
#include "gemm.cuh"
#include "gemm_grad_weight.cuh"
#include "small_batch.cuh"
#include "summary.cuh"

namespace rtl {

// The two tile sizes. Ragged matrices, whose rows are not whole 16-byte chunks, and exact float32 use the small one.
template <class T, bool kTensor, bool kForward, bool kAligned>
using GemmSmall = Gemm<T, kTensor, kForward, kAligned, 64, 64, 32, sizeof(T) == 2 ? 3 : 2>;
template <class T, bool kForward>
using GemmLarge = Gemm<T, true, kForward, true, 128, 128, 64, sizeof(T) == 2 ? 3 : 2>;

}  // namespace rtl

#define RTL_GEMM(X, name, ...) X(name, (__VA_ARGS__::kThreads), (__VA_ARGS__::kShared), ::rtl::gemm<__VA_ARGS__>)
#define RTL_GEMM_TYPE(X, name, T, tensor)                                        \
  RTL_GEMM(X, "gemm_forward_" name, ::rtl::GemmSmall<T, tensor, true, true>)      \
  RTL_GEMM(X, "gemm_forward_" name "_ragged", ::rtl::GemmSmall<T, tensor, true, false>) \
  RTL_GEMM(X, "gemm_grad_input_" name, ::rtl::GemmSmall<T, tensor, false, true>)  \
  RTL_GEMM(X, "gemm_grad_input_" name "_ragged", ::rtl::GemmSmall<T, tensor, false, false>)
#define RTL_GEMM_LARGE(X, name, T)                                            \
  RTL_GEMM(X, "gemm_forward_" name "_large", ::rtl::GemmLarge<T, true>)       \
  RTL_GEMM(X, "gemm_grad_input_" name "_large", ::rtl::GemmLarge<T, false>)
#define RTL_GRAD_WEIGHT(X, name, ...) \
  X(name, (__VA_ARGS__::kThreads), (__VA_ARGS__::kShared), ::rtl::gemm_grad_weight<__VA_ARGS__>)
#define RTL_GRAD_WEIGHT_TYPE(X, name, T, tensor)                                  \
  RTL_GRAD_WEIGHT(X, "gemm_grad_weight_" name, ::rtl::GradWeight<T, tensor, true>) \
  RTL_GRAD_WEIGHT(X, "gemm_grad_weight_" name "_ragged", ::rtl::GradWeight<T, tensor, false>)
#define RTL_SMALL(X, name, kernel, ...) X(name, (__VA_ARGS__::kThreads), (__VA_ARGS__::kShared), kernel<__VA_ARGS__>)
#define RTL_STORED_TYPE(X, name, T)                                                                               \
  RTL_SMALL(X, "small_forward_" name, ::rtl::small_forward, ::rtl::SmallForward<T, true>)                         \
  RTL_SMALL(X, "small_forward_" name "_ragged", ::rtl::small_forward, ::rtl::SmallForward<T, false>)              \
  RTL_SMALL(X, "small_grad_input_" name, ::rtl::small_grad_input, ::rtl::SmallGradInput<T, true>)                 \
  RTL_SMALL(X, "small_grad_input_" name "_ragged", ::rtl::small_grad_input, ::rtl::SmallGradInput<T, false>)      \
  X("grad_bias_" name, ::rtl::kBiasThreads, ::rtl::kBiasShared, ::rtl::grad_bias<T>)                              \
  X("depthwise_forward_3x3_" name, ::rtl::kDepthwiseThreads, ::rtl::kDepthwiseShared, ::rtl::depthwise<T, true, 3>)     \
  X("depthwise_forward_" name, ::rtl::kDepthwiseThreads, ::rtl::kDepthwiseShared, ::rtl::depthwise<T, true, 0>)         \
  X("depthwise_grad_input_3x3_" name, ::rtl::kDepthwiseThreads, ::rtl::kDepthwiseShared, ::rtl::depthwise<T, false, 3>) \
  X("depthwise_grad_input_" name, ::rtl::kDepthwiseThreads, ::rtl::kDepthwiseShared, ::rtl::depthwise<T, false, 0>)     \
  X("depthwise_grad_weight_" name, ::rtl::kDepthwiseThreads, ::rtl::kDepthwiseGradShared, ::rtl::depthwise_grad_weight<T>)

#define RTL_KERNELS(X)                                   \
  RTL_GEMM_TYPE(X, "f32", float, false)                  \
  RTL_GEMM_TYPE(X, "tf32", float, true)                  \
  RTL_GEMM_TYPE(X, "f16", ::rtl::half_t, true)           \
  RTL_GEMM_TYPE(X, "bf16", ::rtl::bf16_t, true)          \
  RTL_GEMM_LARGE(X, "tf32", float)                       \
  RTL_GEMM_LARGE(X, "f16", ::rtl::half_t)                \
  RTL_GEMM_LARGE(X, "bf16", ::rtl::bf16_t)               \
  RTL_GRAD_WEIGHT_TYPE(X, "f32", float, false)           \
  RTL_GRAD_WEIGHT_TYPE(X, "tf32", float, true)           \
  RTL_GRAD_WEIGHT_TYPE(X, "f16", ::rtl::half_t, true)    \
  RTL_GRAD_WEIGHT_TYPE(X, "bf16", ::rtl::bf16_t, true)   \
  RTL_STORED_TYPE(X, "f32", float)                       \
  RTL_STORED_TYPE(X, "f16", ::rtl::half_t)               \
  RTL_STORED_TYPE(X, "bf16", ::rtl::bf16_t)              \
  X("tile_summary", ::rtl::kSummaryThreads, 0, ::rtl::tile_summary_kernel<::rtl::kSummaryThreads>)
