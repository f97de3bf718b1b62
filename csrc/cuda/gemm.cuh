// The grouped masked matrix product: forward and gradient with respect to the input of masked_linear.
//
//   forward      y[r]  = x[r]  · (m ⊙ W)ᵀ + b     columns are outputs, depth is inputs,  weight tile [column][k]
//   grad_input   dx[r] = dy[r] · (m ⊙ W)          columns are inputs,  depth is outputs, weight tile [k][column]
//
// A block computes kRows × kColumns of one group's result: a tile never straddles two masks, so a weight tile has one
// mask. Tiles of rows, weights and mask words come in by asynchronous copies, kStages − 1 steps ahead of the multiply;
// the weight is copied as it stands and its fragments are ANDed with their mask words in registers, between the matrix
// load and the multiply: dense speed, 1/32 more bytes. Steps where the summary shows no kept weight under the block's
// columns are left out of the sequence altogether.
//
// The order of additions depends on neither the tile's size nor its place, only on depth and mask.
#pragma once

#include "tiles.cuh"

namespace rtl {

struct GemmArgs {
  Route route;
  const void* a;
  const void* weight;
  const void* bias;
  void* c;
  int64_t inner, depth, columns, a_stride, c_stride;
  int64_t skip;    // groups of at most this many rows · inner are someone else's
  int64_t passes;  // 1; or `repeat`, and the result is the sum over a sample's rows, masks ascending
  bool untied;
  bool pairs;  // two neighbouring results may be stored at once
};

template <class T_, bool kTensor_, bool kForward_, bool kAligned_, int kRows_, int kColumns_, int kWarpRows_,
          int kStages_>
struct Gemm {
  using T = T_;
  static constexpr bool kTensor = kTensor_, kForward = kForward_, kAligned = kAligned_;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kStages = kStages_;
  static constexpr int kM = kWarpRows / 16;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * kWarp;
  static constexpr int kPerChunk = 16 / int(sizeof(T));
  static constexpr int kRowBytes = kDepth * int(sizeof(T));
  static constexpr int kWeightRowBytes = kForward ? kRowBytes : kColumns * int(sizeof(T));
  static constexpr int kRowTile = kRows * kRowBytes, kWeightTile = kColumns * kRowBytes;
  static constexpr int kStageBytes = kRowTile + kWeightTile;
  // Mask words follow all tiles: one a column, or one for every 32 columns of every k; kColumns of them either way.
  static constexpr int kShared = kStages * (kStageBytes + kColumns * 4);
  static constexpr int kMinBlocks = kThreads > 128 ? 1 : sizeof(T) == 2 ? 4 : 3;
};

// Which steps (pass, k) there are, those without a kept weight left out. The same in every thread of the block.
template <class P>
struct Steps {
  const GemmArgs& args;
  int64_t group, n0, tiles;  // group of the first pass; depth tiles a pass
  int64_t pass = 0, base = 0;
  uint32_t live = 0;  // depth tiles base .. base + 31 still to come

  RTL_DEVICE Steps(const GemmArgs& a, int64_t g, int64_t column)
      : args(a), group(g), n0(column), tiles(divide_up(a.depth, int64_t(kDepth))) {
    if (args.untied && g == 0) pass = args.passes;  // an error: nothing to multiply with
    else if (tiles > 0) live = fetch();
    settle();
  }

  RTL_DEVICE bool done() const { return pass >= args.passes || tiles == 0; }
  RTL_DEVICE int64_t tile() const { return base + first_set(live); }
  RTL_DEVICE void next() {
    live &= live - 1;
    settle();
  }

 private:
  RTL_DEVICE void settle() {
    while (live == 0 && !done()) {
      base += 32;
      if (base >= tiles) base = 0, pass++;
      if (!done()) live = fetch();
    }
  }

  RTL_DEVICE uint32_t fetch() const {
    const int64_t left = tiles - base, g = group + pass;
    const uint32_t all = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1u;
    const Route& route = args.route;
    if (g == 0 || !route.summary) return all;
    const int64_t blocks = divide_up(route.mask_rows, int64_t(32)), words = divide_up(route.words_per_row, int64_t(32));
    const uint32_t* summary = route.summary + (g - 1) * blocks * words;
    const int64_t column = n0 / 32;
    if constexpr (P::kForward) {
      uint32_t any = 0;
      for (int i = 0; i < P::kColumns / 32; i++)
        if (column + i < blocks) any |= summary[(column + i) * words + base / 32];
      return any & all;
    } else {
      constexpr uint32_t kUnder = (1u << P::kColumns / 32) - 1u;
      bool any = false;
      if (lane_index() < left)
        any = (summary[(base + lane_index()) * words + column / 32] >> column % 32 & kUnder) != 0;
      return ballot(any);
    }
  }
};

template <class P>
__global__ void __launch_bounds__(P::kThreads, P::kMinBlocks) gemm(GemmArgs args) {
  using T = typename P::T;
  constexpr int kChunks = P::kRowBytes / 16, kWeightChunks = P::kWeightRowBytes / 16;
  constexpr int kRowLoads = P::kRows * kChunks / P::kThreads, kWeightLoads = P::kColumns * kChunks / P::kThreads;
  const int thread = thread_index();

  const int64_t across = divide_up(args.columns, int64_t(P::kColumns));
  const int64_t n0 = block_index() % across * P::kColumns;
  const bool sums = args.passes > 1;
  const int64_t samples = args.route.rows / args.passes;
  Tile tile{1, block_index() / across * P::kRows, 0};
  if (sums) tile.count = samples * args.inner - tile.first;
  else tile = find_tile(args.route, block_index() / across, args.inner, P::kRows, args.skip);
  if (tile.group < 0) return;

  unsigned char* shared = shared_memory();
  uint32_t* shared_words = reinterpret_cast<uint32_t*>(shared + P::kStages * P::kStageBytes);

  // The rows this thread copies: the same ones in every step.
  int64_t row_offset[kRowLoads];
  RTL_UNROLL
  for (int i = 0; i < kRowLoads; i++) {
    const int local = (thread + i * P::kThreads) / kChunks;
    const int64_t logical = tile.first + local, row = logical / args.inner;
    int64_t sample = -1;
    if (local < tile.count) {
      if (sums) sample = row;
      else sample = P::kForward ? shared_sample_of(args.route, row) : sample_of(args.route, row);
    }
    row_offset[i] = sample < 0 ? -1 : offset_of(sample * args.inner + logical % args.inner, args.a_stride);
  }

  // Copies from `from`, of which `valid` elements exist, to a chunk of shared memory.
  const auto load_chunk = [](unsigned char* to, const T* base, int64_t offset, int64_t valid) {
    if (P::kAligned) copy_async_16(to, valid > 0 ? base + offset : base, valid > 0);
    else *reinterpret_cast<Chunk*>(to) = valid > 0 ? load_some(base + offset, valid) : Chunk{{0, 0, 0, 0}};
  };

  const auto load = [&](const Steps<P>& steps, int stage) {
    const int64_t g = tile.group + steps.pass, kt = steps.tile(), k0 = kt * kDepth;
    unsigned char* rows = shared + stage * P::kStageBytes;
    unsigned char* weights = rows + P::kRowTile;
    const T* a = static_cast<const T*>(args.a) + (sums ? steps.pass * samples * args.inner * args.a_stride : 0);
    const int64_t k = k0 + thread % kChunks * P::kPerChunk;
    RTL_UNROLL
    for (int i = 0; i < kRowLoads; i++)
      load_chunk(rows + swizzled<P::kRowBytes>((thread + i * P::kThreads) / kChunks, thread % kChunks), a,
                 row_offset[i] + k, row_offset[i] < 0 ? 0 : args.depth - k);

    const T* weight = group_weight<T>(args.weight, args.untied, g, args.depth * args.columns);
    RTL_UNROLL
    for (int i = 0; i < kWeightLoads; i++) {
      const int index = thread + i * P::kThreads, row = index / kWeightChunks, chunk = index % kWeightChunks;
      unsigned char* to = weights + swizzled<P::kWeightRowBytes>(row, chunk);
      if (P::kForward) {
        const int64_t n = n0 + row, depth = k0 + chunk * P::kPerChunk;
        load_chunk(to, weight, n * args.depth + depth, n < args.columns ? args.depth - depth : 0);
      } else {
        const int64_t n = n0 + chunk * P::kPerChunk, depth = k0 + row;
        load_chunk(to, weight, depth * args.columns + n, depth < args.depth ? args.columns - n : 0);
      }
    }

    if (thread < P::kColumns) {
      uint32_t* to = shared_words + stage * P::kColumns + thread + RTL_PLANT(6, 0, 1);
      constexpr int kWords = P::kColumns / 32;
      const int64_t row = P::kForward ? n0 + thread : k0 + thread / kWords;
      const int64_t right = P::kForward ? kt : n0 / 32 + thread % kWords;
      const int64_t word = RTL_PLANT(7, right, right > 0 ? right - 1 : args.route.words_per_row - 1);
      if (g == 0) *to = 0xFFFFFFFFu;
      else {
        const bool valid = row < args.route.mask_rows && word < args.route.words_per_row;
        copy_async_4(to, valid ? mask_row(args.route, g, row) + word : args.route.words, valid);
      }
    }
  };

  const int warp = warp_index(), lane = lane_index();
  const int m0 = warp / P::kWarpsAcross * P::kWarpRows, w0 = warp % P::kWarpsAcross;
  Accumulator<P::kM> sum;
  sum.clear();

  const auto compute = [&](int stage) {
    const unsigned char* rows = shared + stage * P::kStageBytes;
    const unsigned char* weights = rows + P::kRowTile;
    const uint32_t* words = shared_words + stage * P::kColumns;
    const int c0 = w0 * kWarpColumns;
    if constexpr (P::kTensor) {
      uint32_t kept[kPieces];
      if constexpr (P::kForward) {
        RTL_UNROLL
        for (int n = 0; n < kPieces; n++) kept[n] = words[c0 + n * 8 + (lane >> 2)];
      }
      RTL_UNROLL
      for (int s = 0; s < kSteps<T>; s++) {
        uint32_t a[P::kM][4], b[kPieces][2];
        left_by_rows<T, P::kM>(a, rows, m0, s);
        if constexpr (P::kForward) {
          right_by_columns<T>(b, weights, c0, s);
          mask_by_columns<T>(b, kept, s);
        } else {
          RightByDepth<T, P::kWeightRowBytes>::load(b, weights, c0, s);
          mask_by_depth<T>(b, words + w0, P::kColumns / 32, s);
        }
        RTL_UNROLL
        for (int n = 0; n < kPieces; n++) round_fragment(static_cast<T*>(nullptr), b[n], 2);
        multiply<T, P::kM>(sum, a, b);
      }
    } else {
      // Four k at a time, since rows are read in chunks; unrolled further it would need all the registers there are.
      RTL_UNROLL_TWICE
      for (int chunk = 0; chunk < kDepth / 4; chunk++) {
        Chunk a[P::kM][2];
        RTL_UNROLL
        for (int m = 0; m < P::kM; m++)
          RTL_UNROLL
          for (int h = 0; h < 2; h++)
            a[m][h] = read<Chunk>(rows + swizzled<P::kRowBytes>(m0 + piece_row(m, 2 * h), chunk));
        Chunk w[kPieces][2];
        if constexpr (P::kForward) {
          RTL_UNROLL
          for (int n = 0; n < kPieces; n++)
            RTL_UNROLL
            for (int h = 0; h < 2; h++) {
              const int column = c0 + piece_column(n, h);
              w[n][h] = read<Chunk>(weights + swizzled<P::kWeightRowBytes>(column, chunk));
              keep<float>(w[n][h], words[column] >> chunk * 4);
            }
        }
        RTL_UNROLL
        for (int i = 0; i < 4; i++) {
          float left[P::kM][2], right[kPieces][2];
          RTL_UNROLL
          for (int m = 0; m < P::kM; m++)
            RTL_UNROLL
            for (int h = 0; h < 2; h++) left[m][h] = bits_float(a[m][h].word[i]);
          if constexpr (P::kForward) {
            RTL_UNROLL
            for (int n = 0; n < kPieces; n++)
              RTL_UNROLL
              for (int h = 0; h < 2; h++) right[n][h] = bits_float(w[n][h].word[i]);
          } else {
            const int k = chunk * 4 + i;
            const uint32_t word = words[k * (P::kColumns / 32) + w0];
            columns_of_row<P::kWeightRowBytes>(right, weights, k, c0);
            RTL_UNROLL
            for (int n = 0; n < kPieces; n++)
              RTL_UNROLL
              for (int h = 0; h < 2; h++)
                right[n][h] = bits_float(float_bits(right[n][h]) & spread_one(word >> piece_column(n, h)));
          }
          add_product<P::kM>(sum, left, right);
        }
      }
    }
  };

  Steps<P> steps(args, tile.group, n0);
  int issued = 0;
  const auto issue = [&] {
    if (!steps.done()) {
      load(steps, issued % P::kStages);
      steps.next();
      issued++;
    }
    copy_commit();  // a group every time, empty or not: that is how the waits count
  };
  RTL_UNROLL
  for (int i = 0; i < P::kStages - 1; i++) issue();
  for (int consumed = 0; consumed < issued; consumed++) {
    // The barrier makes this step's tiles visible to all, and shows that all are done with the stage before it, which
    // is the next to be filled.
    RTL_PLANT(1, (void)0, sync_block());
    RTL_PLANT(3, copy_wait<P::kStages - 2>(), (void)0);
    RTL_PLANT(2, (void)0, issue());
    RTL_PLANT(1, sync_block(), (void)0);
    RTL_PLANT(2, issue(), (void)0);
    compute(consumed % P::kStages);
  }

  const bool wrong = args.untied && tile.group == 0;
  T* c = static_cast<T*>(args.c);
  const int64_t bias_first = args.untied ? (tile.group - 1) * args.columns : 0;
  const T* bias = args.bias ? static_cast<const T*>(args.bias) + bias_first : nullptr;
  RTL_UNROLL
  for (int m = 0; m < P::kM; m++)
    RTL_UNROLL
    for (int h = 0; h < 2; h++) {
      const int local = m0 + piece_row(m, 2 * h);
      if (local >= tile.count) continue;
      const int64_t logical = tile.first + local, row = logical / args.inner;
      const int64_t sample = sums ? row : sample_of(args.route, row);
      if (sample < 0) continue;
      T* to = c + offset_of(sample * args.inner + logical % args.inner, args.c_stride);
      RTL_UNROLL
      for (int n = 0; n < kPieces; n++) {
        const int64_t column = n0 + w0 * kWarpColumns + piece_column(n, 0);
        T value[2];
        RTL_UNROLL
        for (int e = 0; e < 2; e++) {
          float v = sum.at[m][n][2 * h + e];
          if (bias && !wrong && column + e < args.columns) v += to_float(bias[column + e]);
          value[e] = from_float<T>(wrong ? not_a_number() : v);
        }
        struct alignas(2 * sizeof(T)) Pair {
          T x, y;
        };
        if (args.pairs && column + 1 < args.columns) {
          *reinterpret_cast<Pair*>(to + column) = {value[0], value[1]};
        } else {
          if (column < args.columns) to[column] = value[0];
          if (column + 1 < args.columns) to[column + 1] = value[1];
        }
      }
    }
}

}  // namespace rtl
