// Batches through masks: what registration.cpp calls. Free of torch, so that it can be tested and sanitised alone.
#pragma once

#include <cstdint>
#include <functional>

#include "plan.h"

namespace rtl_kernels {

// Runs body(begin, end) over parts of [0, count), on torch's threads.
using Parallel = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

// Rows [offsets[g], offsets[g + 1]) go through mask g - 1. A row is `inner` vectors for a linear layer, else one sample.
struct Batch {
  const int64_t* offsets;
  int64_t masks;
  const int64_t* order;  // or null
  int64_t samples;       // of x: row r reads sample order[r], or r mod samples (a gradient's other tensor has all rows)
  int64_t inner;
};

struct Masks {
  const uint32_t* words;
  int64_t mask_words;  // from one mask to the next
  int64_t row_words;
};

// y = act(s · op(x, m ⊙ w) + b + r). `weight_stride`, `scale_stride` and `bias_stride` lead from one mask's to the next; 0:
// shared. `x_sample`, `residual_row` and `y_row` lead from one sample (of `inner` vectors) to the next: tensors may be
// slices of channels.
template <class T>
struct Forward {
  const T* x;
  int64_t x_sample;
  const T* weight;
  int64_t weight_stride;
  const T* scale;  // or null
  int64_t scale_stride;
  const T* bias;  // or null
  int64_t bias_stride;
  const T* residual;  // or null; as y
  int64_t residual_row;
  bool relu;
  T* y;
  int64_t y_row;
};
template <class T>
void forward(const Plan& plan, const Batch& batch, const Masks& masks, const Forward<T>& call, const Parallel& parallel);

// dw += m ⊙ (∂op/∂w)ᵀ, into a zeroed tensor (a linear plan: into any), of a gather plan with `input` and (the gradient of) `output`. The one of the
// two with fewer samples than rows is read again for every mask.
template <class T>
struct GradWeight {
  const T* input;
  const T* output;
  T* dw;
  int64_t weight_stride;
  int64_t input_samples;
  int64_t output_samples;
};
template <class T>
void grad_weight(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
                 const Parallel& parallel);

// db[k][c] += Σ over rows and pixels of dy (rows, channels, pixels).
template <class T>
void grad_bias(const Batch& batch, const T* dy, int64_t channels, int64_t pixels, T* db, int64_t bias_stride);

// Batch normalisation of x (rows, channels, pixels) with one set of statistics for every mask's rows (none of which may be
// without mask: offsets[1] = 0); those of a mask without rows are left alone. Affine parameters are `affine_stride` apart
// from mask to mask, 0: shared.
template <class T>
struct BatchNorm {
  const T* x;
  int64_t channels, pixels;
  const T* weight;  // or null
  const T* bias;    // or null
  int64_t affine_stride;
  double eps;
  T* y;
  T* mean;         // (masks, channels), as are
  T* variance;     // unbiased
  T* inverse_std;  // 1 / √(biased variance + eps)
};
template <class T>
void batch_norm(const Batch& batch, const BatchNorm<T>& call, const Parallel& parallel);

// The same with fixed statistics: y = x · weight + bias, each mask's own.
template <class T>
void batch_norm_fixed(const Batch& batch, const BatchNorm<T>& call, const Parallel& parallel);

// dw and db (or null) are added to.
template <class T>
struct BatchNormGrad {
  const T* dy;
  const T* x;
  int64_t channels, pixels;
  const T* weight;  // or null
  int64_t affine_stride;
  const T* mean;
  const T* inverse_std;
  T* dx;
  T* dw;
  T* db;
};
template <class T>
void batch_norm_grad(const Batch& batch, const BatchNormGrad<T>& call, const Parallel& parallel);

}  // namespace rtl_kernels
