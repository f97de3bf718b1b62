// The functions of launch.h: which kernel, with which grid. Decisions here are made from types, shapes and alignment.
#include "kernels.cuh"

namespace rtl {

namespace {

template <class T>
struct Tag {
  using type = T;
};

// Calls f with the stored type.
template <class F>
int with_type(Type type, F f) {
  switch (type) {
    case Type::kF16: return f(Tag<half_t>{});
    case Type::kBF16: return f(Tag<bf16_t>{});
    default: return f(Tag<float>{});
  }
}

// Whether rows of `pointer`, `stride` elements apart and `length` long, are made of whole 16-byte chunks.
bool chunked(const void* pointer, int64_t stride, int64_t length, size_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size % 16 == 0 && length * size % 16 == 0;
}

template <class P>
int launch_gemm(const GemmArgs& args, Stream stream) {
  const int64_t tiles = args.passes > 1 ? divide_up(args.route.rows / args.passes * args.inner, int64_t(P::kRows))
                                        : tile_limit(args.route, args.inner, P::kRows);
  RTL_LAUNCH(tiles * divide_up(args.columns, int64_t(P::kColumns)), P::kThreads, P::kShared, stream, args, &gemm<P>);
  return 0;
}

template <class T, bool kTensor, bool kForward>
int choose_gemm(const GemmArgs& args, Stream stream) {
  const bool aligned = chunked(args.a, args.a_stride, args.depth, sizeof(T)) &&
                       chunked(args.weight, kForward ? args.depth : args.columns, kForward ? args.depth : args.columns,
                               sizeof(T));
  if (!aligned) return launch_gemm<GemmSmall<T, kTensor, kForward, false>>(args, stream);
  if constexpr (kTensor) {
    // The tile's size changes nothing in the result: not even its last bit.
    const int64_t usual = args.route.rows / args.passes * args.inner / (args.passes > 1 ? 1 : args.route.masks);
    if (args.columns >= 128 && usual >= 128) return launch_gemm<GemmLarge<T, kForward>>(args, stream);
  }
  return launch_gemm<GemmSmall<T, kTensor, kForward, true>>(args, stream);
}

template <bool kForward>
int run_gemm(Type type, const GemmArgs& args, Stream stream) {
  switch (type) {
    case Type::kF32: return choose_gemm<float, false, kForward>(args, stream);
    case Type::kTF32: return choose_gemm<float, true, kForward>(args, stream);
    case Type::kF16: return choose_gemm<half_t, true, kForward>(args, stream);
    default: return choose_gemm<bf16_t, true, kForward>(args, stream);
  }
}

size_t size_of(Type type) { return type == Type::kF16 || type == Type::kBF16 ? 2 : 4; }

bool pairs(const void* pointer, int64_t stride, Type type) {
  return reinterpret_cast<uintptr_t>(pointer) % (2 * size_of(type)) == 0 && stride % 2 == 0;
}

SmallArgs small_args(const LinearArgs& a) {
  return {a.route, a.x, a.weight, a.bias, a.y, a.inner, a.in, a.out, a.x_stride, a.y_stride, a.untied};
}

}  // namespace

int64_t tile_summary_words(int64_t masks, int64_t mask_rows, int64_t words_per_row) {
  return masks * divide_up(mask_rows, int64_t(32)) * divide_up(words_per_row, int64_t(32));
}

int tile_summary(const Route& route, uint32_t* summary, Stream stream) {
  const SummaryArgs args{route, summary};
  const int64_t words = tile_summary_words(route.masks, route.mask_rows, route.words_per_row);
  const int64_t blocks = divide_up(words, int64_t(kSummaryThreads / kWarp));
  RTL_LAUNCH(blocks, kSummaryThreads, 0, stream, args, &tile_summary_kernel<kSummaryThreads>);
  return 0;
}

int masked_linear(Type type, const LinearArgs& a, Stream stream) {
  if (a.route.rows == 0 || a.inner == 0 || a.out == 0) return 0;
  const int error = with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SmallArgs args = small_args(a);
    const int64_t blocks = (a.route.masks + 1) * divide_up(a.out, int64_t(SmallForward<T, true>::kBlockOutputs));
    using Aligned = SmallForward<T, true>;
    using Ragged = SmallForward<T, false>;
    if (chunked(a.x, a.x_stride, a.in, sizeof(T)) && chunked(a.weight, a.in, a.in, sizeof(T)))
      RTL_LAUNCH(blocks, kSmallThreads, Aligned::kShared, stream, args, &small_forward<Aligned>);
    else
      RTL_LAUNCH(blocks, kSmallThreads, Ragged::kShared, stream, args, &small_forward<Ragged>);
    return 0;
  });
  if (error || a.route.rows * a.inner <= kSmallRows) return error;
  return run_gemm<true>(type,
                        {a.route, a.x, a.weight, a.bias, a.y, a.inner, a.in, a.out, a.x_stride, a.y_stride, kSmallRows,
                         1, a.untied, pairs(a.y, a.y_stride, type)},
                        stream);
}

int masked_linear_grad_input(Type type, const LinearArgs& a, Stream stream) {
  if (a.route.rows == 0 || a.inner == 0 || a.in == 0) return 0;
  if (a.route.repeat == 1) {
    const int error = with_type(type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const SmallArgs args = small_args(a);
      const int64_t blocks = (a.route.masks + 1) * divide_up(a.in, int64_t(SmallGradInput<T, true>::kColumns));
      using Aligned = SmallGradInput<T, true>;
      using Ragged = SmallGradInput<T, false>;
      if (chunked(a.weight, a.in, a.in, sizeof(T)))
        RTL_LAUNCH(blocks, kSmallThreads, Aligned::kShared, stream, args, &small_grad_input<Aligned>);
      else
        RTL_LAUNCH(blocks, kSmallThreads, Ragged::kShared, stream, args, &small_grad_input<Ragged>);
      return 0;
    });
    if (error || a.route.rows * a.inner <= kSmallRows) return error;
  }
  return run_gemm<false>(type,
                         {a.route, a.x, a.weight, nullptr, a.y, a.inner, a.out, a.in, a.x_stride, a.y_stride,
                          a.route.repeat == 1 ? kSmallRows : 0, a.route.repeat, a.untied, pairs(a.y, a.y_stride, type)},
                         stream);
}

namespace {

template <class T, bool kTensor>
int run_grad_weight(const GradWeightArgs& args, Stream stream) {
  using Aligned = GradWeight<T, kTensor, true>;
  using Ragged = GradWeight<T, kTensor, false>;
  const int64_t tiles = divide_up(args.out, int64_t(Aligned::kRows)) * divide_up(args.in, int64_t(Aligned::kColumns));
  const int64_t blocks = tiles * (args.untied ? args.route.masks : 1);
  if (chunked(args.dy, args.dy_stride, args.out, sizeof(T)) && chunked(args.x, args.x_stride, args.in, sizeof(T)))
    RTL_LAUNCH(blocks, Aligned::kThreads, Aligned::kShared, stream, args, &gemm_grad_weight<Aligned>);
  else
    RTL_LAUNCH(blocks, Ragged::kThreads, Ragged::kShared, stream, args, &gemm_grad_weight<Ragged>);
  return 0;
}

}  // namespace

int masked_linear_grad_weight(Type type, const LinearArgs& a, Stream stream) {
  const GradWeightArgs args{a.route, a.dy, a.x, a.y, a.inner, a.in, a.out, a.dy_stride, a.x_stride, a.untied};
  int error = 0;
  switch (type) {
    case Type::kF32: error = run_grad_weight<float, false>(args, stream); break;
    case Type::kTF32: error = run_grad_weight<float, true>(args, stream); break;
    case Type::kF16: error = run_grad_weight<half_t, true>(args, stream); break;
    case Type::kBF16: error = run_grad_weight<bf16_t, true>(args, stream); break;
  }
  if (error || !a.db) return error;
  return with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GradBiasArgs bias{a.route, a.dy, a.db, a.inner, a.out, a.dy_stride, a.untied};
    const int64_t blocks = divide_up(a.out, int64_t(kWarp)) * (a.untied ? a.route.masks : 1);
    RTL_LAUNCH(blocks, kBiasThreads, kBiasShared, stream, bias, &grad_bias<T>);
    return 0;
  });
}

// ---- depthwise convolution

namespace {

constexpr int kMaxPositions = 4096;  // of a plane, for one block: more planes' worth of blocks than processors

template <bool kForward>
int run_depthwise(Type type, const DepthwiseArgs& a, Stream stream) {
  const int64_t taps = int64_t(a.kernel_h) * a.kernel_w;
  const int64_t plane = kForward ? a.out_h * a.out_w : a.in_h * a.in_w;
  const int64_t all_channels = kForward ? a.channels * a.multiplier : a.channels;
  if (a.in_h * a.in_w > 0x7FFFFFFF || a.out_h * a.out_w > 0x7FFFFFFF || taps > kFilterFloats) return kUnsupported;
  if (a.route.rows == 0 || plane == 0 || all_channels == 0) return 0;

  const int64_t filters = kForward ? 1 : smaller(a.multiplier, kFilterFloats / taps), floats = taps * filters;
  DepthwiseLaunch launch{a, a.batch_inner ? kWarp : 1, 1, int(filters), int(smaller(plane, kMaxPositions)),
                         kForward == a.transposed ? a.route.repeat : 1};
  // Small planes: several channels a block, about four elements a thread.
  const int64_t wanted = 4 * kDepthwiseThreads / launch.rows / plane;
  const int64_t most = filters < a.multiplier && !kForward ? 1 : smaller(kFilterFloats / floats, all_channels);
  launch.channels = int(wanted < 1 ? 1 : smaller(wanted, most));
  const int64_t samples = a.route.rows / launch.passes;
  const int64_t row_tiles = launch.rows == 1 ? samples
                            : launch.passes > 1 ? divide_up(samples, int64_t(launch.rows))
                                                : tile_limit(a.route, 1, launch.rows);
  const int64_t blocks = row_tiles * divide_up(all_channels, int64_t(launch.channels)) *
                         divide_up(plane, int64_t(launch.positions));
  const size_t shared = size_t(launch.channels * floats) * sizeof(float);
  return with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.kernel_h == 3 && a.kernel_w == 3)
      RTL_LAUNCH(blocks, kDepthwiseThreads, shared, stream, launch, &depthwise<T, kForward, 3>);
    else
      RTL_LAUNCH(blocks, kDepthwiseThreads, shared, stream, launch, &depthwise<T, kForward, 0>);
    return 0;
  });
}

}  // namespace

int masked_depthwise(Type type, const DepthwiseArgs& args, Stream stream) {
  return run_depthwise<true>(type, args, stream);
}

int masked_depthwise_grad_input(Type type, const DepthwiseArgs& args, Stream stream) {
  return run_depthwise<false>(type, args, stream);
}

int masked_depthwise_grad_weight(Type type, const DepthwiseArgs& a, Stream stream) {
  if (a.in_h * a.in_w > 0x7FFFFFFF || a.out_h * a.out_w > 0x7FFFFFFF) return kUnsupported;
  const int64_t blocks = a.channels * a.multiplier * (a.untied ? a.route.masks : 1);
  return with_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    RTL_LAUNCH(blocks, kDepthwiseThreads, kDepthwiseGradShared, stream, a, &depthwise_grad_weight<T>);
    return 0;
  });
}

}  // namespace rtl
