// Gradients of masked_linear with respect to weight and bias.
//
//   dw = Σ_k m_k ⊙ (dy_kᵀ x_k)      db = Σ dy        untied weights keep the terms of the sum apart
//
// A block owns 64 × 64 elements of dw and walks the groups one after another: the group's product is summed in one set
// of registers, its mask's bits are applied once, and what they keep is added to a second set. No atomics, one order.
// Groups without rows, and groups whose mask keeps nothing here, cost nothing.
#pragma once

#include "tiles.cuh"

namespace rtl {

struct GradWeightArgs {
  Route route;
  const void* dy;
  const void* x;
  void* dw;
  int64_t inner, in, out, dy_stride, x_stride;
  bool untied;
};

template <class T_, bool kTensor_, bool kAligned_>
struct GradWeight {
  using T = T_;
  static constexpr bool kTensor = kTensor_, kAligned = kAligned_;
  static constexpr int kRows = 64, kColumns = 64, kWarpRows = 32, kStages = 3;
  static constexpr int kM = kWarpRows / 16;
  static constexpr int kThreads = 128;
  static constexpr int kPerChunk = 16 / int(sizeof(T));
  static constexpr int kRowBytes = 64 * int(sizeof(T));  // of both tiles: [row of the batch][64 outputs or inputs]
  static constexpr int kTile = kDepth * kRowBytes;
  static constexpr int kShared = kStages * 2 * kTile;
};

// The steps through the batch: 32 rows of one group at a time, groups ascending.
struct BatchSteps {
  const GradWeightArgs& args;
  int64_t o0, i0;
  int64_t group, end;  // the current group; one past the last
  Span rows{0, 0};     // of the group, times inner
  int64_t at = 0;      // first row of the step within the group

  RTL_DEVICE BatchSteps(const GradWeightArgs& a, int64_t o, int64_t i, int64_t first, int64_t last)
      : args(a), o0(o), i0(i), group(first), end(last) {
    enter();
  }
  RTL_DEVICE bool done() const { return group >= end; }
  RTL_DEVICE bool last_of_group() const { return at + kDepth >= rows.count; }
  RTL_DEVICE void next() {
    at += kDepth;
    if (at >= rows.count) group++, enter();
  }

 private:
  RTL_DEVICE void enter() {
    at = 0;
    for (; group < end; group++) {
      const Span span = group_rows(args.route, group);
      rows = {span.first * args.inner, span.count * args.inner};
      if (rows.count > 0 && keeps_any()) return;
    }
  }
  RTL_DEVICE bool keeps_any() const {
    const Route& route = args.route;
    if (group == 0 || !route.summary) return true;
    const int64_t blocks = divide_up(route.mask_rows, int64_t(32)), words = divide_up(route.words_per_row, int64_t(32));
    const uint32_t* summary = route.summary + (group - 1) * blocks * words;
    uint32_t any = 0;
    for (int64_t block = o0 / 32; block < smaller(o0 / 32 + 2, blocks); block++)
      any |= summary[block * words + i0 / 32 / 32] >> i0 / 32 % 32 & 3u;
    return any != 0;
  }
};

template <class P>
__global__ void __launch_bounds__(P::kThreads) gemm_grad_weight(GradWeightArgs args) {
  using T = typename P::T;
  constexpr int kChunks = P::kRowBytes / 16, kLoads = kDepth * kChunks / P::kThreads;
  const int thread = thread_index(), warp = warp_index();

  const int64_t across = divide_up(args.in, int64_t(P::kColumns)), down = divide_up(args.out, int64_t(P::kRows));
  const int64_t i0 = block_index() % across * P::kColumns, o0 = block_index() / across % down * P::kRows;
  const int64_t mask = block_index() / (across * down);  // untied only; else 0
  const int64_t first = args.untied ? mask + 1 : 0, last = args.untied ? mask + 2 : args.route.masks + 1;
  unsigned char* shared = shared_memory();

  const auto load_tile = [&](unsigned char* tile, const void* from, int64_t offset, int row, int64_t column,
                             int64_t columns) {
    const T* base = static_cast<const T*>(from);
    const int64_t valid = offset < 0 ? 0 : columns - column;
    unsigned char* to = tile + swizzled<P::kRowBytes>(row, thread % kChunks);
    if (P::kAligned) copy_async_16(to, valid > 0 ? base + offset + column : base, valid > 0);
    else *reinterpret_cast<Chunk*>(to) = valid > 0 ? load_some(base + offset + column, valid) : Chunk{{0, 0, 0, 0}};
  };

  const auto load = [&](const BatchSteps& steps, int stage) {
    unsigned char* dy_tile = shared + stage * 2 * P::kTile;
    unsigned char* x_tile = dy_tile + P::kTile;
    RTL_UNROLL
    for (int i = 0; i < kLoads; i++) {
      const int row = (thread + i * P::kThreads) / kChunks;
      const int64_t column = thread % kChunks * P::kPerChunk;
      int64_t dy_offset = -1, x_offset = -1;
      if (steps.at + row < steps.rows.count) {
        const int64_t logical = steps.rows.first + steps.at + row, r = logical / args.inner, t = logical % args.inner;
        const int64_t sample = sample_of(args.route, r);
        if (sample >= 0) {
          dy_offset = offset_of(sample * args.inner + t, args.dy_stride);
          x_offset = offset_of(shared_sample_of(args.route, r) * args.inner + t, args.x_stride);
        }
      }
      load_tile(dy_tile, args.dy, dy_offset, row, o0 + column, args.out);
      load_tile(x_tile + RTL_PLANT(6, 0, 16), args.x, x_offset, row, i0 + column, args.in);
    }
  };

  const int m0 = warp / 2 * P::kWarpRows, w0 = warp % 2;
  Accumulator<P::kM> sum, total;
  sum.clear();
  total.clear();

  const auto compute = [&](int stage) {
    const unsigned char* dy_tile = shared + stage * 2 * P::kTile;
    const unsigned char* x_tile = dy_tile + P::kTile;
    if constexpr (P::kTensor) {
      RTL_UNROLL
      for (int s = 0; s < kSteps<T>; s++) {
        uint32_t a[P::kM][4], b[kPieces][2];
        LeftByDepth<T, P::kM, P::kRowBytes>::load(a, dy_tile, m0, s);
        RightByDepth<T, P::kRowBytes>::load(b, x_tile, w0 * kWarpColumns, s);
        RTL_UNROLL
        for (int n = 0; n < kPieces; n++) round_fragment(static_cast<T*>(nullptr), b[n], 2);
        multiply<T, P::kM>(sum, a, b);
      }
    } else {
      RTL_UNROLL_TWICE
      for (int k = 0; k < kDepth; k++) {
        float left[P::kM][2], right[kPieces][2];
        RTL_UNROLL
        for (int m = 0; m < P::kM; m++)
          RTL_UNROLL
          for (int h = 0; h < 2; h++)
            left[m][h] = read<float>(element_at<float, P::kRowBytes>(dy_tile, k, m0 + piece_row(m, 2 * h)));
        columns_of_row<P::kRowBytes>(right, x_tile, k, w0 * kWarpColumns);
        add_product<P::kM>(sum, left, right);
      }
    }
  };

  // The group is complete: what its mask keeps goes to the total.
  const auto flush = [&](int64_t g) {
    const int64_t right = i0 / 32 + w0;
    const int64_t word = RTL_PLANT(7, right, right > 0 ? right - 1 : args.route.words_per_row - 1);
    RTL_UNROLL
    for (int m = 0; m < P::kM; m++)
      RTL_UNROLL
      for (int h = 0; h < 2; h++) {
        const int64_t row = o0 + m0 + piece_row(m, 2 * h);
        uint32_t bits = 0;
        if (g == 0) bits = 0xFFFFFFFFu;
        else if (row < args.route.mask_rows && word < args.route.words_per_row)
          bits = mask_row(args.route, g, row)[word];
        RTL_UNROLL
        for (int n = 0; n < kPieces; n++)
          RTL_UNROLL
          for (int e = 0; e < 2; e++)
            if (bits >> piece_column(n, e) & 1u) total.at[m][n][2 * h + e] += sum.at[m][n][2 * h + e];
      }
    sum.clear();
  };

  BatchSteps ahead(args, o0, i0, first, last), now(args, o0, i0, first, last);
  int issued = 0;
  const auto issue = [&] {
    if (!ahead.done()) {
      load(ahead, issued % P::kStages);
      ahead.next();
      issued++;
    }
    copy_commit();
  };
  RTL_UNROLL
  for (int i = 0; i < P::kStages - 1; i++) issue();
  for (int consumed = 0; consumed < issued; consumed++) {
    // As in gemm.cuh: one barrier for both ends of a stage's life.
    RTL_PLANT(1, (void)0, sync_block());
    RTL_PLANT(3, copy_wait<P::kStages - 2>(), (void)0);
    RTL_PLANT(2, (void)0, issue());
    RTL_PLANT(1, sync_block(), (void)0);
    RTL_PLANT(2, issue(), (void)0);
    compute(consumed % P::kStages);
    if (now.last_of_group()) flush(now.group);
    now.next();
  }

  T* dw = static_cast<T*>(args.dw) + mask * args.out * args.in;
  RTL_UNROLL
  for (int m = 0; m < P::kM; m++)
    RTL_UNROLL
    for (int n = 0; n < kPieces; n++)
      RTL_UNROLL
      for (int e = 0; e < 4; e++) {
        const int64_t row = o0 + m0 + piece_row(m, e), column = i0 + w0 * kWarpColumns + piece_column(n, e);
        if (row < args.out && column < args.in) dw[row * args.in + column] = from_float<T>(total.at[m][n][e]);
      }
}

// ---- db: column sums of dy

struct GradBiasArgs {
  Route route;
  const void* dy;
  void* db;
  int64_t inner, out, dy_stride;
  bool untied;
};

constexpr int kBiasThreads = 256, kBiasWarps = kBiasThreads / kWarp;
constexpr int kBiasShared = kBiasThreads * 4;

// A block owns 32 columns; its warps share a group's rows between them, and the first warp adds up what they found.
template <class T>
__global__ void __launch_bounds__(kBiasThreads) grad_bias(GradBiasArgs args) {
  const int64_t across = divide_up(args.out, int64_t(kWarp));
  const int64_t column = block_index() % across * kWarp + lane_index(), mask = block_index() / across;
  const int64_t first = args.untied ? mask + 1 : 0, last = args.untied ? mask + 2 : args.route.masks + 1;
  float* partial = reinterpret_cast<float*>(shared_memory());
  const T* dy = static_cast<const T*>(args.dy);

  float total = 0.f;
  for (int64_t g = first; g < last; g++) {
    const Span span = group_rows(args.route, g);
    if (span.count == 0) continue;
    float sum = 0.f;
    for (int64_t i = warp_index(); i < span.count * args.inner && column < args.out; i += kBiasWarps) {
      const int64_t sample = sample_of(args.route, span.first + i / args.inner);
      if (sample >= 0) sum += to_float(dy[offset_of(sample * args.inner + i % args.inner, args.dy_stride) + column]);
    }
    RTL_PLANT(5, partial[thread_index() + RTL_PLANT(6, 0, 1)] = sum, partial[lane_index()] += sum);
    RTL_PLANT(1, sync_block(), (void)0);
    if (warp_index() == 0)
      for (int w = 0; w < kBiasWarps; w++) total += partial[w * kWarp + lane_index()];
    RTL_PLANT(2, sync_block(), (void)0);
  }
  if (warp_index() == 0 && column < args.out) static_cast<T*>(args.db)[mask * args.out + column] = from_float<T>(total);
}

}  // namespace rtl
