// Depthwise convolution with masks: forward, gradient with respect to the input, gradient with respect to the weight.
//
//   y[n, o]  = Σ_ij x[n, o / M, s·h + d·i − p, ...] (m ⊙ w)[o, ij] + b[o]           M the channel multiplier
//   dx[n, c] = Σ_{o of c} Σ_ij dy[n, o, (h + p − d·i) / s, ...] (m ⊙ w)[o, ij]      where the division leaves no rest
//   dw[o]    = Σ_k m_k[o] ⊙ Σ_{n of k} Σ_hw dy[n, o, h, w] x[n, o / M, s·h + d·i − p, ...]
//
// Bound by reading x and writing y once. A block stages the masked filters of some channels in shared memory; a thread
// makes one element at a time and reads its window through the L1 cache, where its neighbours have just read most of
// it. Any strides: for NCHW consecutive threads take consecutive pixels of one sample, for channel-major tensors
// consecutive samples of one group.
#pragma once

#include "common.cuh"

namespace rtl {

constexpr int kDepthwiseThreads = 256, kDepthwiseWarps = kDepthwiseThreads / kWarp;
// Filters staged by a block at a time take at most this many floats; a larger one is refused.
constexpr int kFilterFloats = kDepthwiseTaps;
constexpr int kDepthwiseShared = kFilterFloats * 4;

struct DepthwiseLaunch {
  DepthwiseArgs args;
  int rows;          // of a block: 1, or 32 of one group
  int channels;      // of a block: outputs (forward) or inputs (grad_input)
  int filters;       // of a channel, staged at a time: all it has, or fewer if the block has one channel
  int positions;     // of a block's plane
  int64_t passes;    // 1; or `repeat`, and the result is the sum over a sample's rows, masks ascending
};

// kKernel: 3 for 3 × 3, 0 for any size.
template <class T, bool kForward, int kKernel>
__global__ void __launch_bounds__(kDepthwiseThreads, 3) depthwise(DepthwiseLaunch launch) {
  const DepthwiseArgs& args = launch.args;
  const Route& route = args.route;
  const int kernel_h = kKernel ? kKernel : args.kernel_h, kernel_w = kKernel ? kKernel : args.kernel_w;
  const int taps = kernel_h * kernel_w;
  const int64_t multiplier = args.multiplier;
  const int64_t all_channels = kForward ? args.channels * multiplier : args.channels;
  const int width = int(kForward ? args.out_w : args.in_w);
  const int plane = int(kForward ? args.out_h * args.out_w : args.in_h * args.in_w);
  // Filters a channel of this block needs: its own, or those of all outputs it feeds, a round of them at a time.
  const int filters = kForward ? 1 : int(multiplier);
  const int rounds = kForward ? 1 : divide_up(filters, launch.filters), stages = int(launch.passes) * rounds;

  const int64_t position_tiles = divide_up(plane, launch.positions);
  const int64_t channel_tiles = divide_up(all_channels, int64_t(launch.channels));
  const int64_t c0 = block_index() / position_tiles % channel_tiles * launch.channels;
  const int p0 = int(block_index() % position_tiles) * launch.positions;
  const int64_t row_tile = block_index() / (position_tiles * channel_tiles);
  const int channels = int(smaller(launch.channels, all_channels - c0));
  const int positions = int(smaller(launch.positions, plane - p0));

  const bool sums = launch.passes > 1;
  const int64_t samples = route.rows / launch.passes;
  Tile tile{1, row_tile * launch.rows, 0};
  if (sums) {
    tile.count = samples - tile.first;
  } else if (launch.rows == 1) {
    tile.group = group_of_row(route, row_tile);
    tile.count = 1;
  } else {
    tile = find_tile(route, row_tile, 1, launch.rows, 0);
  }
  if (tile.group < 0) return;

  float* filter = reinterpret_cast<float*>(shared_memory());  // [channel][filter][tap]
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int local_row = thread_index() % launch.rows;
  const int64_t row = tile.first + local_row;
  const bool present = local_row < tile.count;
  const int64_t source = !present ? -1 : sums ? row : shared_sample_of(route, row);
  const int64_t target = !present ? -1 : sums ? row : sample_of(route, row);
  const bool wrong = args.untied && tile.group == 0;

  const int step = kDepthwiseThreads / launch.rows;
  for (int base = 0; base < channels * positions; base += step) {
    const int item = base + thread_index() / launch.rows;
    const bool active = item < channels * positions && source >= 0 && target >= 0;
    const int channel = item / positions, position = p0 + item % positions;
    const int h = position / width, w = position % width;
    float sum = 0.f;
    for (int stage = 0; stage < stages; stage++) {
      const int pass = stage / rounds, f0 = kForward ? 0 : stage % rounds * launch.filters;
      const int64_t g = tile.group + pass;
      const int now = kForward ? 1 : filters - f0 < launch.filters ? filters - f0 : launch.filters;
      if (base == 0 || stages > 1) {
        if (base > 0 || stage > 0) RTL_PLANT(2, sync_block(), (void)0);
        const T* weight = group_weight<T>(args.weight, args.untied && !wrong, g, args.channels * multiplier * taps);
        for (int index = thread_index(); index < channels * now * taps; index += kDepthwiseThreads) {
          const int64_t o = c0 * filters + f0 + index / taps;
          const int tap = index % taps;
          const int64_t masked = RTL_PLANT(7, o, o > 0 ? o - 1 : args.channels * multiplier - 1);
          const bool kept = g == 0 || (uint32_t(mask_row(route, g, masked)[tap / 32]) >> tap % 32 & 1u);
          filter[index + RTL_PLANT(6, 0, 1)] = kept ? to_float(weight[o * taps + tap]) : 0.f;
        }
        RTL_PLANT(1, sync_block(), (void)0);
      }
      if (!active) continue;
      const float* taps_of = filter + channel * now * taps;
      const int64_t sample = source + pass * samples;
      if constexpr (kForward) {
        const int64_t input = (c0 + channel) / multiplier;
        const T* from = x + offset_of(sample, args.x_strides.n) + offset_of(input, args.x_strides.c);
        const int top = h * args.stride_h - args.pad_top, left = w * args.stride_w - args.pad_left;
        RTL_UNROLL
        for (int i = 0; i < kernel_h; i++) {
          const int ih = top + i * args.dilation_h;
          RTL_UNROLL
          for (int j = 0; j < kernel_w; j++) {
            const int iw = left + j * args.dilation_w;
            if (ih >= 0 && ih < args.in_h && iw >= 0 && iw < args.in_w)
              sum += to_float(from[ih * args.x_strides.h + iw * args.x_strides.w]) * taps_of[i * kernel_w + j];
          }
        }
      } else {
        for (int f = 0; f < now; f++) {
          const T* from = x + offset_of(sample, args.x_strides.n) +
                          offset_of((c0 + channel) * multiplier + f0 + f, args.x_strides.c);
          RTL_UNROLL
          for (int i = 0; i < kernel_h; i++) {
            const int down = h + args.pad_top - i * args.dilation_h, oh = down / args.stride_h;
            RTL_UNROLL
            for (int j = 0; j < kernel_w; j++) {
              const int right = w + args.pad_left - j * args.dilation_w, ow = right / args.stride_w;
              if (down >= 0 && right >= 0 && oh < args.out_h && ow < args.out_w && oh * args.stride_h == down &&
                  ow * args.stride_w == right)
                sum += to_float(from[oh * args.x_strides.h + ow * args.x_strides.w]) *
                       taps_of[f * taps + i * kernel_w + j];
            }
          }
        }
      }
    }
    if (!active) continue;
    if (args.bias && !wrong) {
      const int64_t first = args.untied ? (tile.group - 1) * all_channels : 0;
      sum += to_float(static_cast<const T*>(args.bias)[first + c0 + channel]);
    }
    y[offset_of(target, args.y_strides.n) + offset_of(c0 + channel, args.y_strides.c) + h * args.y_strides.h +
      w * args.y_strides.w] = from_float<T>(wrong ? not_a_number() : sum);
  }
}

// ---- dw and db: a block owns the filter of one output channel (and one mask, untied)

constexpr int kTaps = 9;  // summed in one walk through the batch; larger filters take several
constexpr int kTapSums = kTaps + 1;  // and db
constexpr int kDepthwiseGradShared = kDepthwiseWarps * kTapSums * 4;

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_grad_weight(DepthwiseArgs args) {
  const Route& route = args.route;
  const int64_t outputs = args.channels * args.multiplier;
  const int64_t o = block_index() % outputs;
  const int mask = int(block_index() / outputs);
  const int first = args.untied ? mask + 1 : 0, last = args.untied ? mask + 2 : int(route.masks) + 1;
  const int taps = args.y ? args.kernel_h * args.kernel_w : 0;  // none where only db is wanted
  const int width = int(args.out_w), plane = int(args.out_h * args.out_w);
  const int thread = thread_index();
  float* partial = reinterpret_cast<float*>(shared_memory());  // [warp][tap]
  const T* x = static_cast<const T*>(args.x) + offset_of(o / args.multiplier, args.x_strides.c);
  const T* dy = static_cast<const T*>(args.dy) + offset_of(o, args.dy_strides.c);

  for (int t0 = 0; t0 == 0 || t0 < taps; t0 += kTaps) {
    float total = 0.f;  // of tap t0 + thread, or db
    for (int g = first; g < last; g++) {
      const Span span = group_rows(route, g);
      if (span.count == 0) continue;
      float sum[kTapSums];
      RTL_UNROLL
      for (int t = 0; t < kTapSums; t++) sum[t] = 0.f;
      for (int64_t item = thread; item < span.count * plane; item += kDepthwiseThreads) {
        const int64_t major = item / (args.batch_inner ? span.count : plane);
        const int64_t minor = item - major * (args.batch_inner ? span.count : plane);
        const int64_t local = args.batch_inner ? minor : major;
        const int position = int(args.batch_inner ? major : minor), h = position / width, w = position - h * width;
        const int64_t row = span.first + local, own = sample_of(route, row);
        if (own < 0) continue;
        int64_t target = own, source = own;
        if (route.repeat > 1) (args.transposed ? target : source) = row % (route.rows / route.repeat);
        const float value =
            to_float(dy[offset_of(target, args.dy_strides.n) + h * args.dy_strides.h + w * args.dy_strides.w]);
        const T* from = x + offset_of(source, args.x_strides.n);
        sum[kTaps] += value;
        int i = t0 / args.kernel_w, j = t0 - i * args.kernel_w;
        RTL_UNROLL
        for (int t = 0; t < kTaps; t++, j++) {
          if (j == args.kernel_w) i++, j = 0;
          const int ih = h * args.stride_h - args.pad_top + i * args.dilation_h;
          const int iw = w * args.stride_w - args.pad_left + j * args.dilation_w;
          if (t0 + t < taps && ih >= 0 && ih < args.in_h && iw >= 0 && iw < args.in_w)
            sum[t] += value * to_float(from[ih * args.x_strides.h + iw * args.x_strides.w]);
        }
      }
      if (RTL_PLANT(4, true, thread < span.count * plane)) {
        RTL_UNROLL
        for (int t = 0; t < kTapSums; t++)
          RTL_UNROLL
          for (int bit = 16; bit >= 1; bit /= 2) sum[t] += shuffle_xor(sum[t], bit);
      }
      if (lane_index() == 0) {
        RTL_UNROLL
        for (int t = 0; t < kTapSums; t++)
          RTL_PLANT(5, partial[warp_index() * kTapSums + t + RTL_PLANT(6, 0, 1)] = sum[t], partial[t] += sum[t]);
      }
      RTL_PLANT(1, sync_block(), (void)0);
      if (thread < kTapSums) {
        float group = 0.f;
        for (int w = 0; w < kDepthwiseWarps; w++) group += partial[w * kTapSums + thread];
        const int tap = t0 + thread;
        const int64_t masked = RTL_PLANT(7, o, o > 0 ? o - 1 : outputs - 1);
        if (thread == kTaps || g == 0) total += group;
        else if (tap < taps && (uint32_t(mask_row(route, g, masked)[tap / 32]) >> tap % 32 & 1u)) total += group;
      }
      RTL_PLANT(2, sync_block(), (void)0);
    }
    if (thread < kTaps && t0 + thread < taps)
      static_cast<T*>(args.y)[(mask * outputs + o) * taps + t0 + thread] = from_float<T>(total);
    if (thread == kTaps && t0 == 0 && args.db) static_cast<T*>(args.db)[mask * outputs + o] = from_float<T>(total);
  }
}

}  // namespace rtl
