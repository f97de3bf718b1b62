// The raw operators of the cuda backend (schemas: rtl_kernels/ops.py): from torch's tensors to the kernels of csrc/cuda.
//
// Through torch's stable ABI, like registration.cpp. Only the tensors' shapes are looked at, never their values: that
// would wait for the device, and a call can be captured in a CUDA graph. Built with RTL_EMULATED it serves the same
// kernels on the CPU, on the emulator of tests/simt, under another name (RTL_BACKEND).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

#if defined(RTL_EMULATED)
#define RTL_KEY CPU
#else
#define RTL_KEY CUDA
#define RTL_BACKEND "cuda"
// What the kernels were compiled for, as "80,90": read by rtl_kernels/backends/cuda.py.
extern "C" __attribute__((visibility("default"))) const char rtl_cuda_architectures[] = RTL_CUDA_ARCHITECTURES;
#endif

namespace rtl_kernels {
namespace {

using rtl::DepthwiseArgs;
using rtl::LinearArgs;
using rtl::Route;
using rtl::Stream;
using rtl::Strides;
using rtl::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Where kernels are enqueued: on the tensor's device, in torch's current stream.
#if defined(RTL_EMULATED)
struct Queue {
  explicit Queue(const Tensor&) {}
  Stream stream = nullptr;
};
#else
struct Queue {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit Queue(const Tensor& tensor) : guard(tensor.get_device()), stream(nullptr) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &current));
    stream = static_cast<Stream>(current);
  }
};
#endif

void check(int error, const char* operation) {
  STD_TORCH_CHECK(error != rtl::kGridTooLarge, operation, " would take more blocks than a GPU's grid holds");
  STD_TORCH_CHECK(error != rtl::kUnsupported, operation, " is given more than ", rtl::kDepthwiseTaps,
                  " weights a filter, or a plane of 2^31 pixels");
  STD_TORCH_CHECK(error == 0, operation, " failed with CUDA error ", error);
}

Ints sizes(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// In the order of its shape.
Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Type type_of(const Tensor& tensor, bool tf32) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return tf32 ? Type::kTF32 : Type::kF32;
    case ScalarType::Half: return Type::kF16;
    case ScalarType::BFloat16: return Type::kBF16;
    default: STD_TORCH_CHECK(false, "x has a dtype other than float32, float16 and bfloat16");
  }
}

// The route and the masks, and the memory that holds them. The kernels bound what offsets and order hold.
struct Groups {
  Tensor words, offsets;
  std::optional<Tensor> order, summary;
  Route route;

  Groups(const Tensor& words_, const Tensor& offsets_, const std::optional<Tensor>& order_, int64_t rows,
         int64_t repeat, int64_t lead, int64_t bits)
      : words(dense(words_)), offsets(dense(offsets_)) {
    STD_TORCH_CHECK(words.dim() == 3 && words.scalar_type() == ScalarType::Int && words.size(1) == lead &&
                        words.size(2) == (bits + 31) / 32,
                    "words do not fit the weight: expected int32 (K, ", lead, ", ", (bits + 31) / 32, ")");
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
                        offsets.size(0) == words.size(0) + 2,
                    "offsets do not fit the masks: expected int64 (", words.size(0) + 2, ",)");
    STD_TORCH_CHECK(repeat == 1 || (repeat == words.size(0) && !order_),
                    "repeat is ", repeat, ", expected 1, or the number of masks and no order");
    if (order_) {
      order = dense(*order_);
      STD_TORCH_CHECK(order->dim() == 1 && order->scalar_type() == ScalarType::Long && order->size(0) == rows,
                      "order does not fit the batch: expected int64 (", rows, ",)");
    }
    route.words = static_cast<const int32_t*>(words.const_data_ptr());
    route.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
    route.order = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
    route.masks = words.size(0);
    route.rows = rows;
    route.repeat = repeat;
    route.mask_rows = lead;
    route.words_per_row = words.size(2);
  }

  // Lets matrix products skip tiles in which a mask keeps nothing. It is read off the words at every call, a bit for
  // every weight and mask, so that it follows their changes.
  void summarise(Stream stream) {
    const Ints count{rtl::tile_summary_words(route.masks, route.mask_rows, route.words_per_row)};
    if (count[0] == 0) return;
    summary = torch::stable::new_empty(words, count);
    auto* to = static_cast<uint32_t*>(summary->mutable_data_ptr());
    check(tile_summary(route, to, stream), "tile_summary");
    route.summary = to;
  }
};

// ---- linear

// (B, ..., n) as vectors of n elements, `stride` elements apart.
struct Vectors {
  Tensor tensor;
  int64_t inner = 1, stride;

  explicit Vectors(const Tensor& given)
      : tensor(given.dim() == 2 && given.stride(1) == 1 ? given : dense(given)),
        stride(given.dim() == 2 ? tensor.stride(0) : tensor.size(tensor.dim() - 1)) {
    for (int64_t d = 1; d + 1 < tensor.dim(); ++d) inner *= tensor.size(d);
  }
  int64_t samples() const { return tensor.size(0); }
  int64_t size() const { return tensor.size(tensor.dim() - 1); }
};

LinearArgs linear_args(const Groups& groups, const Vectors& x, int64_t in, int64_t out, bool untied) {
  LinearArgs args;
  args.route = groups.route;
  args.x = x.tensor.const_data_ptr();
  args.x_stride = x.stride;
  args.inner = x.inner;
  args.in = in, args.out = out;
  args.untied = untied;
  return args;
}

Tensor masked_linear(Tensor x_, Tensor weight_, Tensor words, Tensor offsets, std::optional<Tensor> order,
                     int64_t repeat, std::optional<Tensor> bias_, bool tf32) {
  const bool untied = weight_.dim() == 3;
  const int64_t out = weight_.size(weight_.dim() - 2), in = weight_.size(weight_.dim() - 1);
  const Vectors x(x_);
  STD_TORCH_CHECK(x.size() == in, "x has ", x.size(), " features, expected ", in);
  const Queue queue(x_);
  Groups groups(words, offsets, order, x.samples() * repeat, repeat, out, in);
  if (groups.route.rows * x.inner > rtl::kSmallRows) groups.summarise(queue.stream);
  Ints y_size = sizes(x_);
  y_size[0] *= repeat;
  y_size.back() = out;
  Tensor y = torch::stable::new_empty(x_, y_size);
  const Tensor weight = dense(weight_);
  std::optional<Tensor> bias;
  if (bias_) bias = dense(*bias_);
  LinearArgs args = linear_args(groups, x, in, out, untied);
  args.weight = weight.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.y_stride = out;
  check(rtl::masked_linear(type_of(x_, tf32), args, queue.stream), "masked_linear");
  return y;
}

Tensor masked_linear_grad_input(Tensor dy_, Tensor weight_, Tensor words, Tensor offsets, std::optional<Tensor> order,
                                int64_t repeat, bool tf32) {
  const bool untied = weight_.dim() == 3;
  const int64_t out = weight_.size(weight_.dim() - 2), in = weight_.size(weight_.dim() - 1);
  const Vectors dy(dy_);
  STD_TORCH_CHECK(dy.size() == out, "dy has ", dy.size(), " features, expected ", out);
  const Queue queue(dy_);
  Groups groups(words, offsets, order, dy.samples(), repeat, out, in);
  if (groups.route.rows * dy.inner > rtl::kSmallRows || repeat > 1) groups.summarise(queue.stream);
  Ints x_size = sizes(dy_);
  x_size[0] /= repeat;
  x_size.back() = in;
  Tensor dx = torch::stable::new_empty(dy_, x_size);
  const Tensor weight = dense(weight_);
  LinearArgs args = linear_args(groups, dy, in, out, untied);
  args.weight = weight.const_data_ptr();
  args.y = dx.mutable_data_ptr();
  args.y_stride = in;
  check(rtl::masked_linear_grad_input(type_of(dy_, tf32), args, queue.stream), "masked_linear_grad_input");
  return dx;
}

std::tuple<Tensor, Tensor> masked_linear_grad_weight(Tensor dy_, Tensor x_, Tensor words, Tensor offsets,
                                                     std::optional<Tensor> order, int64_t repeat, Ints weight_size,
                                                     bool bias, bool tf32) {
  const bool untied = weight_size.size() == 3;
  const int64_t out = weight_size[weight_size.size() - 2], in = weight_size.back();
  const Vectors dy(dy_), x(x_);
  STD_TORCH_CHECK(x.size() == in && dy.size() == out && x.inner == dy.inner && dy.samples() == x.samples() * repeat,
                  "dy and x do not fit a weight of (", out, ", ", in, ")");
  const Queue queue(dy_);
  Groups groups(words, offsets, order, dy.samples(), repeat, out, in);
  groups.summarise(queue.stream);
  Tensor dw = torch::stable::new_empty(dy_, weight_size);
  Tensor db = torch::stable::new_empty(dy_, bias ? (untied ? Ints{weight_size[0], out} : Ints{out}) : Ints{0});
  LinearArgs args = linear_args(groups, x, in, out, untied);
  args.dy = dy.tensor.const_data_ptr();
  args.dy_stride = dy.stride;
  args.y = dw.mutable_data_ptr();
  args.db = bias ? db.mutable_data_ptr() : nullptr;
  check(rtl::masked_linear_grad_weight(type_of(dy_, tf32), args, queue.stream), "masked_linear_grad_weight");
  return {dw, db};
}

// ---- depthwise convolution, and transposed convolution with one output channel a group

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Whether samples, not pixels, are neighbours in memory: (C, H, W, N).
bool channel_major(const Tensor& t) { return t.size(0) > 1 && t.stride(0) == 1 && t.stride(3) != 1; }

// A convolution of `channels` inputs; `weight` is its weight's size. x and y are the planes in forward's terms.
DepthwiseArgs depthwise_args(const Groups& groups, const Ints& weight, int64_t channels, const Ints& stride,
                             const Ints& pad, const Ints& dilation, int64_t in_h, int64_t in_w, int64_t out_h,
                             int64_t out_w) {
  const size_t n = weight.size();
  STD_TORCH_CHECK(weight[n - 3] == 1 && channels > 0 && weight[n - 4] % channels == 0,
                  "weight has ", weight[n - 4], " filters of ", weight[n - 3],
                  " channels, expected filters of one channel, a whole number for each of ", channels);
  DepthwiseArgs args;
  args.route = groups.route;
  args.channels = channels;
  args.multiplier = weight[n - 4] / channels;
  args.in_h = in_h, args.in_w = in_w, args.out_h = out_h, args.out_w = out_w;
  args.kernel_h = int(weight[n - 2]), args.kernel_w = int(weight[n - 1]);
  args.stride_h = int(stride[0]), args.stride_w = int(stride[1]);
  args.pad_top = int(pad[0]), args.pad_left = int(pad[1]);
  args.dilation_h = int(dilation[0]), args.dilation_w = int(dilation[1]);
  args.untied = n == 5;
  return args;
}

Groups conv_groups(const Tensor& words, const Tensor& offsets, const std::optional<Tensor>& order, int64_t rows,
                   int64_t repeat, const Ints& weight) {
  const size_t n = weight.size();
  return {words, offsets, order, rows, repeat, weight[n - 4], weight[n - 3] * weight[n - 2] * weight[n - 1]};
}

// args.x -> args.y, by forward or by grad_input.
void convolve(bool scatter, DepthwiseArgs args, const Tensor& from, const std::optional<Tensor>& weight_,
              const std::optional<Tensor>& bias_, Tensor& to, const char* operation) {
  const Queue queue(from);
  const Tensor weight = dense(*weight_);
  std::optional<Tensor> bias;
  if (bias_) bias = dense(*bias_);
  args.x = from.const_data_ptr(), args.x_strides = strides_of(from);
  args.weight = weight.const_data_ptr();
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.y = to.mutable_data_ptr(), args.y_strides = strides_of(to);
  args.batch_inner = channel_major(from);
  const Type type = type_of(from, false);
  check(scatter ? masked_depthwise_grad_input(type, args, queue.stream) : masked_depthwise(type, args, queue.stream),
        operation);
}

Tensor masked_conv2d(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                     int64_t repeat, std::optional<Tensor> bias, Ints stride, Ints padding, Ints dilation,
                     int64_t /*groups*/) {
  const Ints size = sizes(weight);
  const Groups groups = conv_groups(words, offsets, order, x.size(0) * repeat, repeat, size);
  int64_t out[2];
  for (int d = 0; d < 2; ++d)
    out[d] = (x.size(2 + d) + padding[2 * d] + padding[2 * d + 1] - dilation[d] * (size[size.size() - 2 + d] - 1) - 1) /
                 stride[d] + 1;
  Tensor y = torch::stable::new_empty(x, Ints{x.size(0) * repeat, size[size.size() - 4], out[0], out[1]});
  const DepthwiseArgs args = depthwise_args(groups, size, x.size(1), stride, {padding[0], padding[2]}, dilation,
                                            x.size(2), x.size(3), out[0], out[1]);
  convolve(false, args, x, weight, bias, y, "masked_conv2d");
  return y;
}

Tensor masked_conv2d_grad_input(Tensor dy, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                                int64_t repeat, Ints x_size, Ints stride, Ints padding, Ints dilation,
                                int64_t /*groups*/) {
  const Ints size = sizes(weight);
  const Groups groups = conv_groups(words, offsets, order, dy.size(0), repeat, size);
  Tensor dx = torch::stable::new_empty(dy, x_size);
  const DepthwiseArgs args = depthwise_args(groups, size, x_size[1], stride, {padding[0], padding[2]}, dilation,
                                            x_size[2], x_size[3], dy.size(2), dy.size(3));
  convolve(true, args, dy, weight, std::nullopt, dx, "masked_conv2d_grad_input");
  return dx;
}

// dw and db of the convolution that makes `large` (`args.channels` of them) into `small`; db is of `dy`, one of the two.
std::tuple<Tensor, Tensor> weight_gradients(DepthwiseArgs args, const Tensor& large, const Tensor& small,
                                            const Tensor& dy, const Ints& weight_size, bool bias,
                                            const char* operation) {
  const Queue queue(dy);
  const Type type = type_of(dy, false);
  Tensor dw = torch::stable::new_empty(dy, weight_size);
  const int64_t channels = dy.size(1);
  Tensor db = torch::stable::new_empty(dy, bias ? (args.untied ? Ints{weight_size[0], channels} : Ints{channels}) : Ints{0});
  args.x = large.const_data_ptr(), args.x_strides = strides_of(large);
  args.dy = small.const_data_ptr(), args.dy_strides = strides_of(small);
  args.y = dw.mutable_data_ptr();
  args.db = bias && !args.transposed ? db.mutable_data_ptr() : nullptr;
  args.batch_inner = channel_major(large) && channel_major(small);
  check(masked_depthwise_grad_weight(type, args, queue.stream), operation);
  if (bias && args.transposed) {
    args.x = nullptr, args.y = nullptr;
    args.dy = large.const_data_ptr(), args.dy_strides = strides_of(large);
    args.db = db.mutable_data_ptr();
    args.multiplier = 1, args.out_h = args.in_h, args.out_w = args.in_w;
    args.transposed = false;
    args.batch_inner = channel_major(large);
    check(masked_depthwise_grad_weight(type, args, queue.stream), operation);
  }
  return {dw, db};
}

std::tuple<Tensor, Tensor> masked_conv2d_grad_weight(Tensor dy, Tensor x, Tensor words, Tensor offsets,
                                                     std::optional<Tensor> order, int64_t repeat, Ints weight_size,
                                                     bool bias, Ints stride, Ints padding, Ints dilation,
                                                     int64_t /*groups*/) {
  const Groups groups = conv_groups(words, offsets, order, dy.size(0), repeat, weight_size);
  const DepthwiseArgs args = depthwise_args(groups, weight_size, x.size(1), stride, {padding[0], padding[2]}, dilation,
                                            x.size(2), x.size(3), dy.size(2), dy.size(3));
  return weight_gradients(args, x, dy, dy, weight_size, bias, "masked_conv2d_grad_weight");
}

Tensor masked_conv_transpose2d(Tensor x, Tensor weight, Tensor words, Tensor offsets, std::optional<Tensor> order,
                               int64_t repeat, std::optional<Tensor> bias, Ints stride, Ints padding,
                               Ints output_padding, int64_t groups_, Ints dilation) {
  const Ints size = sizes(weight);
  const Groups groups = conv_groups(words, offsets, order, x.size(0) * repeat, repeat, size);
  int64_t out[2];
  for (int d = 0; d < 2; ++d)
    out[d] = (x.size(2 + d) - 1) * stride[d] - 2 * padding[d] + dilation[d] * (size[size.size() - 2 + d] - 1) +
             output_padding[d] + 1;
  Tensor y = torch::stable::new_empty(x, Ints{x.size(0) * repeat, groups_, out[0], out[1]});
  DepthwiseArgs args =
      depthwise_args(groups, size, groups_, stride, padding, dilation, out[0], out[1], x.size(2), x.size(3));
  args.transposed = true;
  convolve(true, args, x, weight, bias, y, "masked_conv_transpose2d");
  return y;
}

Tensor masked_conv_transpose2d_grad_input(Tensor dy, Tensor weight, Tensor words, Tensor offsets,
                                          std::optional<Tensor> order, int64_t repeat, Ints x_size, Ints stride,
                                          Ints padding, Ints /*output_padding*/, int64_t groups_, Ints dilation) {
  const Ints size = sizes(weight);
  const Groups groups = conv_groups(words, offsets, order, dy.size(0), repeat, size);
  Tensor dx = torch::stable::new_empty(dy, x_size);
  DepthwiseArgs args = depthwise_args(groups, size, groups_, stride, padding, dilation, dy.size(2), dy.size(3),
                                      x_size[2], x_size[3]);
  args.transposed = true;
  convolve(false, args, dy, weight, std::nullopt, dx, "masked_conv_transpose2d_grad_input");
  return dx;
}

std::tuple<Tensor, Tensor> masked_conv_transpose2d_grad_weight(Tensor dy, Tensor x, Tensor words, Tensor offsets,
                                                               std::optional<Tensor> order, int64_t repeat,
                                                               Ints weight_size, bool bias, Ints stride, Ints padding,
                                                               Ints /*output_padding*/, int64_t groups_,
                                                               Ints dilation) {
  const Groups groups = conv_groups(words, offsets, order, dy.size(0), repeat, weight_size);
  DepthwiseArgs args = depthwise_args(groups, weight_size, groups_, stride, padding, dilation, dy.size(2), dy.size(3),
                                      x.size(2), x.size(3));
  args.transposed = true;
  return weight_gradients(args, dy, x, dy, weight_size, bias, "masked_conv_transpose2d_grad_weight");
}

}  // namespace
}  // namespace rtl_kernels

// The linear operators take one argument more than their schemas in ops.py: whether float32 may be rounded to TF32,
// which is a setting of torch that only Python can read (rtl_kernels/backends/cuda.py).
#define RTL_GROUPS "Tensor words, Tensor offsets, Tensor? order, int repeat"
STABLE_TORCH_LIBRARY_FRAGMENT(rtl_kernels, m) {
  m.def("masked_linear_" RTL_BACKEND "_as(Tensor x, Tensor weight, " RTL_GROUPS ", Tensor? bias, bool tf32) -> Tensor");
  m.def("masked_linear_grad_input_" RTL_BACKEND "_as(Tensor dy, Tensor weight, " RTL_GROUPS ", bool tf32) -> Tensor");
  m.def("masked_linear_grad_weight_" RTL_BACKEND "_as(Tensor dy, Tensor x, " RTL_GROUPS
        ", int[] weight_size, bool bias, bool tf32) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rtl_kernels, RTL_KEY, m) {
#define RTL_IMPL(operation, suffix) m.impl(#operation "_" RTL_BACKEND suffix, TORCH_BOX(&rtl_kernels::operation))
  RTL_IMPL(masked_linear, "_as");
  RTL_IMPL(masked_linear_grad_input, "_as");
  RTL_IMPL(masked_linear_grad_weight, "_as");
  RTL_IMPL(masked_conv2d, "");
  RTL_IMPL(masked_conv2d_grad_input, "");
  RTL_IMPL(masked_conv2d_grad_weight, "");
  RTL_IMPL(masked_conv_transpose2d, "");
  RTL_IMPL(masked_conv_transpose2d_grad_input, "");
  RTL_IMPL(masked_conv_transpose2d_grad_weight, "");
#undef RTL_IMPL
}
