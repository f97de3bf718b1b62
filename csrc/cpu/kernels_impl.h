// The inner loops for vectors of RTL_VECTOR_BYTES bytes, in namespace RTL_LEVEL; see kernels.h for what they compute.
// Included once by each level_*.cpp, which is compiled with that instruction set's flags.
#include "kernels.h"

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

template <class T>
RTL_INLINE typename Vector<T>::type splat(T value) {
  return value - typename Vector<T>::type{};
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

// ---- y = w · x

// Sums of R rows over V vectors of columns and, with H, half a vector.
template <class T, int R, int V, int H>
struct Sums {
  typename Vector<T>::type full[R][V ? V : 1];
  typename Half<T>::type half[R];
};

// Inputs of one pattern. With few columns a row's sum would wait for the 4 cycles of each multiply-add, so U independent
// sums take turns; they are added in a fixed order at the end.
template <class T, int R, int V, int H, int U, int P, bool Table>
RTL_INLINE void bucket(Sums<T, R, V, H> (&sum)[U], const Multiply<T>& m, const Offset* table, const T* x, const T* w,
                       const uint16_t*& index, uint32_t count) {
  constexpr int L = Vector<T>::lanes;
  const int64_t row = m.w_row;
  auto one = [&](uint32_t j, Sums<T, R, V, H>& to) __attribute__((always_inline)) {
    const T* xj = x + (Table ? table[j].x : int64_t(j) * m.x_stride);
    const T* wj = w + (Table ? table[j].w : int64_t(j) * m.w_stride);
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
  };
  const uint16_t* end = index + count;
  if (U > 1) {
    for (; end - index >= U; index += U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) one(index[u], sum[u]);
    }
  }
  for (; index != end; ++index) one(*index, sum[0]);
}

template <class T, int R, int V, int H, int U, bool Table>
__attribute__((noinline)) void multiply_columns(const Multiply<T>& m, int64_t tile, const T* x, T* y) {
  constexpr int L = Vector<T>::lanes;
  const int64_t start = tile * m.kept.tile_inputs;
  const Offset* table = m.table + (Table ? start : 0);
  if (!Table) x += start * m.x_stride;
  for (int64_t r0 = 0; r0 < m.rows; r0 += R) {
    const uint32_t* counts = m.kept.counts + (tile * m.kept.blocks + r0 / R) * 16;
    const uint16_t* index = m.kept.index + counts[0];
    const T* w = m.w + r0 * m.w_row + (Table ? 0 : start * m.w_stride);
    Sums<T, R, V, H> sum[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[u].full[r][v] = typename Vector<T>::type{};
        if (H) sum[u].half[r] = typename Half<T>::type{};
      }
    bucket<T, R, V, H, U, 1, Table>(sum, m, table, x, w, index, counts[1]);
    if constexpr (R > 1) {
      bucket<T, R, V, H, U, 2, Table>(sum, m, table, x, w, index, counts[2]);
      bucket<T, R, V, H, U, 3, Table>(sum, m, table, x, w, index, counts[3]);
      bucket<T, R, V, H, U, 4, Table>(sum, m, table, x, w, index, counts[4]);
      bucket<T, R, V, H, U, 5, Table>(sum, m, table, x, w, index, counts[5]);
      bucket<T, R, V, H, U, 6, Table>(sum, m, table, x, w, index, counts[6]);
      bucket<T, R, V, H, U, 7, Table>(sum, m, table, x, w, index, counts[7]);
      bucket<T, R, V, H, U, 8, Table>(sum, m, table, x, w, index, counts[8]);
      bucket<T, R, V, H, U, 9, Table>(sum, m, table, x, w, index, counts[9]);
      bucket<T, R, V, H, U, 10, Table>(sum, m, table, x, w, index, counts[10]);
      bucket<T, R, V, H, U, 11, Table>(sum, m, table, x, w, index, counts[11]);
      bucket<T, R, V, H, U, 12, Table>(sum, m, table, x, w, index, counts[12]);
      bucket<T, R, V, H, U, 13, Table>(sum, m, table, x, w, index, counts[13]);
      bucket<T, R, V, H, U, 14, Table>(sum, m, table, x, w, index, counts[14]);
      bucket<T, R, V, H, U, 15, Table>(sum, m, table, x, w, index, counts[15]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (r0 + r < m.rows) {
        T* out = y + (r0 + r) * m.y_row;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          typename Vector<T>::type s = sum[0].full[r][v];
#pragma GCC unroll 4
          for (int u = 1; u < U; ++u) s += sum[u].full[r][v];
          if (tile)
            s += load(out + v * L);
          else if (m.bias)
            s += splat(m.bias[r0 + r]);
          store(out + v * L, s);
        }
        if (H) {
          typename Half<T>::type* end = reinterpret_cast<typename Half<T>::type*>(out + V * L);
          typename Half<T>::type s = sum[0].half[r];
#pragma GCC unroll 4
          for (int u = 1; u < U; ++u) s += sum[u].half[r];
          if (tile)
            s += *end;
          else if (m.bias)
            s += low(splat(m.bias[r0 + r]));
          *end = s;
        }
      }
    }
  }
}

#if RTL_REGISTERS >= 32
constexpr int kVectors = 6;  // 24 sums, 6 inputs and a weight fill 31 of 32 registers
#else
constexpr int kVectors = 2;  // 8 sums, 2 inputs and a weight of 16 registers; 3 would spill where FMA needs a copy
#endif

// Columns [0, take) of one segment, all tiles; `take` is what multiply_segment cuts.
template <class T, int R, bool Table>
void multiply_cut(const Multiply<T>& m, int64_t take, const T* x, T* y) {
  constexpr int L = Vector<T>::lanes, kGranule = kHalves ? L / 2 : L;
#define RTL_COLUMNS(V, H, U) multiply_columns<T, R, V, H, U, Table>(m, t, x, y)
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
      case 1: RTL_COLUMNS(1, 0, 2); break;
      default: RTL_COLUMNS(2, 0, (R == 1 ? 2 : 1)); break;
#endif
    }
  }
#undef RTL_COLUMNS
}

template <class T, bool Table>
void multiply_segment(const Multiply<T>& m, const T* x, T* y) {
  constexpr int L = Vector<T>::lanes;
  const bool single = m.kept.block_rows == 1;
  for (int64_t c = 0; c < m.columns;) {
    const int64_t left = m.columns - c;
    // 7 or 8 vectors go as 4 + 3 or 4 + 4: 6 + 1 would leave a lone vector that waits for its own sums. A single row has
    // registers for 16.
    int64_t take = left <= kVectors * L ? left : kVectors == 6 && left <= 8 * L ? 4 * L : kVectors * L;
    if (single && RTL_VECTOR_BYTES == 64 && left >= 16 * L) take = 16 * L;
    if (single)
      multiply_cut<T, 1, Table>(m, take, x + c, y + c);
    else
      multiply_cut<T, kBlockRows, Table>(m, take, x + c, y + c);
    c += take;
  }
}

template <class T>
void multiply(const Multiply<T>& m) {
  for (int64_t s = 0; s < m.segments; ++s) {
    const T* x = m.x + s * m.x_segment;
    T* y = m.y + s * m.y_segment;
    if (m.table)
      multiply_segment<T, true>(m, x, y);
    else
      multiply_segment<T, false>(m, x, y);
  }
}

// ---- g = dy · xᵀ at kept positions

// Q inputs of one pattern against its rows: Q · popcount(P) dot products along the columns at once, so that Q inputs
// share each load of dy and the rows each load of x.
template <class T, int Q, int P, bool Table>
RTL_INLINE void dots(const Correlate<T>& m, int64_t start, const T* dy, T* g, const uint16_t* index) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type sum[Q][kBlockRows];
  const T* x[Q];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    const int64_t j = start + index[q];
    x[q] = m.x + (Table ? m.table[j].x : j * m.x_stride);
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) sum[q][r] = typename Vector<T>::type{};
  }
  for (int64_t s = 0; s < m.segments; ++s) {
    const T* d = dy + s * m.dy_segment;
    for (int64_t c = 0; c < m.columns; c += L) {
      typename Vector<T>::type row[kBlockRows];
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r)
        if (P >> r & 1) row[r] = load(d + r * m.dy_row + c);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const typename Vector<T>::type column = load(x[q] + s * m.x_segment + c);
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r)
          if (P >> r & 1) sum[q][r] += row[r] * column;
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r)
      if (P >> r & 1) g[r * m.g_row + start + index[q]] += total<T>(sum[q][r]);
}

template <class T, int P, bool Table>
__attribute__((noinline)) void correlate_bucket(const Correlate<T>& m, int64_t start, const T* dy, T* g,
                                                const uint16_t* index, uint32_t count) {
#if RTL_REGISTERS >= 32
  for (; count >= 4; count -= 4, index += 4) dots<T, 4, P, Table>(m, start, dy, g, index);
  if (count & 2) dots<T, 2, P, Table>(m, start, dy, g, index), index += 2;
#else
  for (; count >= 2; count -= 2, index += 2) dots<T, 2, P, Table>(m, start, dy, g, index);
#endif
  if (count & 1) dots<T, 1, P, Table>(m, start, dy, g, index);
}

template <class T, bool Table>
void correlate_blocks(const Correlate<T>& m) {
  for (int64_t t = 0; t < m.kept.tiles; ++t) {
    const int64_t start = t * m.kept.tile_inputs;
    for (int64_t b = m.first_block; b < m.end_block; ++b) {
      const uint32_t* counts = m.kept.counts + (t * m.kept.blocks + b) * 16;
      const uint16_t* index = m.kept.index + counts[0];
      const T* dy = m.dy + b * m.kept.block_rows * m.dy_row;
      T* g = m.g + b * m.kept.block_rows * m.g_row;
#define RTL_BUCKET(P) correlate_bucket<T, P, Table>(m, start, dy, g, index, counts[P]), index += counts[P]
      RTL_BUCKET(1);
      RTL_BUCKET(2);
      RTL_BUCKET(3);
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

// ---- g = dyᵀ · x of a few samples: dense tiles, the mask's bits applied where they are added

template <class T, int R, int V>
RTL_INLINE void outer_tile(const Outer<T>& m, int64_t o, int64_t i) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = typename Vector<T>::type{};
  for (int64_t s = 0; s < m.samples; ++s) {
    const T* x = m.x[s] + i;
    const T* dy = m.dy[s] + o;
    typename Vector<T>::type column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(x + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename Vector<T>::type value = splat(dy[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += value * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* g = m.g + (o + r) * m.g_row + i + v * L;
      typename Vector<T>::type add = sum[r][v];
      if (m.words) {
        // i is a multiple of the lanes, which divide 32: a vector's bits lie in one word.
        const int64_t at = i + v * L;
        const uint32_t bits = m.words[(o + r) * m.words_row + at / 32] >> (at % 32);
        T part[L];
        store(part, add);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) part[l] = bits >> l & 1 ? part[l] : T(0);
        add = load(part);
      }
      store(g, load(g) + add);
    }
  }
}

template <class T>
void outer_rest(const Outer<T>& m, int64_t o, int64_t rows, int64_t i, int64_t inputs) {
  for (int64_t r = o; r < o + rows; ++r)
    for (int64_t j = i; j < i + inputs; ++j) {
      if (m.words && !(m.words[r * m.words_row + j / 32] >> (j % 32) & 1)) continue;
      T sum = 0;
      for (int64_t s = 0; s < m.samples; ++s) sum += m.dy[s][r] * m.x[s][j];
      m.g[r * m.g_row + j] += sum;
    }
}

template <class T>
void outer(const Outer<T>& m) {
  constexpr int L = Vector<T>::lanes, V = RTL_REGISTERS >= 32 ? 4 : 2, R = RTL_REGISTERS >= 32 ? 6 : 4;
  int64_t i = 0;
  for (; i + V * L <= m.inputs; i += V * L) {
    int64_t o = 0;
    for (; o + R <= m.rows; o += R) outer_tile<T, R, V>(m, o, i);
    for (; o < m.rows; ++o) outer_tile<T, 1, V>(m, o, i);
  }
  for (; i + L <= m.inputs; i += L) {
    int64_t o = 0;
    for (; o + R <= m.rows; o += R) outer_tile<T, R, 1>(m, o, i);
    for (; o < m.rows; ++o) outer_tile<T, 1, 1>(m, o, i);
  }
  if (i < m.inputs) outer_rest(m, 0, m.rows, i, m.inputs - i);
}

// ---- samples as lanes

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
      if constexpr (L == 16)
        swap_blocks<V, L, D, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(v[i], v[i + D]);
      else if constexpr (L == 8)
        swap_blocks<V, L, D, 0, 1, 2, 3, 4, 5, 6, 7>(v[i], v[i + D]);
      else if constexpr (L == 4)
        swap_blocks<V, L, D, 0, 1, 2, 3>(v[i], v[i + D]);
      else
        swap_blocks<V, L, D, 0, 1>(v[i], v[i + D]);
    }
  }
}

template <class T>
RTL_INLINE void transpose(typename Vector<T>::type (&v)[Vector<T>::lanes]) {
  constexpr int L = Vector<T>::lanes;
  transpose_step<T, 1>(v);
  if constexpr (L > 2) transpose_step<T, 2>(v);
  if constexpr (L > 4) transpose_step<T, 4>(v);
  if constexpr (L > 8) transpose_step<T, 8>(v);
}

// ---- y = x · wᵀ of a few samples, inputs as lanes

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

// The weights a vector's bits keep, zero elsewhere, whatever stands there.
template <class T>
RTL_INLINE typename Vector<T>::type keep(typename Vector<T>::type w, uint32_t bits) {
  typedef typename Bits<T>::type B;
  B lane;
#pragma GCC unroll 16
  for (int l = 0; l < Vector<T>::lanes; ++l) lane[l] = 1u << l;
  const B kept = (B)(((bits - B{}) & lane) != 0);
  return (typename Vector<T>::type)((B)w & kept);
}

// R rows × S samples: as many sums as a vector has lanes, so that one transpose adds up the lanes of all of them.
template <class T, int R, int S>
RTL_INLINE void few_tile(const Few<T>& m, int64_t o, int64_t s0) {
  constexpr int L = Vector<T>::lanes;
  static_assert(R * S == L, "one sum a lane");
  typename Vector<T>::type sum[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) sum[i] = typename Vector<T>::type{};
  // Rows and samples that are not there repeat the last one; their sums are not stored.
  const T* w[R];
  const uint32_t* words[R];
  const T* x[S];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int64_t row = o + r < m.rows ? o + r : m.rows - 1;
    w[r] = m.w + row * m.w_row;
    words[r] = m.words ? m.words + row * m.words_row : nullptr;
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) x[s] = m.x[s0 + s < m.samples ? s0 + s : m.samples - 1];
  int64_t i = 0;
  for (; i + L <= m.inputs; i += L) {
    typename Vector<T>::type column[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) column[s] = load(x[s] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      typename Vector<T>::type value = load(w[r] + i);
      if (m.words) value = keep<T>(value, words[r][i / 32] >> (i % 32));
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[r * S + s] += value * column[s];
    }
  }
  if (i < m.inputs) {
    T part[L];
    typename Vector<T>::type column[S];
    for (int s = 0; s < S; ++s) {
      for (int l = 0; l < L; ++l) part[l] = i + l < m.inputs ? x[s][i + l] : T(0);
      column[s] = load(part);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      for (int l = 0; l < L; ++l) part[l] = i + l < m.inputs ? w[r][i + l] : T(0);
      typename Vector<T>::type value = load(part);
      if (m.words) value = keep<T>(value, words[r][i / 32] >> (i % 32));
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[r * S + s] += value * column[s];
    }
  }
  transpose<T>(sum);
#pragma GCC unroll 16
  for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  T total[L];
  store(total, sum[0]);
  for (int r = 0; r < R && o + r < m.rows; ++r)
    for (int s = 0; s < S && s0 + s < m.samples; ++s)
      m.y[s0 + s][o + r] = total[r * S + s] + (m.bias ? m.bias[o + r] : T(0));
}

template <class T>
void few(const Few<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t s = 0; s < m.samples;) {
    const int64_t left = m.samples - s;
    if (L >= 4 && left > 2) {
      for (int64_t o = 0; o < m.rows; o += L / 4) few_tile<T, (L >= 4 ? L / 4 : L), (L >= 4 ? 4 : 1)>(m, o, s);
      s += 4;
    } else if (left == 2) {
      for (int64_t o = 0; o < m.rows; o += L / 2) few_tile<T, L / 2, 2>(m, o, s);
      s += 2;
    } else {
      for (int64_t o = 0; o < m.rows; o += L) few_tile<T, L, 1>(m, o, s);
      s += 1;
    }
  }
}

template <class T>
void to_lanes(const Lanes<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t e = 0; e < m.length; e += L) {
    const int64_t width = m.length - e < L ? m.length - e : L;
    typename Vector<T>::type v[L];
    if (m.count == L && width == L) {
#pragma GCC unroll 16
      for (int s = 0; s < L; ++s) v[s] = load(m.rows[s] + e);
    } else {
      T part[L * L];
      for (int s = 0; s < L; ++s)
        for (int i = 0; i < L; ++i) part[s * L + i] = s < m.count && i < width ? m.rows[s][e + i] : T(0);
#pragma GCC unroll 16
      for (int s = 0; s < L; ++s) v[s] = load(part + s * L);
    }
    transpose<T>(v);
    if (width == L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(m.lanes_at + m.place[e + i], v[i]);
    } else {
      T part[L * L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(part + i * L, v[i]);
      for (int i = 0; i < width; ++i) store(m.lanes_at + m.place[e + i], load(part + i * L));
    }
  }
}

template <class T>
void from_lanes(const Lanes<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t e = 0; e < m.length; e += L) {
    const int64_t width = m.length - e < L ? m.length - e : L;
    typename Vector<T>::type v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = load(m.lanes_at + m.place[i < width ? e + i : e]);
    transpose<T>(v);
    if (m.count == L && width == L) {
#pragma GCC unroll 16
      for (int s = 0; s < L; ++s) store(m.rows[s] + e, v[s]);
    } else {
      T part[L * L];
#pragma GCC unroll 16
      for (int s = 0; s < L; ++s) store(part + s * L, v[s]);
      for (int64_t s = 0; s < m.count; ++s)
        for (int64_t i = 0; i < width; ++i) m.rows[s][e + i] = part[s * L + i];
    }
  }
}

// ---- depthwise

template <class T, int H>
RTL_INLINE void filter_rows(const Filter<T>& m, int64_t h, int64_t w) {
  constexpr int L = Vector<T>::lanes;
  typename Vector<T>::type sum[H];
#pragma GCC unroll 8
  for (int r = 0; r < H; ++r) sum[r] = splat(m.bias);
  const T* x = m.x + h * m.x_row + w;
  for (int64_t t = 0; t < m.taps; ++t) {
    const typename Vector<T>::type value = splat(m.weights[t]);
    const T* at = x + m.at[t];
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r) sum[r] += value * load(at + r * m.x_row);
  }
  T* y = m.y + h * m.y_row + w;
  if (m.width - w >= L) {
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r) store(y + r * m.y_row, sum[r]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < H; ++r) {
      T part[L];
      store(part, sum[r]);
      for (int64_t i = 0; i < m.width - w; ++i) y[r * m.y_row + i] = part[i];
    }
  }
}

template <class T>
void filter(const Filter<T>& m) {
  constexpr int L = Vector<T>::lanes;
  for (int64_t w = 0; w < m.width; w += L) {
    int64_t h = 0;
    for (; h + 8 <= m.height; h += 8) filter_rows<T, 8>(m, h, w);
    for (; h + 4 <= m.height; h += 4) filter_rows<T, 4>(m, h, w);
    for (; h < m.height; ++h) filter_rows<T, 1>(m, h, w);
  }
}

template <class T>
constexpr Kernels<T> table() {
  return {Vector<T>::lanes, kHalves ? Vector<T>::lanes / 2 : Vector<T>::lanes, kVectors * Vector<T>::lanes,
          multiply<T>,      correlate<T>, outer<T>, few<T>, to_lanes<T>, from_lanes<T>, filter<T>};
}

}  // namespace RTL_LEVEL
}  // namespace rtl_kernels
