// What the kernels share: planted bugs, groups of rows, tiles, bits.
#pragma once

#include "primitives.cuh"

// RTL_PLANT(n, good, bad) is `good`, unless bug n has been planted (-DPLANT=n): then `bad`. The tests plant each and
// check that it is caught (tests/simt/test_plants.py); without PLANT nothing of it is left in the code.
//   1 a barrier missing before a use      4 a divergent shuffle           7 a wrong mask word
//   2 a barrier missing before a reuse    5 a plain add for a reduction   8 a wrong group boundary
//   3 a copy not waited for               6 one past shared memory        9 an offset in 32 bits
#if defined(PLANT)
#define RTL_PLANT(n, good, bad) ((PLANT) == (n) ? (bad) : (good))
#else
#define RTL_PLANT(n, good, bad) (good)
#endif

namespace rtl {

constexpr int kWarp = 32;

template <class T>
RTL_HOST_DEVICE constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}
RTL_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

RTL_DEVICE int lane_index() { return thread_index() & 31; }
RTL_DEVICE int warp_index() { return thread_index() >> 5; }

// row · stride, in 64 bits: a batch, or all masks, may hold more than 2³¹ elements.
RTL_DEVICE int64_t offset_of(int64_t row, int64_t stride) {
  return RTL_PLANT(9, row * stride, int64_t(int32_t(row) * int32_t(stride)));
}

// ---- groups: g = 0 are the rows without a mask, g the rows of mask g − 1

struct Span {
  int64_t first, count;
};

// The rows of group g. Offsets are taken as they come: whatever they hold, the span lies within the route.
RTL_DEVICE Span group_rows(const Route& route, int64_t g) {
  int64_t first = route.offsets[g], last = route.offsets[g + 1] + RTL_PLANT(8, 0, 1);
  first = first < 0 ? 0 : smaller(first, route.rows);
  last = last < first ? first : smaller(last, route.rows);
  return {first, last - first};
}

// Where row r is read and written; −1 if its entry of `order` names no sample.
RTL_DEVICE int64_t sample_of(const Route& route, int64_t row) {
  if (!route.order) return row;
  const int64_t sample = route.order[row];
  return sample >= 0 && sample < route.rows ? sample : -1;
}
// The same for a tensor that holds a sample once for all its repeats.
RTL_DEVICE int64_t shared_sample_of(const Route& route, int64_t row) {
  return route.repeat > 1 ? row % (route.rows / route.repeat) : sample_of(route, row);
}

struct Tile {
  int64_t group;  // −1: there is no such tile
  int64_t first;  // rows · inner, counted from the route's beginning
  int64_t count;  // rows of the group from `first` on: at least 1, possibly more than the tile holds
};

// Tile number `tile` when every group with more than `skip` rows is cut into tiles of `size` rows. The host knows no
// group's size, so it launches tile_limit() of them. Each warp finds its own: 32 groups at a time, by a prefix sum.
RTL_DEVICE Tile find_tile(const Route& route, int64_t tile, int64_t inner, int64_t size, int64_t skip) {
  const int lane = lane_index();
  const int64_t groups = route.masks + 1;
  for (int64_t base = 0; base < groups; base += kWarp) {
    const int64_t g = base + lane;
    Span span{0, 0};
    if (g < groups) span = group_rows(route, g);
    const int64_t rows = span.count * inner;
    const int64_t tiles = rows > skip ? divide_up(rows, size) : 0;
    int64_t before = tiles;  // an inclusive prefix sum
    for (int step = 1; step < kWarp; step *= 2) {
      int64_t left = 0;
      if (RTL_PLANT(4, true, g < groups)) left = shuffle_up(before, step);
      if (lane >= step) before += left;
    }
    const uint32_t reached = ballot(tile < before);
    if (reached != 0) {
      const int owner = first_set(reached);
      const int64_t skipped = shuffle(before - tiles, owner);
      const int64_t first = shuffle(span.first, owner), count = shuffle(rows, owner);
      const int64_t within = (tile - skipped) * size;
      return {base + owner, first * inner + within, count - within};
    }
    tile -= shuffle(before, kWarp - 1);
  }
  return {-1, 0, 0};
}

inline int64_t tile_limit(const Route& route, int64_t inner, int64_t size) {
  return route.rows * inner / size + route.masks + 1;
}

// The group of one row: the last that begins at or before it and is not empty.
RTL_DEVICE int64_t group_of_row(const Route& route, int64_t row) {
  int64_t low = 0, high = route.masks;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (route.offsets[middle] - RTL_PLANT(8, 0, 1) <= row) low = middle;
    else high = middle - 1;
  }
  return low;
}

// ---- masks

// Words of mask g − 1, row `row`.
RTL_DEVICE const int32_t* mask_row(const Route& route, int64_t g, int64_t row) {
  return route.words + offset_of((g - 1) * route.mask_rows + row, route.words_per_row);
}

// The weight of group g: shared, or its own.
template <class T>
RTL_DEVICE const T* group_weight(const void* weight, bool untied, int64_t g, int64_t size) {
  return static_cast<const T*>(weight) + (untied ? (g - 1) * size : 0);
}

// Two bits -> the masks of the two 16-bit halves of a register.
RTL_DEVICE uint32_t spread_two(uint32_t bits) { return ((bits & 1u) | (bits & 2u) << 15) * 0xFFFFu; }
RTL_DEVICE uint32_t spread_one(uint32_t bit) { return 0u - (bit & 1u); }

// The elements of a chunk that `bits` keeps; the others become +0 whatever they were (NaN too).
template <class T>
RTL_DEVICE void keep(Chunk& chunk, uint32_t bits) {
  RTL_UNROLL
  for (int i = 0; i < 4; i++) chunk.word[i] &= sizeof(T) == 4 ? spread_one(bits >> i) : spread_two(bits >> 2 * i);
}

template <class T>
RTL_DEVICE float element_of(const Chunk& chunk, int i) {
  if (sizeof(T) == 4) return bits_float(chunk.word[i]);
  T value;
  value.bits = uint16_t(chunk.word[i / 2] >> (i % 2 * 16));
  return to_float(value);
}
template <>
RTL_DEVICE float element_of<float>(const Chunk& chunk, int i) {
  return bits_float(chunk.word[i]);
}

template <class T>
RTL_DEVICE uint32_t bits_of(T value) {
  return value.bits;
}
template <>
RTL_DEVICE uint32_t bits_of<float>(float value) {
  return float_bits(value);
}

// `count` elements (0 .. 16 / sizeof(T)) from an address of no particular alignment; the rest are zero.
template <class T>
RTL_DEVICE Chunk load_some(const T* from, int64_t count) {
  Chunk chunk{{0, 0, 0, 0}};
  constexpr int kPerWord = 4 / int(sizeof(T));
  RTL_UNROLL
  for (int i = 0; i < 16 / int(sizeof(T)); i++)
    if (i < count) chunk.word[i / kPerWord] |= bits_of(from[i]) << (i % kPerWord * 16);
  return chunk;
}

// What rows without a mask get where weights are untied: an error, and raising it would mean waiting for the device.
RTL_DEVICE float not_a_number() { return bits_float(0x7FC00000u); }

// ---- shared memory

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile whose rows are `kRowBytes` long. Chunks change places
// with the row, so that eight consecutive rows' equal chunks lie in different banks.
template <int kRowBytes>
RTL_DEVICE int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "rows of whole bank cycles, or half of one");
  return row * kRowBytes + ((chunk ^ (kRowBytes == 64 ? row >> 1 & 3 : row & 7)) << 4);
}

}  // namespace rtl
