// Tiles in shared memory and their way into the multiply, for the grouped matrix products (gemm.cuh,
// gemm_grad_weight.cuh). A warp owns kM · 16 rows and 32 columns of the result, whatever the arithmetic:
//
//   lane 4g + t holds, of each 16 × 8 piece, rows g and g + 8, columns 2t and 2t + 1
//
// which is how mma.sync leaves it. The exact float32 path keeps to the same ownership, so that loading, masking and
// writing back are written once.
#pragma once

#include "common.cuh"

namespace rtl {

constexpr int kDepth = 32;        // of a step through the reduced dimension: one mask word of a row
constexpr int kWarpColumns = 32;  // of the result, owned by a warp: one mask word as well
constexpr int kPieces = kWarpColumns / 8;

template <int kM>
struct Accumulator {
  float at[kM][kPieces][4];

  RTL_DEVICE void clear() {
    RTL_UNROLL
    for (int m = 0; m < kM; m++)
      RTL_UNROLL
      for (int n = 0; n < kPieces; n++)
        RTL_UNROLL
        for (int e = 0; e < 4; e++) at[m][n][e] = 0.f;
  }
};

// Row and column, within the warp's part, of element e of piece (m, n).
RTL_DEVICE int piece_row(int m, int e) { return m * 16 + (lane_index() >> 2) + (e >> 1) * 8; }
RTL_DEVICE int piece_column(int n, int e) { return n * 8 + (lane_index() & 3) * 2 + (e & 1); }

template <class T>
RTL_DEVICE T read(const unsigned char* shared) {
  return *reinterpret_cast<const T*>(shared);
}

// One element of a tile of T with rows of kRowBytes.
template <class T, int kRowBytes>
RTL_DEVICE const unsigned char* element_at(const unsigned char* tile, int row, int column) {
  constexpr int kPerChunk = 16 / int(sizeof(T));
  return tile + swizzled<kRowBytes>(row, column / kPerChunk) + column % kPerChunk * int(sizeof(T));
}

template <class T>
struct Mma;
template <>
struct Mma<half_t> {
  static RTL_DEVICE void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
};
template <>
struct Mma<bf16_t> {
  static RTL_DEVICE void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
};
template <>
struct Mma<float> {
  static RTL_DEVICE void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(c, a, b); }
};

// Both multiplies take 32 bytes of the reduced dimension at a time: 16 elements of 16 bits or 8 of 32.
template <class T>
constexpr int kSteps = kDepth * int(sizeof(T)) / 32;

template <class T>
RTL_DEVICE void round_fragment(T*, uint32_t*, int) {}
RTL_DEVICE void round_fragment(float*, uint32_t* registers, int count) {
  RTL_UNROLL
  for (int i = 0; i < count; i++) registers[i] = to_tf32(registers[i]);
}

// ---- fragments of the left factor

// From a tile [row][k]: rows `row`.. of step s.
template <class T, int kM>
RTL_DEVICE void left_by_rows(uint32_t (&a)[kM][4], const unsigned char* tile, int row, int s) {
  const int lane = lane_index();
  RTL_UNROLL
  for (int m = 0; m < kM; m++) {
    load_matrices(a[m], tile + swizzled<kDepth * int(sizeof(T))>(row + m * 16 + (lane & 15), 2 * s + (lane >> 4)));
    round_fragment(static_cast<T*>(nullptr), a[m], 4);
  }
}

// From a tile [k][row].
template <class T, int kM, int kRowBytes>
struct LeftByDepth {
  static RTL_DEVICE void load(uint32_t (&a)[kM][4], const unsigned char* tile, int row, int s) {
    const int lane = lane_index(), k = s * 16 + (lane >> 4) * 8 + (lane & 7);
    RTL_UNROLL
    for (int m = 0; m < kM; m++)
      load_matrices_transposed(a[m], tile + swizzled<kRowBytes>(k, (row + m * 16) / 8 + (lane >> 3 & 1)));
  }
};
template <int kM, int kRowBytes>
struct LeftByDepth<float, kM, kRowBytes> {
  // Matrix loads transpose 16-bit elements only.
  static RTL_DEVICE void load(uint32_t (&a)[kM][4], const unsigned char* tile, int row, int s) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    RTL_UNROLL
    for (int m = 0; m < kM; m++)
      RTL_UNROLL
      for (int r = 0; r < 4; r++) {
        const int k = s * 8 + t + (r >> 1) * 4, at = row + m * 16 + g + (r & 1) * 8;
        a[m][r] = to_tf32(read<uint32_t>(element_at<float, kRowBytes>(tile, k, at)));
      }
  }
};

// ---- fragments of the right factor

// From a tile [column][k].
template <class T>
RTL_DEVICE void right_by_columns(uint32_t (&b)[kPieces][2], const unsigned char* tile, int column, int s) {
  const int lane = lane_index();
  RTL_UNROLL
  for (int n = 0; n < kPieces; n += 2) {
    uint32_t out[4];
    load_matrices(out, tile + swizzled<kDepth * int(sizeof(T))>(column + n * 8 + (lane >> 4) * 8 + (lane & 7),
                                                               2 * s + (lane >> 3 & 1)));
    b[n][0] = out[0], b[n][1] = out[1], b[n + 1][0] = out[2], b[n + 1][1] = out[3];
  }
}

// From a tile [k][column].
template <class T, int kRowBytes>
struct RightByDepth {
  static RTL_DEVICE void load(uint32_t (&b)[kPieces][2], const unsigned char* tile, int column, int s) {
    const int lane = lane_index(), k = s * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
    RTL_UNROLL
    for (int n = 0; n < kPieces; n += 2) {
      uint32_t out[4];
      load_matrices_transposed(out, tile + swizzled<kRowBytes>(k, column / 8 + n + (lane >> 4)));
      b[n][0] = out[0], b[n][1] = out[1], b[n + 1][0] = out[2], b[n + 1][1] = out[3];
    }
  }
};
template <int kRowBytes>
struct RightByDepth<float, kRowBytes> {
  static RTL_DEVICE void load(uint32_t (&b)[kPieces][2], const unsigned char* tile, int column, int s) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    RTL_UNROLL
    for (int n = 0; n < kPieces; n++)
      RTL_UNROLL
      for (int r = 0; r < 2; r++)
        b[n][r] = read<uint32_t>(element_at<float, kRowBytes>(tile, s * 8 + t + r * 4, column + n * 8 + g));
  }
};

// ---- masks on fragments of the right factor, when it is the weight

// By columns: words[n] are the 32 bits, along k, of the lane's column g of piece n.
template <class T>
RTL_DEVICE void mask_by_columns(uint32_t (&b)[kPieces][2], const uint32_t (&words)[kPieces], int s) {
  const int t = lane_index() & 3;
  RTL_UNROLL
  for (int n = 0; n < kPieces; n++)
    RTL_UNROLL
    for (int r = 0; r < 2; r++)
      b[n][r] &= sizeof(T) == 2 ? spread_two(words[n] >> (s * 16 + r * 8 + 2 * t))
                                : spread_one(words[n] >> (s * 8 + r * 4 + t));
}

// By depth: words[k · stride] are the 32 bits, along the warp's columns, of row k.
template <class T>
RTL_DEVICE void mask_by_depth(uint32_t (&b)[kPieces][2], const uint32_t* words, int stride, int s) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  RTL_UNROLL
  for (int r = 0; r < 2; r++) {
    if (sizeof(T) == 2) {
      const int k = s * 16 + r * 8 + 2 * t;
      const uint32_t low = words[k * stride] >> g, high = words[(k + 1) * stride] >> g;
      RTL_UNROLL
      for (int n = 0; n < kPieces; n++) b[n][r] &= spread_two((low >> n * 8 & 1u) | (high >> n * 8 & 1u) << 1);
    } else {
      const uint32_t word = words[(s * 8 + r * 4 + t) * stride] >> g;
      RTL_UNROLL
      for (int n = 0; n < kPieces; n++) b[n][r] &= spread_one(word >> n * 8);
    }
  }
}

template <class T, int kM>
RTL_DEVICE void multiply(Accumulator<kM>& sum, const uint32_t (&a)[kM][4], const uint32_t (&b)[kPieces][2]) {
  RTL_UNROLL
  for (int m = 0; m < kM; m++)
    RTL_UNROLL
    for (int n = 0; n < kPieces; n++) Mma<T>::run(sum.at[m][n], a[m], b[n]);
}

// ---- the exact path: float32, one fused multiply-add after the other, k ascending

template <int kM>
RTL_DEVICE void add_product(Accumulator<kM>& sum, const float (&a)[kM][2], const float (&b)[kPieces][2]) {
  RTL_UNROLL
  for (int m = 0; m < kM; m++)
    RTL_UNROLL
    for (int n = 0; n < kPieces; n++)
      RTL_UNROLL
      for (int e = 0; e < 4; e++) sum.at[m][n][e] += a[m][e >> 1] * b[n][e & 1];
}

// The lane's two columns of row k of a tile [k][column].
template <int kRowBytes>
RTL_DEVICE void columns_of_row(float (&b)[kPieces][2], const unsigned char* tile, int k, int column) {
  struct alignas(8) Pair {
    float x, y;
  };
  RTL_UNROLL
  for (int n = 0; n < kPieces; n++) {
    const Pair pair = read<Pair>(element_at<float, kRowBytes>(tile, k, column + piece_column(n, 0)));
    b[n][0] = pair.x, b[n][1] = pair.y;
  }
}

}  // namespace rtl
