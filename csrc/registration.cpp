// The raw operators of the cpu backend (schemas: rtl_kernels/ops.py) under the CPU dispatch key.
//
// Through torch's stable ABI: it carries all we need (allocation, widening, torch's own threads), one build serves every
// torch from 2.10 on, and its headers compile in seconds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/operators.h"
#include "cpu/structure.h"

namespace rtl_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) torch::stable::parallel_for(0, count, 1, body);
}

Ints sizes(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// Not filled. What torch::stable::new_empty gives, without looking an operator up by its name.
Tensor empty(const Ints& size, ScalarType dtype) {
  Ints strides(size.size(), 1);
  for (size_t d = size.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, size[d]);
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, const Ints& size) { return empty(size, like.scalar_type()); }

Tensor zeros(const Tensor& like, const Ints& size) {
  Tensor tensor = empty(like, size);
  const size_t element = tensor.scalar_type() == ScalarType::Double ? sizeof(double) : sizeof(float);
  if (tensor.numel() > 0) std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * element);
  return tensor;
}

// float16 and bfloat16 are computed in float32.
Tensor widened(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const Tensor wide = dtype == ScalarType::Float || dtype == ScalarType::Double
                          ? tensor
                          : torch::stable::to(tensor, ScalarType::Float);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

Tensor narrowed(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// The route and the masks, checked: nothing is read out of bounds whatever these tensors hold.
struct Groups {
  Tensor words, offsets;
  std::optional<Tensor> order;
  Batch batch;
  Masks masks;

  Groups(const Tensor& words_, const Tensor& offsets_, const std::optional<Tensor>& order_, int64_t samples,
         int64_t repeat, int64_t rows, int64_t inner, int64_t lead, int64_t bits)
      : words(words_.is_contiguous() ? words_ : torch::stable::contiguous(words_)),
        offsets(offsets_.is_contiguous() ? offsets_ : torch::stable::contiguous(offsets_)),
        order(order_ && !order_->is_contiguous() ? torch::stable::contiguous(*order_) : order_) {
    STD_TORCH_CHECK(words.dim() == 3 && words.scalar_type() == ScalarType::Int && words.size(1) == lead &&
                        words.size(2) == (bits + 31) / 32,
                    "words do not fit the weight: expected int32 (K, ", lead, ", ", (bits + 31) / 32, ")");
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
                        offsets.size(0) == words.size(0) + 2,
                    "offsets do not fit the masks: expected int64 (", words.size(0) + 2, ",)");
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(at[0] == 0 && at[words.size(0) + 1] == rows, "offsets span rows ", at[0], " to ",
                    at[words.size(0) + 1], ", expected 0 to ", rows);
    for (int64_t g = 0; g <= words.size(0); ++g)
      STD_TORCH_CHECK(at[g] <= at[g + 1], "offsets fall from ", at[g], " to ", at[g + 1], ", expected them ascending");
    const int64_t* row = nullptr;
    if (order) {
      STD_TORCH_CHECK(repeat == 1 && order->scalar_type() == ScalarType::Long && order->dim() == 1 &&
                          order->size(0) == rows,
                      "order does not fit the batch: expected int64 (", rows, ",) and repeat 1");
      row = order->const_data_ptr<int64_t>();
      for (int64_t r = 0; r < rows; ++r)
        STD_TORCH_CHECK(row[r] >= 0 && row[r] < rows, "order holds ", row[r], ", but there are ", rows, " rows");
    }
    batch = {at, words.size(0), row, samples, inner};
    masks = {static_cast<const uint32_t*>(words.const_data_ptr()), words.size(1) * words.size(2), words.size(2)};
  }
};

struct Weight {
  Tensor tensor;
  int64_t stride;

  Weight(const Tensor& weight, bool untied)
      : tensor(widened(weight)), stride(untied ? weight.numel() / std::max<int64_t>(1, weight.size(0)) : 0) {}
};

void refuse_dense(const Groups& groups, bool untied) {
  STD_TORCH_CHECK(!untied || groups.batch.offsets[1] == 0,
                  "index holds -1 (no mask), but the weights are untied: expected 0..K-1");
}

// Elements from one sample to the next where each lies in one piece, as in a slice of channels; else -1.
int64_t sample_stride(const Tensor& tensor) {
  int64_t stride = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != stride) return -1;
    stride *= tensor.size(d);
  }
  return tensor.size(0) > 1 ? tensor.stride(0) : stride;
}

// What is done to the sums of an output row; all in the dtype they are made in.
struct After {
  std::optional<Tensor> scale, shift, residual;
  bool relu = false;
};

template <class T>
void run_forward(const Plan& plan, const Groups& groups, const Tensor& x, const Weight& weight, const After& after,
                 Tensor& y) {
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<T>() : nullptr; };
  const auto stride = [](const std::optional<Tensor>& t) { return t && t->dim() == 2 ? t->size(1) : 0; };
  Forward<T> call{};
  call.x = x.const_data_ptr<T>();
  call.x_sample = sample_stride(x);
  call.weight = weight.tensor.const_data_ptr<T>();
  call.weight_stride = weight.stride;
  call.scale = data(after.scale);
  call.scale_stride = stride(after.scale);
  call.bias = data(after.shift);
  call.bias_stride = stride(after.shift);
  call.residual = data(after.residual);
  call.residual_row = after.residual ? sample_stride(*after.residual) : 0;
  call.relu = after.relu;
  call.y = y.mutable_data_ptr<T>();
  call.y_row = sample_stride(y);
  forward<T>(plan, groups.batch, groups.masks, call, parallel);
}

void run_forward(const Plan& plan, const Groups& groups, const Tensor& x, const Weight& weight, const After& after,
                 Tensor& y) {
  if (y.numel() == 0) return;
  if (x.scalar_type() == ScalarType::Double)
    run_forward<double>(plan, groups, x, weight, after, y);
  else
    run_forward<float>(plan, groups, x, weight, after, y);
}

// y (rows, ...) of the plan; for a derivative over repeated samples, summed to (rows / repeat, ...).
Tensor apply(const Plan& plan, const Groups& groups, const Tensor& x, const Weight& weight,
             const std::optional<Tensor>& bias, const Ints& y_size, int64_t summed, ScalarType dtype) {
  const Tensor wide = widened(x);
  After after;
  if (bias) after.shift = widened(*bias);
  Ints rows_size = y_size;
  rows_size[0] *= summed;
  Tensor y = empty(wide, rows_size);
  run_forward(plan, groups, wide, weight, after, y);
  if (summed > 1) {
    Ints parts = y_size;
    parts.insert(parts.begin(), summed);
    const int64_t first = 0;
    y = torch::stable::sum(torch::stable::view(y, parts), torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
  }
  return narrowed(y, dtype);
}

// As the tensor if its samples lie in one piece each, else a copy; widened.
Tensor pieces(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const bool wide = dtype == ScalarType::Float || dtype == ScalarType::Double;
  return wide && sample_stride(tensor) >= 0 ? tensor : widened(tensor);
}

// y, of the plan's shape and in one piece a sample, is filled with what `masked_..._into` says (ops.py).
void apply_into(const Plan& plan, const Groups& groups, const Tensor& x, const Weight& weight, After after, Tensor y,
                const Ints& y_size, int64_t rows) {
  STD_TORCH_CHECK(sizes(y) == y_size && y.scalar_type() == x.scalar_type(),
                  "y does not fit the call: expected the result's shape and x's dtype");
  const ScalarType sums = weight.tensor.scalar_type();
  for (const std::optional<Tensor>& each : {after.scale, after.shift}) {
    if (!each) continue;
    STD_TORCH_CHECK(each->scalar_type() == sums && each->dim() <= 2 && each->dim() >= 1 &&
                        each->size(each->dim() - 1) == rows &&
                        (each->dim() == 1 || each->size(0) == groups.batch.masks),
                    "scale and shift do not fit the weight: expected (", rows, ",) or (", groups.batch.masks, ", ",
                    rows, ") in the dtype that sums are made in");
    STD_TORCH_CHECK(each->dim() == 1 || groups.batch.offsets[1] == 0,
                    "index holds -1 (no mask), but scale or shift is per mask: expected 0..K-1");
  }
  if (after.scale) after.scale = widened(*after.scale);
  if (after.shift) after.shift = widened(*after.shift);
  if (after.residual) {
    STD_TORCH_CHECK(sizes(*after.residual) == y_size && after.residual->scalar_type() == x.scalar_type(),
                    "residual does not fit the call: expected the result's shape and x's dtype");
    after.residual = pieces(*after.residual);
  }
  const Tensor wide = pieces(x);
  if (y.scalar_type() == sums && sample_stride(y) >= 0) {
    run_forward(plan, groups, wide, weight, after, y);
  } else {
    Tensor result = empty(wide, y_size);
    run_forward(plan, groups, wide, weight, after, result);
    torch::stable::copy_(y, result);
  }
}

template <class T>
void run_grad_weight(const Plan& plan, const Groups& groups, const Tensor& input, const Tensor& output, Tensor& dw,
                     int64_t stride) {
  GradWeight<T> call{input.const_data_ptr<T>(), output.const_data_ptr<T>(), dw.mutable_data_ptr<T>(), stride,
                     std::max<int64_t>(1, input.size(0)), std::max<int64_t>(1, output.size(0))};
  grad_weight<T>(plan, groups.batch, groups.masks, call, parallel);
}

template <class T>
void run_grad_bias(const Groups& groups, const Tensor& dy, int64_t channels, int64_t pixels, Tensor& db, bool untied) {
  grad_bias<T>(groups.batch, dy.const_data_ptr<T>(), channels, pixels, db.mutable_data_ptr<T>(),
               untied ? channels : 0);
}

// dw and db; `input` and `output` are the plan's, which for a transposed convolution are dy and x.
std::tuple<Tensor, Tensor> weight_gradients(const Plan& plan, const Groups& groups, const Tensor& input,
                                            const Tensor& output, const Tensor& dy, int64_t channels, int64_t pixels,
                                            const Ints& weight_size, bool untied, bool bias) {
  const ScalarType dtype = dy.scalar_type();
  const Tensor wide = widened(input), wide_output = widened(output);
  // That of a linear layer is filled whatever stands there.
  const bool run = wide.numel() > 0 && wide_output.numel() > 0;
  Tensor dw = run && plan.linear() ? empty(wide, weight_size) : zeros(wide, weight_size);
  const int64_t stride = untied ? dw.numel() / std::max<int64_t>(1, weight_size[0]) : 0;
  const bool is_double = wide.scalar_type() == ScalarType::Double;
  if (dw.numel() > 0 && run) {
    if (is_double)
      run_grad_weight<double>(plan, groups, wide, wide_output, dw, stride);
    else
      run_grad_weight<float>(plan, groups, wide, wide_output, dw, stride);
  }
  Ints db_size = bias ? (untied ? Ints{weight_size[0], channels} : Ints{channels}) : Ints{0};
  Tensor db = zeros(wide, db_size);
  if (bias && dy.numel() > 0) {
    const Tensor wide_dy = widened(dy);
    if (is_double)
      run_grad_bias<double>(groups, wide_dy, channels, pixels, db, untied);
    else
      run_grad_bias<float>(groups, wide_dy, channels, pixels, db, untied);
  }
  return {narrowed(dw, dtype), narrowed(db, dtype)};
}

// ---- linear

Plan linear_plan(bool scatter, int64_t rows, int64_t channels) {
  const int64_t one[2] = {1, 1};
  return make_plan(scatter, 1, rows, channels, {{1, 1}, {1, 1}, {0, 0}, {1, 1}, 1}, one, one);
}

int64_t inner_of(const Tensor& x) {
  int64_t inner = 1;
  for (int64_t d = 1; d + 1 < x.dim(); ++d) inner *= x.size(d);
  return inner;
}

// A forward call with its arguments checked.
struct Linear {
  const bool untied;
  const int64_t rows, channels;
  const Groups groups;
  const Plan plan;
  Ints y_size;

  Linear(const Tensor& x, const Tensor& weight, const Tensor& words, const Tensor& offsets,
         const std::optional<Tensor>& order, int64_t repeat)
      : untied(weight.dim() == 3),
        rows(weight.size(weight.dim() - 2)),
        channels(weight.size(weight.dim() - 1)),
        groups(words, offsets, order, x.size(0), repeat, x.size(0) * repeat, inner_of(x), rows, channels),
        plan(linear_plan(false, rows, channels)),
        y_size(sizes(x)) {
    STD_TORCH_CHECK(x.size(x.dim() - 1) == channels, "x has ", x.size(x.dim() - 1), " features, expected ", channels);
    refuse_dense(groups, untied);
    y_size[0] *= repeat;
    y_size.back() = rows;
  }
};

Tensor masked_linear(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                     int64_t repeat, std::optional<Tensor> bias) {
  const Linear call(x, weight, words, offsets, order, repeat);
  return apply(call.plan, call.groups, x, Weight(weight, call.untied), bias, call.y_size, 1, x.scalar_type());
}

void masked_linear_into(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                        int64_t repeat, std::optional<Tensor> scale, std::optional<Tensor> shift,
                        std::optional<Tensor> residual, bool relu, Tensor y) {
  const Linear call(x, weight, words, offsets, order, repeat);
  apply_into(call.plan, call.groups, x, Weight(weight, call.untied), {scale, shift, residual, relu}, y, call.y_size,
             call.rows);
}

Tensor masked_linear_grad_input(Tensor dy, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                                int64_t repeat) {
  const bool untied = weight.dim() == 3;
  const int64_t rows = weight.size(weight.dim() - 2), channels = weight.size(weight.dim() - 1);
  STD_TORCH_CHECK(dy.size(dy.dim() - 1) == rows, "dy has ", dy.size(dy.dim() - 1), " features, expected ", rows);
  const Groups groups(words, offsets, order, dy.size(0), 1, dy.size(0), inner_of(dy), rows, channels);
  refuse_dense(groups, untied);
  Ints x_size = sizes(dy);
  x_size[0] /= repeat;
  x_size.back() = channels;
  return apply(linear_plan(true, channels, rows), groups, dy, Weight(weight, untied), std::nullopt, x_size, repeat,
               dy.scalar_type());
}

std::tuple<Tensor, Tensor> masked_linear_grad_weight(Tensor dy, Tensor x, Tensor words, Tensor offsets,
                                                     std::optional<Tensor> order, int64_t repeat, Ints weight_size,
                                                     bool bias) {
  const bool untied = weight_size.size() == 3;
  const int64_t rows = weight_size[weight_size.size() - 2], channels = weight_size.back();
  STD_TORCH_CHECK(x.size(x.dim() - 1) == channels && dy.size(dy.dim() - 1) == rows && inner_of(x) == inner_of(dy) &&
                      dy.size(0) == x.size(0) * repeat,
                  "dy and x do not fit a weight of (", rows, ", ", channels, ")");
  const Groups groups(words, offsets, order, x.size(0), repeat, dy.size(0), inner_of(dy), rows, channels);
  return weight_gradients(linear_plan(false, rows, channels), groups, x, dy, dy, rows, 1, weight_size, untied, bias);
}

// ---- convolution and transposed convolution

struct Sizes {
  int64_t lead, second, kernel[2];
};

Sizes sizes_of(const Ints& weight) {
  const size_t n = weight.size();
  return {weight[n - 4], weight[n - 3], {weight[n - 2], weight[n - 1]}};
}

// The plan in which the weight's leading dimension is the output (gather) or the input (scatter).
Plan conv_plan(bool scatter, const Sizes& w, int64_t groups, const Ints& stride, const Ints& padding,
               const Ints& dilation, const int64_t (&in)[2], const int64_t (&out)[2]) {
  const Geometry geometry{{w.kernel[0], w.kernel[1]},
                          {stride[0], stride[1]},
                          {padding[0], padding[1]},
                          {dilation[0], dilation[1]},
                          groups};
  const int64_t lead = w.lead / groups;
  return make_plan(scatter, groups, scatter ? w.second : lead, scatter ? lead : w.second, geometry, in, out);
}

Groups conv_groups(const Tensor& words, const Tensor& offsets, const std::optional<Tensor>& order, int64_t samples,
                   int64_t repeat, int64_t rows, const Sizes& w) {
  return Groups(words, offsets, order, samples, repeat, rows, 1, w.lead, w.second * w.kernel[0] * w.kernel[1]);
}

void check_channels(const char* name, const Tensor& tensor, int64_t channels) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(1) == channels, name, " does not fit the weight: expected (N, ",
                  channels, ", H, W)");
}

// A forward call, of a plan that gathers or scatters, with its arguments checked.
struct Conv {
  const bool untied;
  const Sizes w;
  const int64_t rows;
  const Groups groups;
  Plan plan;
  Ints y_size;

  Conv(bool scatter, const Tensor& x, const Tensor& weight, const Tensor& words, const Tensor& offsets,
       const std::optional<Tensor>& order, int64_t repeat, const Ints& stride, const Ints& padding,
       const Ints& output_padding, const Ints& dilation, int64_t divisions)
      : untied(weight.dim() == 5),
        w(sizes_of(sizes(weight))),
        rows(scatter ? w.second * divisions : w.lead),
        groups(conv_groups(words, offsets, order, x.size(0), repeat, x.size(0) * repeat, w)) {
    check_channels("x", x, scatter ? w.lead : w.second * divisions);
    refuse_dense(groups, untied);
    const int64_t in[2] = {x.size(2), x.size(3)};
    int64_t out[2];
    for (int d = 0; d < 2; ++d) {
      const int64_t both = padding[2 * d] + padding[2 * d + 1], reach = dilation[d] * (w.kernel[d] - 1);
      out[d] = scatter ? (in[d] - 1) * stride[d] - both + reach + output_padding[d] + 1
                       : (in[d] + both - reach - 1) / stride[d] + 1;
    }
    plan = conv_plan(scatter, w, divisions, stride, {padding[0], padding[2]}, dilation, in, out);
    y_size = {x.size(0) * repeat, rows, out[0], out[1]};
  }
};

Tensor masked_conv2d(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                     int64_t repeat, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
                     int64_t groups) {
  const Conv call(false, x, weight, words, offsets, order, repeat, stride, padding, {}, dilation, groups);
  return apply(call.plan, call.groups, x, Weight(weight, call.untied), bias, call.y_size, 1, x.scalar_type());
}

void masked_conv2d_into(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                        int64_t repeat, std::optional<Tensor> scale, std::optional<Tensor> shift,
                        std::optional<Tensor> residual, bool relu, Tensor y, Ints stride, Ints padding, Ints dilation,
                        int64_t groups) {
  const Conv call(false, x, weight, words, offsets, order, repeat, stride, padding, {}, dilation, groups);
  apply_into(call.plan, call.groups, x, Weight(weight, call.untied), {scale, shift, residual, relu}, y, call.y_size,
             call.rows);
}

Tensor masked_conv2d_grad_input(Tensor dy, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                                int64_t repeat, Ints x_size, Ints stride, Ints padding, Ints dilation,
                                int64_t groups) {
  const bool untied = weight.dim() == 5;
  const Sizes w = sizes_of(sizes(weight));
  check_channels("dy", dy, w.lead);
  const Groups g = conv_groups(words, offsets, order, dy.size(0), 1, dy.size(0), w);
  refuse_dense(g, untied);
  const int64_t in[2] = {dy.size(2), dy.size(3)}, out[2] = {x_size[2], x_size[3]};
  const Plan plan = conv_plan(true, w, groups, stride, {padding[0], padding[2]}, dilation, in, out);
  return apply(plan, g, dy, Weight(weight, untied), std::nullopt, x_size, repeat, dy.scalar_type());
}

std::tuple<Tensor, Tensor> masked_conv2d_grad_weight(Tensor dy, Tensor x, Tensor words, Tensor offsets,
                                                     std::optional<Tensor> order, int64_t repeat, Ints weight_size,
                                                     bool bias, Ints stride, Ints padding, Ints dilation,
                                                     int64_t groups) {
  const bool untied = weight_size.size() == 5;
  const Sizes w = sizes_of(weight_size);
  check_channels("dy", dy, w.lead);
  check_channels("x", x, w.second * groups);
  const Groups g = conv_groups(words, offsets, order, x.size(0), repeat, dy.size(0), w);
  const int64_t in[2] = {x.size(2), x.size(3)}, out[2] = {dy.size(2), dy.size(3)};
  const Plan plan = conv_plan(false, w, groups, stride, {padding[0], padding[2]}, dilation, in, out);
  return weight_gradients(plan, g, x, dy, dy, w.lead, out[0] * out[1], weight_size, untied, bias);
}

Tensor masked_conv_transpose2d(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                               int64_t repeat, std::optional<Tensor> bias, Ints stride, Ints padding,
                               Ints output_padding, int64_t groups, Ints dilation) {
  const Conv call(true, x, weight, words, offsets, order, repeat, stride,
                  {padding[0], padding[0], padding[1], padding[1]}, output_padding, dilation, groups);
  return apply(call.plan, call.groups, x, Weight(weight, call.untied), bias, call.y_size, 1, x.scalar_type());
}

void masked_conv_transpose2d_into(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                                  int64_t repeat, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                  std::optional<Tensor> residual, bool relu, Tensor y, Ints stride, Ints padding,
                                  Ints output_padding, int64_t groups, Ints dilation) {
  const Conv call(true, x, weight, words, offsets, order, repeat, stride,
                  {padding[0], padding[0], padding[1], padding[1]}, output_padding, dilation, groups);
  apply_into(call.plan, call.groups, x, Weight(weight, call.untied), {scale, shift, residual, relu}, y, call.y_size,
             call.rows);
}

Tensor masked_conv_transpose2d_grad_input(Tensor dy, Tensor weight, Tensor words, Tensor offsets,
                                          std::optional<Tensor> order, int64_t repeat, Ints x_size, Ints stride,
                                          Ints padding, Ints /*output_padding*/, int64_t groups, Ints dilation) {
  const bool untied = weight.dim() == 5;
  const Sizes w = sizes_of(sizes(weight));
  check_channels("dy", dy, w.second * groups);
  const Groups g = conv_groups(words, offsets, order, dy.size(0), 1, dy.size(0), w);
  refuse_dense(g, untied);
  const int64_t in[2] = {dy.size(2), dy.size(3)}, out[2] = {x_size[2], x_size[3]};
  const Plan plan = conv_plan(false, w, groups, stride, padding, dilation, in, out);
  return apply(plan, g, dy, Weight(weight, untied), std::nullopt, x_size, repeat, dy.scalar_type());
}

std::tuple<Tensor, Tensor> masked_conv_transpose2d_grad_weight(Tensor dy, Tensor x, Tensor words, Tensor offsets,
                                                               std::optional<Tensor> order, int64_t repeat,
                                                               Ints weight_size, bool bias, Ints stride, Ints padding,
                                                               Ints /*output_padding*/, int64_t groups,
                                                               Ints dilation) {
  const bool untied = weight_size.size() == 5;
  const Sizes w = sizes_of(weight_size);
  check_channels("dy", dy, w.second * groups);
  check_channels("x", x, w.lead);
  // A gather whose input is dy and whose output is x.
  const Groups g = conv_groups(words, offsets, order, x.size(0), repeat, dy.size(0), w);
  const int64_t in[2] = {dy.size(2), dy.size(3)}, out[2] = {x.size(2), x.size(3)};
  const Plan plan = conv_plan(false, w, groups, stride, padding, dilation, in, out);
  return weight_gradients(plan, g, dy, x, dy, w.second * groups, in[0] * in[1], weight_size, untied, bias);
}

// ---- routes

// `rtl_kernels::route` (ops.py) for indices known to lie in -1..masks - 1: counted, then dealt out, so stable.
std::tuple<Tensor, Tensor, Tensor> group_rows(Tensor index, int64_t masks) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long && masks >= 1,
                  "index does not fit: expected int64 (batch,)");
  const Tensor from = index.is_contiguous() ? index : torch::stable::contiguous(index);
  const int64_t rows = from.numel();
  const int64_t* at = from.const_data_ptr<int64_t>();
  Tensor order = empty(from, {rows}), offsets = empty(from, {masks + 2}), ascending = empty(from, {rows});
  int64_t* const begin = offsets.mutable_data_ptr<int64_t>();
  std::fill(begin, begin + masks + 2, 0);
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(at[r] >= -1 && at[r] < masks, "index holds ", at[r], ", but there are ", masks, " masks");
    ++begin[at[r] + 2];
  }
  for (int64_t g = 0; g <= masks; ++g) begin[g + 1] += begin[g];
  Ints next(begin, begin + masks + 1);
  int64_t* const to = order.mutable_data_ptr<int64_t>();
  int64_t* const sorted = ascending.mutable_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = next[at[r] + 1]++;
    to[place] = r;
    sorted[place] = at[r];
  }
  return {order, offsets, ascending};
}

// ---- batch normalisation

struct NormShape {
  int64_t channels, pixels;
  Batch batch;

  NormShape(const Tensor& x, const Tensor& offsets) {
    STD_TORCH_CHECK(x.dim() >= 2, "x has ", x.dim(), " dimensions, expected at least 2");
    channels = x.size(1);
    pixels = 1;
    for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
    const int64_t masks = offsets.size(0) - 2;
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long && masks >= 1,
                    "offsets holds ", offsets.size(0), " entries, expected int64 (K + 2,)");
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(at[1] == 0, "index holds -1 (no mask), which per-ticket batch norm has no meaning for");
    for (int64_t g = 0; g <= masks; ++g)
      STD_TORCH_CHECK(at[g] <= at[g + 1], "offsets fall from ", at[g], " to ", at[g + 1], ", expected them ascending");
    STD_TORCH_CHECK(at[masks + 1] == x.size(0), "offsets span ", at[masks + 1], " rows, expected ", x.size(0));
    batch = {at, masks, nullptr, x.size(0), 1};
  }

  // (channels,), or with one for each mask (masks, channels).
  void check(const char* name, const Tensor& tensor, bool shared) const {
    STD_TORCH_CHECK((shared && sizes(tensor) == Ints{channels}) || sizes(tensor) == (Ints{batch.masks, channels}), name,
                    " does not fit x and offsets: expected (", batch.masks, ", ", channels, ")",
                    shared ? ", or the channels alone" : "");
  }
};

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <class T>
void run_batch_norm(const NormShape& shape, const Tensor& x, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, double eps, Tensor& y, Tensor& mean, Tensor& variance,
                    Tensor& inverse_std) {
  const bool own = weight && weight->dim() == 2;
  batch_norm<T>(shape.batch,
                {x.const_data_ptr<T>(), shape.channels, shape.pixels, data_or_null<T>(weight), data_or_null<T>(bias),
                 own ? shape.channels : 0, eps, y.mutable_data_ptr<T>(), mean.mutable_data_ptr<T>(),
                 variance.mutable_data_ptr<T>(), inverse_std.mutable_data_ptr<T>()},
                parallel);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> subset_batch_norm(Tensor x, std::optional<Tensor> weight,
                                                             std::optional<Tensor> bias, Tensor offsets, double eps) {
  const Tensor wide = widened(x), at = offsets.is_contiguous() ? offsets : torch::stable::contiguous(offsets);
  const NormShape shape(wide, at);
  for (int64_t g = 0; g < shape.batch.masks; ++g) {
    const int64_t rows = shape.batch.offsets[g + 2] - shape.batch.offsets[g + 1];
    STD_TORCH_CHECK(rows * shape.pixels != 1, "x has one value a channel for mask ", g, " (", rows, " sample, ",
                    shape.pixels, " pixel): expected more in training");
  }
  std::optional<Tensor> w, b;
  if (weight) w = widened(*weight), shape.check("weight", *w, true);
  if (bias) b = widened(*bias), shape.check("bias", *b, true);
  STD_TORCH_CHECK(!b || b->dim() == (w ? w->dim() : 1), "bias does not fit weight: expected as many dimensions");
  Tensor y = empty(wide, sizes(wide));
  const Ints statistics = {shape.batch.masks, shape.channels};
  Tensor mean = zeros(wide, statistics), variance = zeros(wide, statistics);
  Tensor inverse_std = zeros(wide, statistics);
  if (y.numel() > 0) {
    if (wide.scalar_type() == ScalarType::Double)
      run_batch_norm<double>(shape, wide, w, b, eps, y, mean, variance, inverse_std);
    else
      run_batch_norm<float>(shape, wide, w, b, eps, y, mean, variance, inverse_std);
  }
  return {narrowed(y, x.scalar_type()), mean, variance, inverse_std};
}

template <class T>
void run_batch_norm_fixed(const NormShape& shape, const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor& y) {
  BatchNorm<T> call{};
  call.x = x.const_data_ptr<T>();
  call.channels = shape.channels;
  call.pixels = shape.pixels;
  call.weight = scale.const_data_ptr<T>();
  call.bias = shift.const_data_ptr<T>();
  call.affine_stride = shape.channels;
  call.y = y.mutable_data_ptr<T>();
  batch_norm_fixed<T>(shape.batch, call, parallel);
}

// x · scale + shift (masks, channels), in the dtype that sums are made in, of each row's mask.
Tensor scale_rows(Tensor x, Tensor scale, Tensor shift, Tensor offsets) {
  const Tensor wide = widened(x), a = widened(scale), b = widened(shift);
  const Tensor at = offsets.is_contiguous() ? offsets : torch::stable::contiguous(offsets);
  const NormShape shape(wide, at);
  for (const Tensor* each : {&a, &b})
    STD_TORCH_CHECK(sizes(*each) == (Ints{shape.batch.masks, shape.channels}) &&
                        each->scalar_type() == wide.scalar_type(),
                    "scale and shift do not fit x: expected (", shape.batch.masks, ", ", shape.channels,
                    ") in the dtype that sums are made in");
  Tensor y = empty(wide, sizes(wide));
  if (y.numel() > 0) {
    if (wide.scalar_type() == ScalarType::Double)
      run_batch_norm_fixed<double>(shape, wide, a, b, y);
    else
      run_batch_norm_fixed<float>(shape, wide, a, b, y);
  }
  return narrowed(y, x.scalar_type());
}

template <class T>
void run_batch_norm_grad(const NormShape& shape, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight,
                         const Tensor& mean, const Tensor& inverse_std, Tensor& dx, Tensor& dw, Tensor& db) {
  const bool own = weight && weight->dim() == 2;
  batch_norm_grad<T>(shape.batch,
                     {dy.const_data_ptr<T>(), x.const_data_ptr<T>(), shape.channels, shape.pixels,
                      data_or_null<T>(weight), own ? shape.channels : 0, mean.const_data_ptr<T>(),
                      inverse_std.const_data_ptr<T>(), dx.mutable_data_ptr<T>(),
                      weight ? dw.mutable_data_ptr<T>() : nullptr, weight ? db.mutable_data_ptr<T>() : nullptr},
                     parallel);
}

std::tuple<Tensor, Tensor, Tensor> subset_batch_norm_grad(Tensor dy, Tensor x, std::optional<Tensor> weight,
                                                          Tensor offsets, Tensor mean, Tensor inverse_std,
                                                          double /*eps*/) {
  const Tensor wide = widened(x), wide_dy = widened(dy);
  const Tensor at = offsets.is_contiguous() ? offsets : torch::stable::contiguous(offsets);
  const NormShape shape(wide, at);
  STD_TORCH_CHECK(sizes(wide) == sizes(wide_dy), "dy is not of the shape of x");
  std::optional<Tensor> w;
  if (weight) w = widened(*weight), shape.check("weight", *w, true);
  Tensor dx = empty(wide, sizes(wide));
  const Ints affine = weight ? sizes(*weight) : Ints{0};
  Tensor dw = zeros(wide, affine), db = zeros(wide, affine);
  const Tensor m = widened(mean), inverse = widened(inverse_std);
  shape.check("mean", m, false);
  shape.check("inverse_std", inverse, false);
  if (dx.numel() > 0) {
    if (wide.scalar_type() == ScalarType::Double)
      run_batch_norm_grad<double>(shape, wide_dy, wide, w, m, inverse, dx, dw, db);
    else
      run_batch_norm_grad<float>(shape, wide_dy, wide, w, m, inverse, dx, dw, db);
  }
  return {narrowed(dx, x.scalar_type()), dw, db};
}

}  // namespace
}  // namespace rtl_kernels

STABLE_TORCH_LIBRARY_IMPL(rtl_kernels, CPU, m) {
#define RTL_IMPL(operation) m.impl(#operation "_cpu", TORCH_BOX(&rtl_kernels::operation))
  RTL_IMPL(masked_linear);
  RTL_IMPL(masked_linear_into);
  RTL_IMPL(masked_linear_grad_input);
  RTL_IMPL(masked_linear_grad_weight);
  RTL_IMPL(masked_conv2d);
  RTL_IMPL(masked_conv2d_into);
  RTL_IMPL(masked_conv2d_grad_input);
  RTL_IMPL(masked_conv2d_grad_weight);
  RTL_IMPL(masked_conv_transpose2d);
  RTL_IMPL(masked_conv_transpose2d_into);
  RTL_IMPL(masked_conv_transpose2d_grad_input);
  RTL_IMPL(masked_conv_transpose2d_grad_weight);
  RTL_IMPL(subset_batch_norm);
  RTL_IMPL(subset_batch_norm_grad);
#undef RTL_IMPL
}

// ---- what is no operator of a backend: what rtl_kernels/info.py tells of this library, how routes are sorted, rows scaled

namespace rtl_kernels {
namespace {

std::string cpu_level() { return level().name; }
std::vector<std::string> cpu_levels() { return available_levels(); }  // best first
int64_t cpu_cache_bytes() { return cached_bytes(); }
int64_t cpu_cache_limit() { return cache_limit(); }

}  // namespace
}  // namespace rtl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(rtl_kernels, m) {
  m.def("cpu_level() -> str");
  m.def("cpu_levels() -> str[]");
  m.def("cpu_cache_bytes() -> int");
  m.def("cpu_cache_limit() -> int");
  m.def("cpu_scale_rows(Tensor x, Tensor scale, Tensor shift, Tensor offsets) -> Tensor");
  m.def("cpu_group_rows(Tensor index, int num_masks) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rtl_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&rtl_kernels::cpu_level));
  m.impl("cpu_levels", TORCH_BOX(&rtl_kernels::cpu_levels));
  m.impl("cpu_cache_bytes", TORCH_BOX(&rtl_kernels::cpu_cache_bytes));
  m.impl("cpu_cache_limit", TORCH_BOX(&rtl_kernels::cpu_cache_limit));
  m.impl("cpu_scale_rows", TORCH_BOX(&rtl_kernels::scale_rows));
  m.impl("cpu_group_rows", TORCH_BOX(&rtl_kernels::group_rows));
}
