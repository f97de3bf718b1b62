// What the kernels in this folder compute and what they are given: plain C++, no torch, no CUDA header needed.
//
// Every function enqueues kernels on `stream` and returns at once: 0, a cudaError_t, or one of the errors below. Nothing
// here waits for the device or reads what is on it, so calls can be captured in a CUDA graph. Tested on an H200
// (sm_90); for other GPUs verified by compilation and by emulation on the CPU (tests/simt).
//
// All of them are deterministic, and what a row or a mask's own gradient comes to depends, bit for bit, only on that
// mask's rows in their order, the weight and the mask.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace rtl {

using Stream = ::CUstream_st*;

// How the elements are stored and multiplied. kF32 is exact float32; kTF32 is float32 multiplied on tensor cores with
// 10 bits of mantissa. All sums are made in float32.
enum class Type { kF32, kTF32, kF16, kBF16 };

constexpr int kGridTooLarge = -1;
constexpr int kUnsupported = -2;

// Which rows go through which mask, as in rtl_kernels/ops.py. Rows are those of dimension 0 of the batch.
struct Route {
  const int32_t* words = nullptr;    // (masks, rows of the mask, words_per_row): bits, little-endian
  const int64_t* offsets = nullptr;  // (masks + 2): rows [offsets[g], offsets[g + 1]) go through mask g − 1
  const int64_t* order = nullptr;    // (rows): row r is sample order[r]; null: sample r
  const uint32_t* summary = nullptr;  // what tile_summary makes of `words`, or null: then no tile is skipped
  int64_t masks = 0;
  int64_t rows = 0;           // rows of the route
  int64_t repeat = 1;         // 1, or `masks` with order null: row r is sample r mod (rows / repeat)
  int64_t mask_rows = 0;
  int64_t words_per_row = 0;
};

// y (rows, inner, out) = x (samples, inner, in) · (m ⊙ weight)ᵀ + bias, one mask a row; and its derivatives, where x
// and y stand for what the function reads and writes: dy -> dx, (dy, x) -> dw.
struct LinearArgs {
  Route route;
  const void* x = nullptr;       // forward: x. grad_input: dy. grad_weight: x
  const void* dy = nullptr;      // grad_weight only
  const void* weight = nullptr;  // (out, in), untied (masks, out, in); contiguous
  const void* bias = nullptr;    // (out), untied (masks, out), or null
  void* y = nullptr;             // forward: y. grad_input: dx. grad_weight: dw, shaped as weight
  void* db = nullptr;            // grad_weight: shaped as bias, or null
  int64_t inner = 1;
  int64_t in = 0, out = 0;
  int64_t x_stride = 0;          // elements from one of the rows · inner vectors to the next; within one they are dense
  int64_t dy_stride = 0;
  int64_t y_stride = 0;
  bool untied = false;
};

// Element strides of a 4-dimensional tensor: any layout, NCHW and channel-major among them.
struct Strides {
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// A depthwise convolution: output channel o reads channel o / multiplier; weight (channels · multiplier, 1, kh, kw),
// contiguous.
//
// A transposed convolution whose groups have one output channel each, `multiplier` inputs to an output, is the same
// with the roles exchanged, which `transposed` says (it decides who holds a sample once for all its repeats): its
// forward is grad_input, its grad_input is forward, its grad_weight is grad_weight with the input for dy and dy for x.
struct DepthwiseArgs {
  Route route;
  const void* x = nullptr;       // forward: x. grad_input: dy. grad_weight: x
  const void* dy = nullptr;      // grad_weight only
  const void* weight = nullptr;
  const void* bias = nullptr;    // one per channel of y, untied (masks, ...), or null
  void* y = nullptr;             // forward: y. grad_input: dx. grad_weight: dw, or null
  void* db = nullptr;            // grad_weight: per channel of dy, or null
  int64_t channels = 0, multiplier = 1;
  int64_t in_h = 0, in_w = 0, out_h = 0, out_w = 0;  // x's and y's planes, in forward's terms
  int kernel_h = 1, kernel_w = 1;
  int stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  Strides x_strides, dy_strides, y_strides;  // of the tensors of those names above
  bool untied = false;
  bool transposed = false;
  bool batch_inner = false;  // consecutive threads take consecutive samples: for channel-major (C, H, W, N) tensors
};

// summary (masks, ceil(mask_rows / 32), ceil(words_per_row / 32)): bit j of word (k, i, c) says whether mask k keeps
// anything in rows 32i.. and mask words 32c + j, a block of 32 × 32 weights.
int64_t tile_summary_words(int64_t masks, int64_t mask_rows, int64_t words_per_row);
int tile_summary(const Route& route, uint32_t* summary, Stream stream);

// Groups of at most kSmallRows rows · inner have kernels of their own, which need no summary.
constexpr int kSmallRows = 16;
int masked_linear(Type type, const LinearArgs& args, Stream stream);
int masked_linear_grad_input(Type type, const LinearArgs& args, Stream stream);
int masked_linear_grad_weight(Type type, const LinearArgs& args, Stream stream);

// kTF32 is the same as kF32 here: there is no tensor-core path. kUnsupported: more than kDepthwiseTaps weights a filter,
// or a plane of 2³¹ pixels.
constexpr int kDepthwiseTaps = 2048;
int masked_depthwise(Type type, const DepthwiseArgs& args, Stream stream);
int masked_depthwise_grad_input(Type type, const DepthwiseArgs& args, Stream stream);
int masked_depthwise_grad_weight(Type type, const DepthwiseArgs& args, Stream stream);

}  // namespace rtl
