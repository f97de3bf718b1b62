// The inner loops for vectors of RTL_VECTOR_BYTES bytes, in namespace RTL_LEVEL; see kernels.h for what they compute.
// Included once by each level_*.cpp, which is compiled with that instruction set's flags.
#include "kernels.h"

#if RTL_VECTOR_BYTES >= 32
#include <immintrin.h>  // nothing but functions that are always inlined
#endif

#define RTL_INLINE inline __attribute__((always_inline))

namespace rtl_kernels {
namespace RTL_LEVEL {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(RTL_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = RTL_VECTOR_BYTES / sizeof(T);
};

template <class T>
RTL_INLINE typename Vector<T>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::type*>(p);
}

template <class T>
RTL_INLINE void store(T* p, typename Vector<T>::type v) {
  *reinterpret_cast<typename Vector<T>::type*>(p) = v;
}

// Past the caches, for what is larger than they are: an ordinary store would first read what it overwrites.
#if RTL_VECTOR_BYTES == 64
RTL_INLINE void stream(float* p, Vector<float>::type v) { _mm512_stream_ps(p, (__m512)v); }
RTL_INLINE void stream(double* p, Vector<double>::type v) { _mm512_stream_pd(p, (__m512d)v); }
RTL_INLINE void fence() { _mm_sfence(); }
#elif RTL_VECTOR_BYTES == 32
RTL_INLINE void stream(float* p, Vector<float>::type v) { _mm256_stream_ps(p, (__m256)v); }
RTL_INLINE void stream(double* p, Vector<double>::type v) { _mm256_stream_pd(p, (__m256d)v); }
RTL_INLINE void fence() { _mm_sfence(); }
#else
template <class T>
RTL_INLINE void stream(T* p, typename Vector<T>::type v) {
  store(p, v);
}
RTL_INLINE void fence() {}
#endif

// Vectors of a cache line: what goes past the caches goes in whole ones.
constexpr int kLineVectors = 64 / RTL_VECTOR_BYTES;

// A vector that several instructions use, kept in a register: GCC would load it anew for each of them, and loads are what
// the kernels wait for.
template <class V>
RTL_INLINE V held(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// An address that instructions add constants to: GCC would keep a register, or a place on the stack, for each of them.
template <class T>
RTL_INLINE const T* held_address(const T* p) {
  asm("" : "+r"(p));
  return p;
}

template <class T>
RTL_INLINE typename Vector<T>::type splat(T value) {
  return value - typename Vector<T>::type{};
}

// max(0, v), and NaN where v is: vectors and halves.
template <class V>
RTL_INLINE V relu(V v) {
  return v < V{} ? V{} : v;
}

// Half a vector, where that costs half as much (512-bit operations are two halves inside): ragged groups end in one.
#if RTL_VECTOR_BYTES == 64
constexpr bool kHalves = true;
#else
constexpr bool kHalves = false;
#endif
template <class T>
struct Half {
  typedef T type __attribute__((vector_size(RTL_VECTOR_BYTES / 2), aligned(sizeof(T)), may_alias));
};

RTL_INLINE Half<float>::type low(const Vector<float>::type& v) {
#if RTL_VECTOR_BYTES == 64
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return *reinterpret_cast<const Half<float>::type*>(&v);
#endif
}

RTL_INLINE Half<double>::type low(const Vector<double>::type& v) {
#if RTL_VECTOR_BYTES == 64
  return __builtin_shufflevector(v, v, 0, 1, 2, 3);
#else
  return *reinterpret_cast<const Half<double>::type*>(&v);
#endif
}

// Every second element of a and b, from element First on.
template <class V, int L, int First>
RTL_INLINE V every_second(V a, V b) {
#define RTL_E(i) First + 2 * (i)
  if constexpr (L == 16)
    return __builtin_shufflevector(a, b, RTL_E(0), RTL_E(1), RTL_E(2), RTL_E(3), RTL_E(4), RTL_E(5), RTL_E(6), RTL_E(7),
                                   RTL_E(8), RTL_E(9), RTL_E(10), RTL_E(11), RTL_E(12), RTL_E(13), RTL_E(14), RTL_E(15));
  else if constexpr (L == 8)
    return __builtin_shufflevector(a, b, RTL_E(0), RTL_E(1), RTL_E(2), RTL_E(3), RTL_E(4), RTL_E(5), RTL_E(6), RTL_E(7));
  else if constexpr (L == 4)
    return __builtin_shufflevector(a, b, RTL_E(0), RTL_E(1), RTL_E(2), RTL_E(3));
  else
    return __builtin_shufflevector(a, b, RTL_E(0), RTL_E(1));
#undef RTL_E
}

template <class T>
RTL_INLINE T total(typename Vector<T>::type v) {
  // Halves onto one another, so the order of additions is fixed.
  T part[Vector<T>::lanes];
  store(part, v);
#pragma GCC unroll 16
  for (int half = Vector<T>::lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

#if RTL_REGISTERS >= 32
constexpr int kBlockRows = 4;
#else
constexpr int kBlockRows = 2;
#endif

// ---- y = w · x

// Sums of R rows over V vectors of columns and, with H, half a vector.
template <class T, int R, int V, int H>
struct Sums {
  typename Vector<T>::type full[R][V ? V : 1];
  typename Half<T>::type half[R];
};

// Four indices in one load: these are as scarce as the multiply-adds. With more columns registers are.
template <int V>
constexpr bool kFourIndices = V <= 5;

RTL_INLINE uint64_t four_indices(const uint16_t* index) {
  uint64_t four;
  __builtin_memcpy(&four, index, sizeof(four));
  return four;
}

// One input of pattern P.
template <class T, int P, int R, int V, int H>
RTL_INLINE void add_input(Sums<T, R, V, H>& to, const Multiply<T>& m, const T* x, const T* w, uint32_t j) {
  constexpr int L = Vector<T>::lanes;
  const int64_t row = m.w_row;
  const T* xj = held_address(x + int64_t(j) * m.x_stride);
  const T* wj = w + int64_t(j) * m.w_stride;
#if RTL_REGISTERS >= 32
  typename Vector<T>::type column[V ? V : 1];
  typename Half<T>::type rest{};
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) column[v] = load(xj + v * L);
  if (H) rest = *reinterpret_cast<const typename Half<T>::type*>(xj + V * L);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (P >> r & 1) {
      const typename Vector<T>::type value = splat(wj[r * row]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) to.full[r][v] += value * column[v];
      if (H) to.half[r] += low(value) * rest;
    }
  }
#else
  // The weights are held and the columns pass, of which one register is left.
  constexpr int kept = __builtin_popcount(P);
  typename Vector<T>::type value[kept];
  int i = 0;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    if (P >> r & 1) value[i++] = splat(wj[r * row]);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    typename Vector<T>::type column = load(xj + v * L);
    if (kept > 1) column = held(column);
    i = 0;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      if (P >> r & 1) to.full[r][v] += value[i++] * column;
  }
#endif
}

// Inputs of one pattern. With few columns a row's sum would wait for the 4 cycles of each multiply-add, so U independent
// sums take turns; they are added in a fixed order at the end.
template <class T, int R, int V, int H, int U, int P>
RTL_INLINE void bucket(Sums<T, R, V, H> (&sum)[U], const Multiply<T>& m, const T* x, const T* w,
                       const uint16_t*& index, uint32_t count) {
  const uint16_t* end = index + count;
#if RTL_REGISTERS >= 32
  if (U > 1) {
    for (; end - index >= U; index += U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) add_input<T, P>(sum[u], m, x, w, index[u]);
    }
  }
#else
  for (; kFourIndices<V> && end - index >= 4; index += 4) {
    const uint64_t four = four_indices(index);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) add_input<T, P>(sum[u % U], m, x, w, four >> (16 * u) & 0xffff);
  }
#endif
  for (; index != end; ++index) add_input<T, P>(sum[0], m, x, w, *index);
}

// The inputs of either row of a block of two, one of each in turn: what is added to one waits for the one before.
template <class T, int V, int H, int U>
RTL_INLINE void single_buckets(Sums<T, 2, V, H> (&sum)[U], const Multiply<T>& m, const T* x, const T* w,
                               const uint16_t*& index, const uint32_t* counts) {
  const uint16_t* second = index + counts[1];
  uint32_t both = counts[1] < counts[2] ? counts[1] : counts[2];
  const uint32_t first_left = counts[1] - both, second_left = counts[2] - both;
  const uint16_t* const end = index + both;
  for (; kFourIndices<V> && end - index >= 4; index += 4, second += 4) {
    const uint64_t first_four = four_indices(index), second_four = four_indices(second);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      add_input<T, 1>(sum[u % U], m, x, w, first_four >> (16 * u) & 0xffff);
      add_input<T, 2>(sum[u % U], m, x, w, second_four >> (16 * u) & 0xffff);
    }
  }
  for (; index != end; ++index, ++second) {
    add_input<T, 1>(sum[0], m, x, w, *index);
    add_input<T, 2>(sum[0], m, x, w, *second);
  }
  bucket<T, 2, V, H, U, 1>(sum, m, x, w, index, first_left);
  index = second;
  bucket<T, 2, V, H, U, 2>(sum, m, x, w, index, second_left);
}

// A block's share of what is needed next.
template <class T>
RTL_INLINE void fetch_ahead(const Multiply<T>& m, int64_t block, int64_t blocks) {
  const int64_t lines = m.ahead_to - m.ahead_from;
  int64_t line = m.ahead_from + lines * block / blocks;
  const int64_t end = m.ahead_from + lines * (block + 1) / blocks;
  if (line == end) return;
  const T* const* row = m.ahead + line / m.ahead_lines;
  for (int64_t at = line % m.ahead_lines; line < end; ++line) {
    __builtin_prefetch(reinterpret_cast<const char*>(*row) + at * 64, 0, 2);
    if (++at == m.ahead_lines) at = 0, ++row;
  }
}

// Rows r0, … of y from their sums; with `add` to what is there, with `last` what is done to the whole sum. What is asked
// once for a row is not asked for every vector: with few inputs that would take as long as they do.
template <class T, int R, int V, int H, int U>
RTL_INLINE void finish(const Multiply<T>& m, Sums<T, R, V, H> (&sum)[U], int64_t r0, bool add, bool last, T* y) {
  constexpr int L = Vector<T>::lanes;
  const bool affine = last && (m.scale || m.bias), act = last && m.relu;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (r0 + r >= m.rows) break;
    T* out = y + (r0 + r) * m.y_row;
    auto& s = sum[0].full[r];
    auto& end = sum[0].half[r];
    auto& out_end = *reinterpret_cast<typename Half<T>::type*>(out + V * L);
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) s[v] += sum[u].full[r][v];
      if (H) end += sum[u].half[r];
    }
    if (add) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) s[v] += load(out + v * L);
      if (H) end += out_end;
    }
    if (affine) {
      const typename Vector<T>::type scale = splat(m.scale ? m.scale[r0 + r] : T(1));
      const typename Vector<T>::type bias = splat(m.bias ? m.bias[r0 + r] : T(0));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) s[v] = s[v] * scale + bias;
      if (H) end = end * low(scale) + low(bias);
    }
    if (act) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) s[v] = relu(s[v]);
      if (H) end = relu(end);
    }
    if (m.stream) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) stream(out + v * L, s[v]);
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(out + v * L, s[v]);
    }
    if (H) out_end = end;
  }
}

template <class T, int R, int V, int H, int U>
__attribute__((noinline)) void multiply_columns(const Multiply<T>& m, int64_t tile, const T* x, T* y) {
  const int64_t start = tile * m.kept.tile_inputs;
  const bool ahead = m.ahead && tile == m.kept.first_tile && x == m.x;
  x += start * m.x_stride;
  const bool last = tile + 1 == m.kept.tiles;
  for (int64_t r0 = 0; r0 < m.rows; r0 += R) {
    const uint32_t* counts = m.kept.counts + ((tile * m.kept.blocks + r0 / R) << R);
    const uint16_t* index = m.kept.index + counts[0];
    const T* w = m.w + r0 * m.w_row + start * m.w_stride;
    if (ahead) fetch_ahead(m, r0 / R, (m.rows + R - 1) / R);
    Sums<T, R, V, H> sum[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[u].full[r][v] = typename Vector<T>::type{};
        if (H) sum[u].half[r] = typename Half<T>::type{};
      }
    if constexpr (R == 2) {
      single_buckets<T>(sum, m, x, w, index, counts);
    } else {
      bucket<T, R, V, H, U, 1>(sum, m, x, w, index, counts[1]);
      if constexpr (R > 1) bucket<T, R, V, H, U, 2>(sum, m, x, w, index, counts[2]);
    }
    if constexpr (R > 1) bucket<T, R, V, H, U, 3>(sum, m, x, w, index, counts[3]);
    if constexpr (R > 2) {
      bucket<T, R, V, H, U, 4>(sum, m, x, w, index, counts[4]);
      bucket<T, R, V, H, U, 5>(sum, m, x, w, index, counts[5]);
      bucket<T, R, V, H, U, 6>(sum, m, x, w, index, counts[6]);
      bucket<T, R, V, H, U, 7>(sum, m, x, w, index, counts[7]);
      bucket<T, R, V, H, U, 8>(sum, m, x, w, index, counts[8]);
      bucket<T, R, V, H, U, 9>(sum, m, x, w, index, counts[9]);
      bucket<T, R, V, H, U, 10>(sum, m, x, w, index, counts[10]);
      bucket<T, R, V, H, U, 11>(sum, m, x, w, index, counts[11]);
      bucket<T, R, V, H, U, 12>(sum, m, x, w, index, counts[12]);
      bucket<T, R, V, H, U, 13>(sum, m, x, w, index, counts[13]);
      bucket<T, R, V, H, U, 14>(sum, m, x, w, index, counts[14]);
      bucket<T, R, V, H, U, 15>(sum, m, x, w, index, counts[15]);
    }
    finish<T, R, V, H, U>(m, sum, r0, tile > 0, last, y);
  }
}

// The same of one row at a time: where little is kept, entering 15 buckets for every block costs more than loading an
// input once for each of its rows.
template <class T, int V, int H, int U>
__attribute__((noinline)) void multiply_lists(const Multiply<T>& m, int64_t tile, const T* x, T* y) {
  constexpr int L = Vector<T>::lanes;
  const int64_t step = m.x_stride;
  const bool ahead = m.ahead && tile == m.kept.first_tile && x == m.x;
  for (int64_t r = 0; r < m.rows; ++r) {
    const uint32_t* starts = m.kept.counts + tile * m.kept.blocks + r;
    const uint16_t* index = m.kept.index + starts[0];
    const uint16_t* end = m.kept.index + starts[1];
    const T* w = m.w + r * m.w_row;
    if (ahead) fetch_ahead(m, r, m.rows);
    Sums<T, 1, V, H> sum[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[u].full[0][v] = typename Vector<T>::type{};
      if (H) sum[u].half[0] = typename Half<T>::type{};
    }
    auto one = [&](int64_t j, Sums<T, 1, V, H>& to) __attribute__((always_inline)) {
      const T* xj = x + j * step;
      const typename Vector<T>::type value = splat(w[j * m.w_stride]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) to.full[0][v] += value * load(xj + v * L);
      if (H) to.half[0] += low(value) * *reinterpret_cast<const typename Half<T>::type*>(xj + V * L);
    };
    for (; end - index >= 4; index += 4) {
      const uint64_t four = four_indices(index);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) one(four >> (16 * u) & 0xffff, sum[u % U]);
    }
    for (; index != end; ++index) one(*index, sum[0]);
    finish<T, 1, V, H, U>(m, sum, r, tile > 0, tile + 1 == m.kept.tiles, y);
  }
}

// 24 sums, 6 inputs and a weight fill 31 of 32 registers; 12 sums, two weights and an input 15 of 16.
constexpr int kVectors = 6;

// Columns [0, take), all tiles; `take` is what `multiply` cuts.
template <class T, int R>
void multiply_cut(const Multiply<T>& m, int64_t take, const T* x, T* y) {
  constexpr int L = Vector<T>::lanes, kGranule = kHalves ? L / 2 : L;
#define RTL_COLUMNS(V, H, U) multiply_columns<T, R, V, H, U>(m, t, x, y)
  for (int64_t t = m.kept.first_tile; t < m.kept.tiles; ++t) {
    switch (take / kGranule) {
#if RTL_VECTOR_BYTES == 64
      case 1: RTL_COLUMNS(0, 1, 4); break;
      case 2: RTL_COLUMNS(1, 0, 4); break;
      case 3: RTL_COLUMNS(1, 1, 2); break;
      case 4: RTL_COLUMNS(2, 0, 2); break;
      case 5: RTL_COLUMNS(2, 1, (R == 1 ? 2 : 1)); break;
      case 6: RTL_COLUMNS(3, 0, (R == 1 ? 2 : 1)); break;
      case 7: RTL_COLUMNS(3, 1, 1); break;
      case 8: RTL_COLUMNS(4, 0, 1); break;
      case 9: RTL_COLUMNS(4, 1, 1); break;
      case 10: RTL_COLUMNS(5, 0, 1); break;
      case 11: RTL_COLUMNS(5, 1, 1); break;
      case 12: RTL_COLUMNS(6, 0, 1); break;
      default: RTL_COLUMNS((R == 1 ? 16 : 6), 0, 1); break;
#elif RTL_REGISTERS >= 32
      case 1: RTL_COLUMNS(1, 0, 4); break;
      case 2: RTL_COLUMNS(2, 0, 2); break;
      case 3: RTL_COLUMNS(3, 0, 1); break;
      case 4: RTL_COLUMNS(4, 0, 1); break;
      case 5: RTL_COLUMNS(5, 0, 1); break;
      default: RTL_COLUMNS(6, 0, 1); break;
#else
      case 1: RTL_COLUMNS(1, 0, 4); break;
      case 2: RTL_COLUMNS(2, 0, (R == 1 ? 4 : 2)); break;
      case 3: RTL_COLUMNS(3, 0, (R == 1 ? 4 : 2)); break;
      case 4: RTL_COLUMNS(4, 0, (R == 1 ? 2 : 1)); break;
      case 5: RTL_COLUMNS(5, 0, (R == 1 ? 2 : 1)); break;
      default: RTL_COLUMNS(6, 0, (R == 1 ? 2 : 1)); break;
#endif
    }
  }
#undef RTL_COLUMNS
}

constexpr int kListVectors = 6;

// As multiply_cut, through lists.
template <class T>
void multiply_list_cut(const Multiply<T>& m, int64_t take, const T* x, T* y) {
  constexpr int L = Vector<T>::lanes, kGranule = kHalves ? L / 2 : L;
  for (int64_t t = m.kept.first_tile; t < m.kept.tiles; ++t) {
#define RTL_COLUMNS(V, H, U) multiply_lists<T, V, H, U>(m, t, x, y)
    switch (take / kGranule) {
#if RTL_VECTOR_BYTES == 64
      case 1: RTL_COLUMNS(0, 1, 4); break;
      case 2: RTL_COLUMNS(1, 0, 4); break;
      case 3: RTL_COLUMNS(1, 1, 4); break;
      case 4: RTL_COLUMNS(2, 0, 4); break;
      case 5: RTL_COLUMNS(2, 1, 2); break;
      case 6: RTL_COLUMNS(3, 0, 2); break;
      case 7: RTL_COLUMNS(3, 1, 2); break;
      case 8: RTL_COLUMNS(4, 0, 2); break;
      case 9: RTL_COLUMNS(4, 1, 2); break;
      case 10: RTL_COLUMNS(5, 0, 2); break;
      case 11: RTL_COLUMNS(5, 1, 2); break;
      default: RTL_COLUMNS(6, 0, 2); break;
#else
      case 1: RTL_COLUMNS(1, 0, 4); break;
      case 2: RTL_COLUMNS(2, 0, 4); break;
      case 3: RTL_COLUMNS(3, 0, 4); break;
      case 4: RTL_COLUMNS(4, 0, 2); break;
      case 5: RTL_COLUMNS(5, 0, 2); break;
      default: RTL_COLUMNS(6, 0, 2); break;
#endif
    }
#undef RTL_COLUMNS
  }
}

template <class T>
void multiply(const Multiply<T>& m) {
  constexpr int L = Vector<T>::lanes;
  const bool single = m.kept.block_rows == 1, lists = m.kept.block_rows == 0;
  for (int64_t c = 0; c < m.columns;) {
    const int64_t left = m.columns - c;
    // 7 or 8 vectors go as 4 + 3 or 4 + 4: 6 + 1 would leave a lone vector that waits for its own sums. A single row has
    // registers for 16.
    int64_t take = left <= kVectors * L ? left : left <= 8 * L ? 4 * L : kVectors * L;
    if (single && RTL_VECTOR_BYTES == 64 && left >= 16 * L) take = 16 * L;
    if (lists) {
      // So many that a tile of the inputs stays in L2 beside all else, in as many equal parts as that takes.
      const int64_t room = (128 << 10) / (m.kept.tile_inputs * int64_t(sizeof(T))) / L * L;
      const int64_t most = room < 2 * L ? 2 * L : room < kListVectors * L ? room : kListVectors * L;
      const int64_t parts = (left + most - 1) / most;
      take = ((left + parts - 1) / parts + L - 1) / L * L;
      take = left < take ? left : take;
    }
    if (lists)
      multiply_list_cut<T>(m, take, m.x + c, m.y + c);
    else if (single)
      multiply_cut<T, 1>(m, take, m.x + c, m.y + c);
    else
      multiply_cut<T, kBlockRows>(m, take, m.x + c, m.y + c);
    c += take;
  }
}

// ---- copies of short rows, for which a call of memcpy each would cost more than the bytes

template <int N>
struct Int {
  static constexpr int value = N;
};

template <class T, int Bytes>
RTL_INLINE void copy_bytes(const T* from, T* to) {
  typedef char V __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  *reinterpret_cast<V*>(to) = *reinterpret_cast<const V*>(from);
}

// ---- a mask's bits on vectors; i, the place of a row's first lane, is a multiple of the lanes, which divide 32

template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef uint32_t type __attribute__((vector_size(RTL_VECTOR_BYTES)));
};
template <>
struct Bits<double> {
  typedef uint64_t type __attribute__((vector_size(RTL_VECTOR_BYTES)));
};

#if RTL_VECTOR_BYTES == 64
typedef uint16_t Part16 __attribute__((may_alias));
typedef uint8_t Part8 __attribute__((may_alias));

// The lanes that a row's words keep, zero elsewhere, whatever stands there: those of inputs i to i + lanes.
template <class T>
struct KeptLanes {
  int64_t i;
  explicit RTL_INLINE KeptLanes(int64_t i) : i(i) {}
  RTL_INLINE typename Vector<T>::type of(typename Vector<T>::type v, const uint32_t* words) const {
    if constexpr (sizeof(T) == 4)
      return (typename Vector<T>::type)_mm512_maskz_mov_ps(reinterpret_cast<const Part16*>(words)[i / 16], (__m512)v);
    else
      return (typename Vector<T>::type)_mm512_maskz_mov_pd(reinterpret_cast<const Part8*>(words)[i / 8], (__m512d)v);
  }
};
RTL_INLINE Vector<float>::type load_kept(const float* w, const uint32_t* words, uint64_t i) {
  return (Vector<float>::type)_mm512_maskz_loadu_ps(reinterpret_cast<const Part16*>(words)[i / 16], w + i);
}
RTL_INLINE Vector<double>::type load_kept(const double* w, const uint32_t* words, uint64_t i) {
  return (Vector<double>::type)_mm512_maskz_loadu_pd(reinterpret_cast<const Part8*>(words)[i / 8], w + i);
}
#else
template <class T>
struct KeptLanes {
  typedef typename Bits<T>::type B;
  int64_t word;
  B lane;
  explicit RTL_INLINE KeptLanes(uint64_t i) : word(i / 32) {
#pragma GCC unroll 16
    for (int l = 0; l < Vector<T>::lanes; ++l) lane[l] = 1u << l;
    lane <<= i % 32;
  }
  RTL_INLINE typename Vector<T>::type of(typename Vector<T>::type v, const uint32_t* words) const {
    const B bits = (B)(((words[word] - B{}) & lane) == lane);
    return (typename Vector<T>::type)((B)v & bits);
  }
};
template <class T>
RTL_INLINE typename Vector<T>::type load_kept(const T* w, const uint32_t* words, uint64_t i) {
  return KeptLanes<T>(i).of(load(w + i), words);
}
#endif

#if RTL_VECTOR_BYTES == 32
// A word of a mask in all lanes, its last bit their highest. Shifted by next_lanes, the highest bits are those of the word's
// last inputs, and what a masked load asks; then it is shifted by the lanes, for the inputs before.
template <class T>
RTL_INLINE typename Bits<T>::type word_of(uint32_t word) {
  typedef typename Bits<T>::type B;
  return ((sizeof(T) == 4 ? word : uint64_t(word) << 32) - B{});
}
template <class T>
RTL_INLINE typename Bits<T>::type next_lanes() {
  typename Bits<T>::type shift;
#pragma GCC unroll 8
  for (int l = 0; l < Vector<T>::lanes; ++l) shift[l] = Vector<T>::lanes - 1 - l;
  return shift;
}
RTL_INLINE Vector<float>::type load_highest(const float* w, Bits<float>::type bits) {
  return (Vector<float>::type)_mm256_maskload_ps(w, (__m256i)bits);
}
RTL_INLINE Vector<double>::type load_highest(const double* w, Bits<double>::type bits) {
  return (Vector<double>::type)_mm256_maskload_pd(w, (__m256i)bits);
}
#endif

// ---- transposes

template <int... I>
struct Indices {};
template <int L>
struct AllOf;
template <>
struct AllOf<8> : Indices<0, 1, 2, 3, 4, 5, 6, 7> {};
template <>
struct AllOf<16> : Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> {};

// Of 8 or 16 lanes, in quarters of four: the even quarters (First = 0) or the odd ones (1) of a and then of b.
template <int First, class V, int... I>
RTL_INLINE V quarters_of(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, ((I / 4 * 2 + First) * 4 + I % 4)...);
}
// The lower (0) or upper (2) two elements of every quarter, of a and b in turn: one by one, or two by two.
template <int First, class V, int... I>
RTL_INLINE V ones_of(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * int(sizeof...(I)) + I / 4 * 4 + I % 4 / 2 + First)...);
}
template <int First, class V, int... I>
RTL_INLINE V twos_of(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I % 4 / 2 * int(sizeof...(I)) + I / 4 * 4 + I % 2 + First)...);
}
#define RTL_EVEN(a, b) quarters_of<0>(a, b, AllOf<L>{})
#define RTL_ODD(a, b) quarters_of<1>(a, b, AllOf<L>{})
#define RTL_LOW(a, b) ones_of<0>(a, b, AllOf<L>{})
#define RTL_HIGH(a, b) ones_of<2>(a, b, AllOf<L>{})
#define RTL_LOW2(a, b) twos_of<0>(a, b, AllOf<L>{})
#define RTL_HIGH2(a, b) twos_of<2>(a, b, AllOf<L>{})

// Square transpose of L vectors in log2(L) steps: step d swaps the off-diagonal d × d blocks.
template <class V, int L, int D, int... I>
RTL_INLINE void swap_blocks(V& a, V& b) {
  const V low = __builtin_shufflevector(a, b, (I & D ? L + I - D : I)...);
  b = __builtin_shufflevector(a, b, (I & D ? L + I : I + D)...);
  a = low;
}

template <class T, int D>
RTL_INLINE void transpose_step(typename Vector<T>::type (&v)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type V;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (!(i & D)) {
      if constexpr (L == 4)
        swap_blocks<V, L, D, 0, 1, 2, 3>(v[i], v[i + D]);
      else
        swap_blocks<V, L, D, 0, 1>(v[i], v[i + D]);
    }
  }
}

template <class T>
RTL_INLINE void transpose(typename Vector<T>::type (&v)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
  if constexpr (L == 16) {
    // First the 4 × 4 quarters of 128 bits, then inside them: moves of quarters and interleavings alone, which need no
    // index in a register.
    typedef typename Vector<T>::type V;
    V t[16];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V a = RTL_EVEN(v[j], v[j + 4]), b = RTL_ODD(v[j], v[j + 4]);
      const V c = RTL_EVEN(v[j + 8], v[j + 12]), d = RTL_ODD(v[j + 8], v[j + 12]);
      t[j] = RTL_EVEN(a, c), t[4 + j] = RTL_EVEN(b, d), t[8 + j] = RTL_ODD(a, c), t[12 + j] = RTL_ODD(b, d);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 16; q += 4) {
      const V a = RTL_LOW(t[q], t[q + 1]), b = RTL_HIGH(t[q], t[q + 1]);
      const V c = RTL_LOW(t[q + 2], t[q + 3]), d = RTL_HIGH(t[q + 2], t[q + 3]);
      v[q] = RTL_LOW2(a, c), v[q + 1] = RTL_HIGH2(a, c), v[q + 2] = RTL_LOW2(b, d), v[q + 3] = RTL_HIGH2(b, d);
    }
  } else if constexpr (L == 8) {
    typedef typename Vector<T>::type V;
    V t[8];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) t[j] = RTL_EVEN(v[j], v[j + 4]), t[4 + j] = RTL_ODD(v[j], v[j + 4]);
#pragma GCC unroll 2
    for (int q = 0; q < 8; q += 4) {
      const V a = RTL_LOW(t[q], t[q + 1]), b = RTL_HIGH(t[q], t[q + 1]);
      const V c = RTL_LOW(t[q + 2], t[q + 3]), d = RTL_HIGH(t[q + 2], t[q + 3]);
      v[q] = RTL_LOW2(a, c), v[q + 1] = RTL_HIGH2(a, c), v[q + 2] = RTL_LOW2(b, d), v[q + 3] = RTL_HIGH2(b, d);
    }
  } else {
    transpose_step<T, 1>(v);
    if constexpr (L > 2) transpose_step<T, 2>(v);
  }
}

// Lane l of the result is the sum of the lanes of v[l], added in a fixed order.
template <class T>
RTL_INLINE typename Vector<T>::type totals(typename Vector<T>::type (&v)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type V;
  if constexpr (L >= 8) {
    // Inside the quarters first, four vectors into one, then across the quarters.
    V q[L / 4];
#pragma GCC unroll 4
    for (int i = 0; i < L / 4; ++i) {
      const V a = RTL_LOW(v[4 * i], v[4 * i + 1]) + RTL_HIGH(v[4 * i], v[4 * i + 1]);
      const V b = RTL_LOW(v[4 * i + 2], v[4 * i + 3]) + RTL_HIGH(v[4 * i + 2], v[4 * i + 3]);
      q[i] = RTL_LOW2(a, b) + RTL_HIGH2(a, b);
    }
    const V a = RTL_EVEN(q[0], q[1]) + RTL_ODD(q[0], q[1]);
    if constexpr (L == 8) return a;
    const V b = RTL_EVEN(q[L / 4 - 2], q[L / 4 - 1]) + RTL_ODD(q[L / 4 - 2], q[L / 4 - 1]);
    return RTL_EVEN(a, b) + RTL_ODD(a, b);
  } else {
    transpose<T>(v);
#pragma GCC unroll 16
    for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 16
      for (int l = 0; l < half; ++l) v[l] += v[l + half];
    return v[0];
  }
}

// ---- g = dy · xᵀ at kept positions

// Q inputs of one pattern against its rows: Q · popcount(P) dot products along the columns at once, so that Q inputs
// share each load of dy and the rows each load of x.
template <class T, int Q, int P, bool Table>
RTL_INLINE void block_dots(const Correlate<T>& m, int64_t start, const T* dy, T* g, const uint16_t* index) {
  constexpr int L = Vector<T>::lanes, R = __builtin_popcount(P);
  typedef typename Vector<T>::type V;
  // The lanes of as many sums as there are lanes are added up together, where most of those places are filled.
  constexpr bool kTogether = L >= 8 && Q * R <= L && Q * R * 8 >= L * 3;
  V sum[kTogether ? L : Q * R];
  const T* x[Q];
#pragma GCC unroll 16
  for (int i = 0; i < (kTogether ? L : Q * R); ++i) sum[i] = V{};
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) {
    const int64_t j = start + index[q];
    x[q] = m.x + (Table ? m.table[j].x : j * m.x_stride);
  }
  for (int64_t s = 0; s < m.segments; ++s) {
    const T* d = dy + s * m.dy_segment;
    for (int64_t c = 0; c < m.columns; c += L) {
      V row[R];
      int n = 0;
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r)
        if (P >> r & 1) row[n++] = load(d + r * m.dy_row + c);
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) {
        const V column = R > 1 ? held(load(x[q] + s * m.x_segment + c)) : load(x[q] + s * m.x_segment + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[q * R + r] += row[r] * column;
      }
    }
  }
  T part[L];
  if constexpr (kTogether) store(part, totals<T>(sum));
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) {
    int n = 0;
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      if (!(P >> r & 1)) continue;
      const int at = q * R + n++;
      T& to = g[r * m.g_row + start + index[q]];
      if constexpr (kTogether)
        to += part[at];
      else
        to += total<T>(sum[at]);
    }
  }
}

template <class T, int P, bool Table>
__attribute__((noinline)) void correlate_bucket(const Correlate<T>& m, int64_t start, const T* dy, T* g,
                                                const uint16_t* index, uint32_t count) {
#if RTL_REGISTERS >= 32
  constexpr int Q = Vector<T>::lanes == 16 ? 16 / __builtin_popcount(P) : 4;
  for (; count >= Q; count -= Q, index += Q) block_dots<T, Q, P, Table>(m, start, dy, g, index);
  if constexpr (Q > 8) {
    if (count & 8) block_dots<T, 8, P, Table>(m, start, dy, g, index), index += 8;
  }
  if constexpr (Q > 4) {
    if (count & 4) block_dots<T, 4, P, Table>(m, start, dy, g, index), index += 4;
  }
  if (count & 2) block_dots<T, 2, P, Table>(m, start, dy, g, index), index += 2;
#else
  // 8 sums of single rows, 12 of pairs.
  constexpr int Q = P == 3 ? 6 : 8;
  for (; count >= Q; count -= Q, index += Q) block_dots<T, Q, P, Table>(m, start, dy, g, index);
  if (count & 4) block_dots<T, 4, P, Table>(m, start, dy, g, index), index += 4;
  if (count & 2) block_dots<T, 2, P, Table>(m, start, dy, g, index), index += 2;
#endif
  if (count & 1) block_dots<T, 1, P, Table>(m, start, dy, g, index);
}

template <class T, bool Table>
void correlate_blocks(const Correlate<T>& m) {
  for (int64_t t = 0; t < m.kept.tiles; ++t) {
    const int64_t start = t * m.kept.tile_inputs;
    for (int64_t b = m.first_block; b < m.end_block; ++b) {
      const uint32_t* counts = m.kept.counts + ((t * m.kept.blocks + b) << m.kept.block_rows);
      const uint16_t* index = m.kept.index + counts[0];
      const T* dy = m.dy + b * m.kept.block_rows * m.dy_row;
      T* g = m.g + b * m.kept.block_rows * m.g_row;
#define RTL_BUCKET(P) correlate_bucket<T, P, Table>(m, start, dy, g, index, counts[P]), index += counts[P]
      RTL_BUCKET(1);
      if (m.kept.block_rows == 1) continue;
      RTL_BUCKET(2);
      RTL_BUCKET(3);
#if RTL_REGISTERS >= 32
      RTL_BUCKET(4);
      RTL_BUCKET(5);
      RTL_BUCKET(6);
      RTL_BUCKET(7);
      RTL_BUCKET(8);
      RTL_BUCKET(9);
      RTL_BUCKET(10);
      RTL_BUCKET(11);
      RTL_BUCKET(12);
      RTL_BUCKET(13);
      RTL_BUCKET(14);
      RTL_BUCKET(15);
#endif
#undef RTL_BUCKET
    }
  }
}

template <class T>
void correlate(const Correlate<T>& m) {
  if (m.table)
    correlate_blocks<T, true>(m);
  else
    correlate_blocks<T, false>(m);
}

// ---- g = dyᵀ · x: dense tiles, the mask's bits applied where they are added

#if RTL_REGISTERS >= 32
constexpr int kOuterRows = 12;  // 24 sums, 2 inputs and a gradient of 32 registers
#else
constexpr int kOuterRows = 6;
#endif
constexpr int kOuterVectors = 2;

template <class T, int R>
RTL_INLINE void outer_tile(const Outer<T>& m) {
  constexpr int L = Vector<T>::lanes, V = kOuterVectors;
  typename Vector<T>::type sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = typename Vector<T>::type{};
  const T* x = m.x;
  const T* dy = m.dy;
  for (int64_t s = 0; s < m.samples; ++s, x += V * L, dy += R) {
    typename Vector<T>::type column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(x + v * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const typename Vector<T>::type value = splat(dy[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += value * column[v];
    }
  }
  if (m.columns == V * L) {
    const KeptLanes<T> lanes[V] = {KeptLanes<T>(m.column), KeptLanes<T>(m.column + L)};
    if (m.first) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        if (r == m.rows) break;
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store(m.g + r * m.g_row + v * L, lanes[v].of(sum[r][v], m.words + r * m.words_row));
      }
      return;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if (r == m.rows) break;
      T* g = m.g + r * m.g_row;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(g + v * L, load(g + v * L) + lanes[v].of(sum[r][v], m.words + r * m.words_row));
    }
    return;
  }
  T part[R][V * L];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(part[r] + v * L, sum[r][v]);
  for (int64_t r = 0; r < m.rows; ++r) {
    T* g = m.g + r * m.g_row;
    const uint32_t* words = m.words + r * m.words_row;
    for (int64_t i = 0, at = m.column; i < m.columns; ++i, ++at) {
      const bool keep = words[at / 32] >> (at % 32) & 1;
      g[i] = (m.first ? T(0) : g[i]) + (keep ? part[r][i] : T(0));
    }
  }
}

template <class T>
void outer(const Outer<T>& m) {
  if (m.height == kOuterRows)
    outer_tile<T, kOuterRows>(m);
  else if (m.height == kOuterRows / 3 * 2)
    outer_tile<T, kOuterRows / 3 * 2>(m);
  else
    outer_tile<T, kOuterRows / 3>(m);
}

template <class T>
void lay_out(const LayOut<T>& m) {
  constexpr int L = Vector<T>::lanes, V = kOuterVectors, R = kOuterRows, Third = R / 3;
  T* to = m.x_to;
  int64_t i = 0;
  for (; i + V * L <= m.inputs; i += V * L, to += m.x_step) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(to + v * L, load(m.x + i + v * L));
  }
  if (i < m.inputs)
    for (int w = 0; w < V * L; ++w) to[w] = i + w < m.inputs ? m.x[i + w] : T(0);
  int64_t r = 0;
  to = m.dy_to;
  for (; r + R <= m.rows; r += R, to += m.dy_step) {
    T* here = r + R == m.rows ? m.dy_last : to;
    copy_bytes<T, Third * sizeof(T)>(m.dy + r, here);
    copy_bytes<T, Third * sizeof(T)>(m.dy + r + Third, here + Third);
    copy_bytes<T, Third * sizeof(T)>(m.dy + r + 2 * Third, here + 2 * Third);
  }
  for (int64_t last = r; r < m.rows || (r - last) % Third; ++r) m.dy_last[r - last] = r < m.rows ? m.dy[r] : T(0);
}

// ---- g = dy · xᵀ at kept positions, row by row

// Q inputs of a list against V vectors of a row's samples, or against all `columns` where V is 0.
template <class T, int Q, int V>
RTL_INLINE typename Vector<T>::type list_dots(const Dots<T>& m, const T* dy, const uint16_t* index) {
  constexpr int L = Vector<T>::lanes;
  const int64_t columns = V ? V * L : m.columns;
  typename Vector<T>::type sum[L];
#pragma GCC unroll 16
  for (int q = 0; q < L; ++q) sum[q] = typename Vector<T>::type{};
  // Four vectors of the row in registers at a time.
  constexpr int kHeld = 4;
#pragma GCC unroll 2
  for (int c = 0; c < V; c += kHeld) {
    typename Vector<T>::type d[kHeld];
#pragma GCC unroll 4
    for (int v = 0; v < kHeld; ++v)
      if (c + v < V) d[v] = load(dy + (c + v) * L);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      const T* x = m.x + index[q] * columns + c * L;
#pragma GCC unroll 4
      for (int v = 0; v < kHeld; ++v)
        if (c + v < V) sum[q] += d[v] * load(x + v * L);
    }
  }
  for (int64_t c = 0; V == 0 && c < columns; c += L) {
    const typename Vector<T>::type row = load(dy + c);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) sum[q] += row * load(m.x + index[q] * columns + c);
  }
  return totals<T>(sum);
}

template <class T, int V>
__attribute__((noinline)) void dots_columns(const Dots<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t r = 0; r < m.rows; ++r) {
    const uint16_t* index = m.index + m.starts[r];
    const uint16_t* end = m.index + m.starts[r + 1];
    const T* dy = m.dy + r * m.columns;
    T* g = m.g + r * m.g_row;
    T part[L];
    for (; end - index >= L; index += L) {
      store(part, list_dots<T, L, V>(m, dy, index));
#pragma GCC unroll 16
      for (int q = 0; q < L; ++q) g[index[q]] += part[q];
    }
    // What is left, with inputs of the next lists, whose sums are not used.
    if (index < end) {
      if (end - index > L / 2)
        store(part, list_dots<T, L, V>(m, dy, index));
      else
        store(part, list_dots<T, (L > 1 ? L / 2 : 1), V>(m, dy, index));
      for (int q = 0; index < end; ++q, ++index) g[*index] += part[q];
    }
  }
}

template <class T>
void dots(const Dots<T>& m) {
  switch (m.columns / Vector<T>::lanes) {
    case 1: dots_columns<T, 1>(m); break;
    case 2: dots_columns<T, 2>(m); break;
    case 3: dots_columns<T, 3>(m); break;
    case 4: dots_columns<T, 4>(m); break;
#if RTL_VECTOR_BYTES == 32
    case 5: dots_columns<T, 5>(m); break;
    case 6: dots_columns<T, 6>(m); break;
    case 7: dots_columns<T, 7>(m); break;
    case 8: dots_columns<T, 8>(m); break;
#endif
    default: dots_columns<T, 0>(m); break;
  }
}

// ---- y = x · wᵀ of a few samples, inputs as lanes

// R rows × S samples of inputs [from, to): as many sums as a vector has lanes, whose lanes are then added up together.
template <class T, int R, int S, bool Masked>
RTL_INLINE void few_tile(const Few<T>& m, int64_t from, int64_t to, int64_t o, int64_t s0) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type V;
  static_assert(R * S == L, "one sum a lane");
  V sum[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) sum[i] = V{};
  // Rows and samples that are not there repeat the last one; their sums are not stored.
  const T* w[R];
  const uint32_t* words[R];
  const T* x[S];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int64_t row = o + r < m.rows ? o + r : m.rows - 1;
    w[r] = m.w + row * m.w_row;
    words[r] = Masked ? m.words + row * m.words_row : nullptr;
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) x[s] = m.x[s0 + s < m.samples ? s0 + s : m.samples - 1];
  int64_t i = from;
#if RTL_VECTOR_BYTES == 32
  for (; Masked && i + 32 <= to; i += 32) {
    typename Bits<T>::type word[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) word[r] = held(word_of<T>(words[r][i / 32]));
#pragma GCC unroll 8
    for (int at = 32 - L; at >= 0; at -= L) {
      V column[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) column[s] = held(load(x[s] + i + at));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V value = load_highest(w[r] + i + at, word[r] << next_lanes<T>());
        word[r] <<= L;
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[s * R + r] += value * column[s];
      }
    }
  }
#endif
  for (; i + L <= to; i += L) {
    V column[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) column[s] = load(x[s] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V value = Masked ? load_kept(w[r], words[r], i) : load(w[r] + i);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[s * R + r] += value * column[s];
    }
  }
  if (i < to) {
    T part[L];
    V column[S];
    for (int s = 0; s < S; ++s) {
      for (int l = 0; l < L; ++l) part[l] = i + l < to ? x[s][i + l] : T(0);
      column[s] = load(part);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int l = 0; l < L; ++l)
        part[l] = i + l < to && (!Masked || words[r][(i + l) / 32] >> ((i + l) % 32) & 1) ? w[r][i + l] : T(0);
      const V value = load(part);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[s * R + r] += value * column[s];
    }
  }
  const V total = totals<T>(sum);
  const bool last = to == m.inputs;
  const T* scale = last ? m.scale : nullptr;
  const T* bias = last ? m.bias : nullptr;
  const bool act = last && m.relu;
  T part[L];
  store(part, total);
  if (o + R <= m.rows && s0 + S <= m.samples) {
    typedef T Rows __attribute__((vector_size(R * sizeof(T)), aligned(sizeof(T)), may_alias));
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      Rows* y = reinterpret_cast<Rows*>(m.y[s0 + s] + o);
      Rows sums = *reinterpret_cast<const Rows*>(part + s * R);
      if (from) sums += *y;
      if (scale) sums *= *reinterpret_cast<const Rows*>(scale + o);
      if (bias) sums += *reinterpret_cast<const Rows*>(bias + o);
      *y = act ? relu(sums) : sums;
    }
    return;
  }
  for (int s = 0; s < S && s0 + s < m.samples; ++s)
    for (int r = 0; r < R && o + r < m.rows; ++r) {
      T& y = m.y[s0 + s][o + r];
      T sum = part[s * R + r];
      if (from) sum += y;
      if (scale) sum *= scale[o + r];
      if (bias) sum += bias[o + r];
      y = act && sum < T(0) ? T(0) : sum;
    }
}

template <class T, int R, int S>
__attribute__((noinline)) void few_rows(const Few<T>& m, int64_t s) {
  // The inputs of S samples, in pieces that stay in L1.
  const int64_t most = 4096 / S / int64_t(sizeof(T)) * 4, pieces = m.inputs ? (m.inputs + most - 1) / most : 1;
  const int64_t each = (m.inputs / pieces + 63) / 32 * 32;
  for (int64_t from = 0; from == 0 || from < m.inputs; from += each) {
    const int64_t to = from + each < m.inputs ? from + each : m.inputs;
    if (m.words)
      for (int64_t o = 0; o < m.rows; o += R) few_tile<T, R, S, true>(m, from, to, o, s);
    else
      for (int64_t o = 0; o < m.rows; o += R) few_tile<T, R, S, false>(m, from, to, o, s);
  }
}

template <class T>
void few(const Few<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t s = 0; s < m.samples;) {
    const int64_t left = m.samples - s;
    if (L >= 4 && left > 2) {
      few_rows<T, (L >= 4 ? L / 4 : L), (L >= 4 ? 4 : 1)>(m, s);
      s += 4;
    } else if (left == 2) {
      few_rows<T, L / 2, 2>(m, s);
      s += 2;
    } else {
      few_rows<T, L, 1>(m, s);
      s += 1;
    }
  }
}

// ---- samples as lanes

// Where the lanes of an element lie.
template <class T, bool Even>
struct Place {
  const int64_t* place;
  int64_t step;
  explicit Place(const Lanes<T>& m) : place(m.place), step(m.step) {}
  RTL_INLINE int64_t operator()(int64_t e) const { return Even ? e * step : place[e]; }
};

// The first m.count lanes of a vector, zero elsewhere, whatever stands there.
template <class T>
struct FirstLanes {
  typedef typename Bits<T>::type B;
  B bits;
  explicit FirstLanes(int64_t count) {
    for (int l = 0; l < Vector<T>::lanes; ++l) bits[l] = l < count ? -1 : 0;
  }
  RTL_INLINE typename Vector<T>::type of(typename Vector<T>::type v) const { return (typename Vector<T>::type)((B)v & bits); }
};

// Whole: all lanes are there. The rows' addresses are a copy, which no store can change.
template <class T, bool Even, bool Whole>
__attribute__((noinline)) void to_lanes_placed(const Lanes<T>& m) {
  constexpr int L = Vector<T>::lanes;
  const Place<T, Even> place(m);
  const FirstLanes<T> first(m.count);
  const T* rows[L];
  for (int s = 0; s < L; ++s) rows[s] = m.rows[s < m.count ? s : m.count - 1];
  for (int64_t plane = 0; plane < m.planes; ++plane) {
    const int64_t row = plane * m.row_step;
    T* lanes_at = m.lanes_at + plane * m.lanes_step;
    auto at = [&](int64_t e) __attribute__((always_inline)) {
      typename Vector<T>::type v[L];
#pragma GCC unroll 16
      for (int s = 0; s < L; ++s) v[s] = load(rows[s] + row + e);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(lanes_at + place(e + i), Whole ? v[i] : first.of(v[i]));
    };
    if (m.length >= L) {
      // The next plane's vectors are fetched meanwhile. What is left over is taken with what comes before it, again.
      const int count = plane + 1 < m.planes ? int(m.count) : 0;
      for (int64_t e = 0; e + L <= m.length; e += L) {
        for (int s = 0; s < count; ++s) __builtin_prefetch(rows[s] + row + m.row_step + e);
        at(e);
      }
      if (m.length % L) at(m.length - L);
      continue;
    }
    for (int64_t e = 0; e < m.length; ++e) {
      T part[L];
      for (int s = 0; s < L; ++s) part[s] = s < m.count ? rows[s][row + e] : T(0);
      store(lanes_at + place(e), load(part));
    }
  }
}

template <class T>
void to_lanes(const Lanes<T>& m) {
  if (m.count == Vector<T>::lanes)
    m.place ? to_lanes_placed<T, false, true>(m) : to_lanes_placed<T, true, true>(m);
  else if (m.count > 0)
    m.place ? to_lanes_placed<T, false, false>(m) : to_lanes_placed<T, true, false>(m);
}

// Elements e, … of every lane, turned back into vectors of their rows.
template <class T, bool Even>
RTL_INLINE void turn_back(const Place<T, Even> place, int64_t e, const T* lanes_at,
                          typename Vector<T>::type (&v)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = held(load(lanes_at + place(e + i)));
  transpose<T>(v);
}

// Past the caches, in whole cache lines: halves of one, others between them, would go as two.
template <class T, bool Even>
RTL_INLINE void stream_lanes_at(const Lanes<T>& m, const Place<T, Even> place, int64_t row, int64_t e, const T* lanes_at) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type line[kLineVectors][L];
#pragma GCC unroll 4
  for (int v = 0; v < kLineVectors; ++v) turn_back(place, e + v * L, lanes_at, line[v]);
  T* const* const rows = m.rows;
#pragma GCC unroll 16
  for (int s = 0; s < L; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < kLineVectors; ++v) stream(rows[s] + row + e + v * L, line[v][s]);
}

template <class T, bool Even, bool Whole>
__attribute__((noinline)) void from_lanes_placed(const Lanes<T>& m) {
  constexpr int L = Vector<T>::lanes;
  const Place<T, Even> place(m);
  T* rows[L];
  for (int s = 0; s < L; ++s) rows[s] = m.rows[s < m.count ? s : m.count - 1];
  for (int64_t plane = 0; plane < m.planes; ++plane) {
    const int64_t row = plane * m.row_step;
    const T* lanes_at = m.lanes_at + plane * m.lanes_step;
    auto at = [&](int64_t e) __attribute__((always_inline)) {
      typename Vector<T>::type v[L];
      turn_back(place, e, lanes_at, v);
#pragma GCC unroll 16
      for (int s = 0; s < L; ++s)
        if (Whole || s < m.count) store(rows[s] + row + e, v[s]);
    };
    if (m.stream && Whole) {
      for (int64_t e = 0; e < m.length; e += kLineVectors * L) stream_lanes_at(m, place, row, e, lanes_at);
      continue;
    }
    if (m.length >= L) {
      for (int64_t e = 0; e + L <= m.length; e += L) at(e);
      if (m.length % L) at(m.length - L);
      continue;
    }
    for (int64_t e = 0; e < m.length; ++e) {
      T part[L];
      store(part, load(lanes_at + place(e)));
      for (int s = 0; s < m.count; ++s) rows[s][row + e] = part[s];
    }
  }
}

template <class T>
void from_lanes(const Lanes<T>& m) {
  if (m.count == Vector<T>::lanes)
    m.place ? from_lanes_placed<T, false, true>(m) : from_lanes_placed<T, true, true>(m);
  else if (m.count > 0)
    m.place ? from_lanes_placed<T, false, false>(m) : from_lanes_placed<T, true, false>(m);
}

// Where planes are read one after the other, what comes 2 KiB later: the hardware's prefetchers stop at pages.
template <class T>
RTL_INLINE void fetch(const T* x) {
  __builtin_prefetch(reinterpret_cast<const char*>(x) + 2048);
}

// Rows of N to 2 · N bytes: the first N and the last N of each.
template <class T, int N>
RTL_INLINE void copy_rows(const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t width) {
  const int64_t last = width - N / int64_t(sizeof(T));
  if (last == 0) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) copy_bytes<T, N>(from + r * from_row, to + r * to_row);
  } else {
#pragma GCC unroll 2
    for (int64_t r = 0; r < rows; ++r) {
      copy_bytes<T, N>(from + r * from_row, to + r * to_row);
      copy_bytes<T, N>(from + r * from_row + last, to + r * to_row + last);
    }
  }
}

// Rows that follow one another in `to`, in whole aligned vectors of it past the caches; what is left at both ends, not.
template <class T>
void stream_rows(const Copy<T>& m) {
  constexpr int L = Vector<T>::lanes;
  const T* from = m.from;
  T* to = m.to;
  int64_t w = 0;
  for (; w < m.width && reinterpret_cast<uintptr_t>(to) % RTL_VECTOR_BYTES; ++w) *to++ = from[w];
  for (int64_t r = 0; r < m.rows; ++r, from += m.from_row) {
    for (; w + L <= m.width; w += L, to += L) stream(to, load(from + w));
    const int64_t here = m.width - w;  // of a vector that ends in the next row
    if (r + 1 == m.rows) {
      for (; w < m.width; ++w) *to++ = from[w];
    } else if (here > 0) {
      T part[L];
      for (int l = 0; l < L; ++l) part[l] = l < here ? from[w + l] : from[m.from_row + l - here];
      stream(to, load(part));
      to += L;
      w = L - here;
    } else {
      w = 0;
    }
  }
}

template <class T>
void copy(const Copy<T>& m) {
  constexpr int L = Vector<T>::lanes;
  const T* from = m.from;
  T* to = m.to;
  if (m.stream && m.from_step == 1 && m.to_step == 1 && m.to_row == m.width && m.width >= L) return stream_rows(m);
  if (m.from_step == 1 && m.to_step == 1) {
    const int64_t bytes = m.width * int64_t(sizeof(T));
    if (bytes < int64_t(sizeof(T))) return;
    if (bytes < 8)
      copy_rows<T, (sizeof(T) < 8 ? sizeof(T) : 8)>(from, m.from_row, to, m.to_row, m.rows, m.width);
    else if (bytes < 16)
      copy_rows<T, 8>(from, m.from_row, to, m.to_row, m.rows, m.width);
    else if (bytes < 32)
      copy_rows<T, 16>(from, m.from_row, to, m.to_row, m.rows, m.width);
    else if (bytes < 64)
      copy_rows<T, 32>(from, m.from_row, to, m.to_row, m.rows, m.width);
    else
      for (int64_t r = 0; r < m.rows; ++r, from += m.from_row, to += m.to_row) {
        for (int64_t w = 0; w + L < m.width; w += L) {
          fetch(from + w);
          store(to + w, load(from + w));
        }
        fetch(from + m.width - L);
        store(to + m.width - L, load(from + m.width - L));
      }
    return;
  }
  const auto each = [&](int64_t from_step, int64_t to_step) __attribute__((always_inline)) {
    for (int64_t r = 0; r < m.rows; ++r, from += m.from_row, to += m.to_row)
      for (int64_t w = 0; w < m.width; ++w) to[w * to_step] = from[w * from_step];
  };
  if (m.from_step == 4 && m.to_step == 1)
    each(4, 1);  // which GCC turns into shuffles
  else
    each(m.from_step, m.to_step);
}

#if RTL_VECTOR_BYTES == 64
// Four vectors of four quarters: quarter i of vector j becomes quarter j of vector i.
RTL_INLINE void turn_quarters(Vector<float>::type (&v)[4]) {
  const Vector<float>::type a = __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const Vector<float>::type b = __builtin_shufflevector(v[2], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const Vector<float>::type c = __builtin_shufflevector(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const Vector<float>::type d = __builtin_shufflevector(v[2], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  v[0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  v[1] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  v[2] = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  v[3] = __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

template <bool Gather>
void quarters(const Quarters<float>& m) {
  for (int64_t s = 0; s < m.samples; s += 4)
    for (int64_t c = 0; c < m.count; c += 4) {
      Vector<float>::type v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[i] = load(Gather ? m.rows[s + i] + c * 4 : m.planes + (c + i) * m.step + s * 4);
      turn_quarters(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(Gather ? m.planes + (c + i) * m.step + s * 4 : m.rows[s + i] + c * 4, v[i]);
    }
}

template <class T, bool Gather>
constexpr void (*kQuarters)(const Quarters<T>&) = nullptr;
template <bool Gather>
constexpr void (*kQuarters<float, Gather>)(const Quarters<float>&) = quarters<Gather>;
#else
template <class T, bool Gather>
constexpr void (*kQuarters)(const Quarters<T>&) = nullptr;
#endif

template <class T>
void split(const Split<T>& m) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type V;
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* from = m.from + r * m.from_row;
    T* even = m.even + r * m.to_row;
    T* odd = m.odd + r * m.to_row;
    int64_t w = 0;
    for (; w + 2 * L <= m.width; w += 2 * L) {
      fetch(from + w), fetch(from + w + L);
      const V a = load(from + w), b = load(from + w + L);
      store(even + w / 2, every_second<V, L, 0>(a, b));
      store(odd + w / 2, every_second<V, L, 1>(a, b));
    }
    for (; w < m.width; ++w) {
      T* const to = w % 2 ? odd : even;  // with [w / 2] behind it, GCC 12 under UBSan takes w / 2 from a step before
      to[w / 2] = from[w];
    }
  }
}

// ---- depthwise

// The first `count` lanes, fewer than there are, in powers of two: stores by a mask take longer.
template <class T>
RTL_INLINE void store_first(T* y, typename Vector<T>::type v, int64_t count) {
  constexpr int L = Vector<T>::lanes;
  T part[L];
  store(part, v);
  const T* from = part;
  auto some = [&](auto lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(lanes)::value;
    if constexpr (N < L) {
      if (count & N) copy_bytes<T, N * int(sizeof(T))>(from, y), from += N, y += N;
    }
  };
  some(Int<8>());
  some(Int<4>());
  some(Int<2>());
  some(Int<1>());
}

// H rows of V vectors.
template <class T, int H, int V>
RTL_INLINE void filter_rows(const Filter<T>& m, int64_t h, int64_t w) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type sum[H][V];
#pragma GCC unroll 8
  for (int r = 0; r < H; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = splat(m.bias);
  const T* x = m.x + h * m.x_row + w;
  for (int64_t t = 0; t < m.taps; ++t) {
    const typename Vector<T>::type value = splat(m.weights[t]);
    const T* at = x + m.at[t];
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += value * load(at + r * m.x_row + v * L);
  }
  if (m.relu) {
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = relu(sum[r][v]);
  }
  T* y = m.y + h * m.y_row + w;
  if (m.stream) {
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) stream(y + r * m.y_row + v * L, sum[r][v]);
  } else {
    // A row narrower than a vector goes out as one: the row below overwrites what is too much, but for the last one.
    const bool last = m.width < L && h + H == m.height;
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        if (r + 1 < H || v + 1 < V) store(y + r * m.y_row + v * L, sum[r][v]);
    if (last)
      store_first(y + (H - 1) * m.y_row, sum[H - 1][V - 1], m.width);
    else
      store(y + (H - 1) * m.y_row + (V - 1) * L, sum[H - 1][V - 1]);
  }
}

template <class T>
void filter(const Filter<T>& m) {
  constexpr int L = Vector<T>::lanes;
  int64_t w = 0;
#if RTL_VECTOR_BYTES == 32
  // A cache line at a time: halves of one that go past the caches one after the other go as two.
  for (; w + 2 * L <= m.width; w += 2 * L) {
    int64_t h = 0;
    for (; h + 4 <= m.height; h += 4) filter_rows<T, 4, 2>(m, h, w);
    for (; h < m.height; ++h) filter_rows<T, 1, 2>(m, h, w);
  }
#endif
  for (; w < m.width; w += L) {
    // The last vector of a row that is not a multiple of them begins earlier.
    const int64_t from = w + L > m.width && m.width > L ? m.width - L : w;
    int64_t h = 0;
    for (; h + 8 <= m.height; h += 8) filter_rows<T, 8, 1>(m, h, from);
    for (; h + 4 <= m.height; h += 4) filter_rows<T, 4, 1>(m, h, from);
    for (; h < m.height; ++h) filter_rows<T, 1, 1>(m, h, from);
  }
}

// ---- depthwise, planes taken flat

#if RTL_VECTOR_BYTES == 64
RTL_INLINE Vector<float>::type load_inside(const float* x, uint32_t inside) {
  return (Vector<float>::type)_mm512_maskz_loadu_ps(__mmask16(inside), x);
}
RTL_INLINE Vector<double>::type load_inside(const double* x, uint32_t inside) {
  return (Vector<double>::type)_mm512_maskz_loadu_pd(__mmask8(inside), x);
}
#elif RTL_VECTOR_BYTES == 32
// A lane is loaded where its sign is set.
RTL_INLINE Vector<float>::type load_inside(const float* x, uint32_t inside) {
  const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  return (Vector<float>::type)_mm256_maskload_ps(x, _mm256_sllv_epi32(_mm256_set1_epi32(int(inside)), shifts));
}
RTL_INLINE Vector<double>::type load_inside(const double* x, uint32_t inside) {
  const __m256i shifts = _mm256_setr_epi64x(63, 62, 61, 60);
  return (Vector<double>::type)_mm256_maskload_pd(x, _mm256_sllv_epi64(_mm256_set1_epi64x(inside), shifts));
}
#endif

#if RTL_VECTOR_BYTES >= 32

// Planes of V vectors, of S samples.
template <class T, int S, int V>
__attribute__((noinline)) void flat_tile(const Flat<T>& m, int64_t channel, int64_t s0) {
  constexpr int L = Vector<T>::lanes;
  const int64_t place = channel * m.pixels;
  const T* x[S];
  typename Vector<T>::type sum[S][V];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    x[s] = m.x[s0 + s] + place;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[s][v] = splat(m.bias ? m.bias[channel] : T(0));
  }
  const FlatTap<T>* const end = m.taps + m.first[channel + 1];
  for (const FlatTap<T>* tap = m.taps + m.first[channel]; tap != end; ++tap) {
    const typename Vector<T>::type value = splat(tap->weight);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sum[s][v] += value * load_inside(x[s] + tap->at + v * L, tap->inside[v]);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    T* y = m.y[s0 + s] + place;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const typename Vector<T>::type result = m.relu ? relu(sum[s][v]) : sum[s][v];
      if (m.stream)
        stream(y + v * L, result);
      else if (m.pixels - v * L >= L)
        store(y + v * L, result);
      else
        store_first(y + v * L, result, m.pixels - v * L);
    }
  }
}

template <class T>
void flat(const Flat<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t c = 0; c < m.channels; ++c) {
    int64_t s = 0;
#define RTL_TILES(S, V) \
  for (; s + S <= m.samples; s += S) flat_tile<T, S, V>(m, c, s)
    switch ((m.pixels + L - 1) / L) {
      case 1: RTL_TILES(8, 1); RTL_TILES(4, 1); RTL_TILES(2, 1); RTL_TILES(1, 1); break;
      case 2: RTL_TILES(4, 2); RTL_TILES(2, 2); RTL_TILES(1, 2); break;
      case 3: RTL_TILES(2, 3); RTL_TILES(1, 3); break;
      case 4: RTL_TILES(2, 4); RTL_TILES(1, 4); break;
      case 5: RTL_TILES(1, 5); break;
      case 6: RTL_TILES(1, 6); break;
      case 7: RTL_TILES(1, 7); break;
      default: RTL_TILES(1, 8); break;
    }
#undef RTL_TILES
  }
}

template <class T, int Q>
RTL_INLINE void flat_dots_of(const FlatDots<T>& m, const FlatTap<T>* taps, typename Vector<T>::type* sums) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type sum[Q];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) sum[q] = typename Vector<T>::type{};
  for (int64_t s = 0; s < m.samples; ++s) {
    const T* dy = m.dy[s] + m.plane;
    const T* x[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) x[q] = m.x[s] + m.plane + taps[q].at;
    for (int64_t p = 0, v = 0; p < m.pixels; p += L, ++v) {
      const bool whole = p + L <= m.pixels;
      const typename Vector<T>::type d = whole ? load(dy + p) : load_inside(dy + p, (1u << (m.pixels - p)) - 1);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sum[q] += d * load_inside(x[q] + p, taps[q].inside[v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) sums[q] = sum[q];
}

template <class T>
void flat_dots(const FlatDots<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t i = 0; i < m.count; i += L) {
    const FlatTap<T>* taps = m.taps + i;
    const int64_t count = m.count - i < L ? m.count - i : L;
    typename Vector<T>::type sums[L] = {};
    const int64_t parts = (count + 3) / 4;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t q = count * p / parts;
      switch (count * (p + 1) / parts - q) {
        case 1: flat_dots_of<T, 1>(m, taps + q, sums + q); break;
        case 2: flat_dots_of<T, 2>(m, taps + q, sums + q); break;
        case 3: flat_dots_of<T, 3>(m, taps + q, sums + q); break;
        default: flat_dots_of<T, 4>(m, taps + q, sums + q); break;
      }
    }
    T part[L];
    store(part, totals<T>(sums));
    for (int64_t q = 0; q < count; ++q) m.g[taps[q].tap] += part[q];
  }
}

template <class T>
constexpr void (*kFlat)(const Flat<T>&) = flat<T>;
template <class T>
constexpr void (*kFlatDots)(const FlatDots<T>&) = flat_dots<T>;
#else
template <class T>
constexpr void (*kFlat)(const Flat<T>&) = nullptr;
template <class T>
constexpr void (*kFlatDots)(const FlatDots<T>&) = nullptr;
#endif

// ---- what is added to a result

template <class T>
void add(const Add<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* x = m.x + r * m.x_row;
    T* y = m.y + r * m.y_row;
    int64_t w = 0;
    for (; w + L <= m.width; w += L) {
      const typename Vector<T>::type s = load(y + w) + load(x + w);
      store(y + w, m.relu ? relu(s) : s);
    }
    for (; w < m.width; ++w) {
      const T s = y[w] + x[w];
      y[w] = m.relu && s < T(0) ? T(0) : s;
    }
  }
}

}  // namespace RTL_LEVEL
}  // namespace rtl_kernels

#include "convolve_impl.h"
#include "norm_impl.h"

namespace rtl_kernels {
namespace RTL_LEVEL {

template <class T>
constexpr Kernels<T> table() {
  return {Vector<T>::lanes, kHalves ? Vector<T>::lanes / 2 : Vector<T>::lanes, kBlockRows, kVectors * Vector<T>::lanes,
          kListVectors * Vector<T>::lanes, kPair,
          kOuterRows, kOuterVectors * Vector<T>::lanes,
          multiply<T>, convolve<T>, correlate<T>, outer<T>, lay_out<T>, dots<T>, few<T>, fence, to_lanes<T>, from_lanes<T>, copy<T>,
          kQuarters<T, true>, kQuarters<T, false>, split<T>, filter<T>, kFlat<T>, kFlatDots<T>, add<T>,
          norm_reduce<T, kSum>, norm_reduce<T, kSquares>, norm_map<T, false>, norm_reduce<T, kProducts>, norm_map<T, true>};
}

}  // namespace RTL_LEVEL
}  // namespace rtl_kernels
