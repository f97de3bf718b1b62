// masked_linear and its gradient with respect to the input for groups of at most 16 rows: bound by reading the weight,
// so it is read once, 16 bytes a lane, and only where the mask keeps something.
//
// Whether a group comes here is decided by its own size, on the device: the launch covers all groups, and a block whose
// group is empty or larger leaves at once.
#pragma once

#include "common.cuh"

namespace rtl {

constexpr int kSmallThreads = 256, kSmallWarps = kSmallThreads / kWarp;

struct SmallArgs {
  Route route;
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  int64_t inner, in, out, x_stride, y_stride;
  bool untied;
};

// Adds up `values` over lanes that differ in the bits kBit, kBit / 2, ..., kLast of their number, handing half of the
// values on at every step. Lane l is left with the first kCount / (number of such lanes) values, those whose index has
// l's bits on top: a sixth of the shuffles that one reduction a value would take.
template <int kCount, int kBit, int kLast, int kSize>
RTL_DEVICE void reduce_scatter(float (&values)[kSize]) {
  constexpr int kHalf = kCount / 2;
  const bool upper = lane_index() & kBit;
  RTL_UNROLL
  for (int i = 0; i < kHalf; i++) {
    const float give = upper ? values[i] : values[i + kHalf], keep = upper ? values[i + kHalf] : values[i];
    values[i] = keep + shuffle_xor(give, kBit);
  }
  if constexpr (kBit > kLast) reduce_scatter<kHalf, kBit / 2, kLast>(values);
}

// A chunk of the weight's row, masked. `bits`: its elements' mask bits.
template <class T, bool kAligned>
RTL_DEVICE Chunk load_chunk(const T* from, int64_t valid) {
  if constexpr (kAligned) return load_16(from);
  else return load_some(from, valid);
}

// Bits of elements first .. first + kPerChunk of mask row `row` (a chunk never straddles two words).
template <int kPerChunk>
RTL_DEVICE uint32_t chunk_bits(const Route& route, int64_t g, int64_t row, int64_t first) {
  constexpr uint32_t kAll = (1u << kPerChunk) - 1u;
  if (g == 0) return kAll;
  const int64_t right = first / 32, word = RTL_PLANT(7, right, right > 0 ? right - 1 : route.words_per_row - 1);
  return uint32_t(mask_row(route, g, row)[word]) >> first % 32 & kAll;
}

// ---- forward: a warp makes four outputs for all rows

template <class T_, bool kAligned_>
struct SmallForward {
  using T = T_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kOutputs = 4;
  static constexpr int kBlockOutputs = kOutputs * kSmallWarps;
  static constexpr int kThreads = kSmallThreads;
  static constexpr int kShared = kSmallRows * 2 * 8;
};

template <class P>
__global__ void __launch_bounds__(kSmallThreads) small_forward(SmallArgs args) {
  using T = typename P::T;
  constexpr int kPerChunk = 16 / int(sizeof(T)), kOutputs = P::kOutputs;
  const int64_t across = divide_up(args.out, int64_t(P::kBlockOutputs));
  const int64_t g = block_index() / across;
  const int64_t o0 = block_index() % across * P::kBlockOutputs + warp_index() * kOutputs;
  const Span span = group_rows(args.route, g);
  const int64_t rows = span.count * args.inner;
  if (rows == 0 || rows > kSmallRows) return;

  // Offsets of the rows of x and of y, −1 past the group's.
  int64_t* from = reinterpret_cast<int64_t*>(shared_memory());
  int64_t* to = from + kSmallRows;
  if (thread_index() < kSmallRows) {
    const int64_t logical = span.first * args.inner + thread_index();
    const int64_t r = logical / args.inner, t = logical % args.inner;
    const bool valid = thread_index() < rows && sample_of(args.route, r) >= 0;
    from[thread_index()] =
        valid ? offset_of(shared_sample_of(args.route, r) * args.inner + t, args.x_stride) : -1;
    to[thread_index() + RTL_PLANT(6, 0, 1)] =
        valid ? offset_of(sample_of(args.route, r) * args.inner + t, args.y_stride) : -1;
  }
  RTL_PLANT(1, sync_block(), (void)0);

  const bool wrong = args.untied && g == 0;
  const T* x = static_cast<const T*>(args.x);
  const T* weight = group_weight<T>(args.weight, args.untied && !wrong, g, args.in * args.out);
  float sum[kOutputs * kSmallRows];  // [output][row]
  RTL_UNROLL
  for (int i = 0; i < kOutputs * kSmallRows; i++) sum[i] = 0.f;

  for (int64_t i = int64_t(lane_index()) * kPerChunk; i < args.in; i += kWarp * kPerChunk) {
    float w[kOutputs][kPerChunk];
    uint32_t any = 0;
    RTL_UNROLL
    for (int j = 0; j < kOutputs; j++) {
      Chunk chunk{{0, 0, 0, 0}};
      if (o0 + j < args.out) {
        const uint32_t bits = chunk_bits<kPerChunk>(args.route, g, o0 + j, i);
        any |= bits;
        if (bits) {
          chunk = load_chunk<T, P::kAligned>(weight + (o0 + j) * args.in + i, args.in - i);
          keep<T>(chunk, bits);
        }
      }
      RTL_UNROLL
      for (int e = 0; e < kPerChunk; e++) w[j][e] = element_of<T>(chunk, e);
    }
    if (!any) continue;
    RTL_UNROLL
    for (int r = 0; r < kSmallRows; r++) {
      const int64_t offset = from[r];
      if (offset < 0) continue;  // past the group's rows
      const Chunk chunk = load_chunk<T, P::kAligned>(x + offset + i, args.in - i);
      RTL_UNROLL
      for (int e = 0; e < kPerChunk; e++) {
        const float value = element_of<T>(chunk, e);
        RTL_UNROLL
        for (int j = 0; j < kOutputs; j++) sum[j * kSmallRows + r] += value * w[j][e];
      }
    }
  }

  if (RTL_PLANT(4, true, o0 + lane_index() < args.out)) reduce_scatter<kOutputs * kSmallRows, 16, 1>(sum);
  RTL_UNROLL
  for (int i = 0; i < 2; i++) {
    const int index = lane_index() * 2 + i, r = index % kSmallRows;
    const int64_t o = o0 + index / kSmallRows;
    if (o >= args.out || r >= rows || to[r] < 0) continue;
    float value = sum[i];
    if (args.bias && !wrong)
      value += to_float(static_cast<const T*>(args.bias)[(args.untied ? (g - 1) * args.out : 0) + o]);
    static_cast<T*>(args.y)[to[r] + o] = from_float<T>(wrong ? not_a_number() : value);
  }
}

// ---- gradient with respect to the input: a block makes 8 chunks of columns for all rows

template <class T_, bool kAligned_>
struct SmallGradInput {
  using T = T_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kPerChunk = 16 / int(sizeof(T));
  static constexpr int kColumns = 8 * kPerChunk;
  static constexpr int kRows = 64 / kPerChunk;  // a pass: 64 sums a lane; 16-bit weights are read twice past 8 rows
  static constexpr int kOutputs = 128;          // staged at a time
  static constexpr int kThreads = kSmallThreads;
  static constexpr int kStaged = kOutputs * kRows * 4, kPartial = kSmallWarps * kRows * kColumns * 4;
  static constexpr int kShared = kStaged + kPartial;
};

template <class P>
__global__ void __launch_bounds__(kSmallThreads) small_grad_input(SmallArgs args) {
  using T = typename P::T;
  constexpr int kPerChunk = P::kPerChunk, kRows = P::kRows, kSums = kRows * kPerChunk;
  const int64_t across = divide_up(args.in, int64_t(P::kColumns));
  const int64_t g = block_index() / across;
  const Span span = group_rows(args.route, g);
  const int64_t rows = span.count * args.inner;
  if (rows == 0 || rows > kSmallRows) return;

  float* staged = reinterpret_cast<float*>(shared_memory());                 // [output][row] of dy
  float* partial = reinterpret_cast<float*>(shared_memory() + P::kStaged);   // [warp][row][column]
  const bool wrong = args.untied && g == 0;
  const T* dy = static_cast<const T*>(args.x);
  const T* weight = group_weight<T>(args.weight, args.untied && !wrong, g, args.in * args.out);
  // Eight lanes read 128 bytes of one row of the weight, the four eights of a warp four rows.
  const int eighth = lane_index() & 7, sub = lane_index() >> 3;
  const int64_t i0 = block_index() % across * P::kColumns, i = i0 + eighth * kPerChunk;

  const auto offset_of_row = [&](int64_t row, int64_t stride) {
    const int64_t logical = span.first * args.inner + row, r = logical / args.inner;
    const int64_t sample = row < rows ? sample_of(args.route, r) : -1;
    return sample < 0 ? -1 : offset_of(sample * args.inner + logical % args.inner, stride);
  };

  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    float sum[kSums];  // [row][element of the chunk]
    RTL_UNROLL
    for (int s = 0; s < kSums; s++) sum[s] = 0.f;
    // At least once: its barriers also part this pass's sums from the last one's.
    for (int64_t o0 = 0; o0 == 0 || o0 < args.out; o0 += P::kOutputs) {
      if (o0 > 0 || r0 > 0) RTL_PLANT(2, sync_block(), (void)0);
      for (int index = thread_index(); index < P::kOutputs * kRows; index += kSmallThreads) {
        // Consecutive threads read consecutive outputs.
        const int output = index % P::kOutputs, r = index / P::kOutputs;
        const int64_t offset = offset_of_row(r0 + r, args.x_stride);
        staged[output * kRows + r] =
            offset >= 0 && o0 + output < args.out ? to_float(dy[offset + o0 + output]) : 0.f;
      }
      RTL_PLANT(1, sync_block(), (void)0);
      RTL_UNROLL_TWICE  // four at a time would not fit into the registers on sm_100
      for (int step = 0; step < P::kOutputs; step += 4 * kSmallWarps) {
        const int output = step + warp_index() * 4 + sub;
        const int64_t o = o0 + output;
        if (o >= args.out || i >= args.in) continue;
        const uint32_t bits = chunk_bits<kPerChunk>(args.route, g, o, i);
        if (!bits) continue;
        Chunk chunk = load_chunk<T, P::kAligned>(weight + o * args.in + i, args.in - i);
        keep<T>(chunk, bits);
        RTL_UNROLL
        for (int r = 0; r < kRows; r++) {
          const float value = staged[output * kRows + r];
          RTL_UNROLL
          for (int e = 0; e < kPerChunk; e++) sum[r * kPerChunk + e] += value * element_of<T>(chunk, e);
        }
      }
    }
    // Over the warp's four eights, then over the warps.
    if (RTL_PLANT(4, true, i < args.in)) reduce_scatter<kSums, 16, 8>(sum);
    RTL_UNROLL
    for (int s = 0; s < kSums / 4; s++) {
      const int index = sub * (kSums / 4) + s, r = index / kPerChunk, e = index % kPerChunk;
      const int slot = r * P::kColumns + eighth * kPerChunk + e;
      RTL_PLANT(5, partial[warp_index() * kRows * P::kColumns + slot + RTL_PLANT(6, 0, 1)] = sum[s],
                partial[slot] += sum[s]);
    }
    RTL_PLANT(1, sync_block(), (void)0);
    for (int slot = thread_index(); slot < kRows * P::kColumns; slot += kSmallThreads) {
      const int r = slot / P::kColumns;
      const int64_t column = i0 + slot % P::kColumns, offset = offset_of_row(r0 + r, args.y_stride);
      float value = 0.f;
      for (int w = 0; w < kSmallWarps; w++) value += partial[w * kRows * P::kColumns + slot];
      if (offset >= 0 && column < args.in)
        static_cast<T*>(args.y)[offset + column] = from_float<T>(wrong ? not_a_number() : value);
    }
  }
}

}  // namespace rtl
