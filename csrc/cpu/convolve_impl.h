// y = w · x where every kept input lies at a distance of its own from the column (kernels.h, Convolve). Included by
// kernels_impl.h.

namespace rtl_kernels {
namespace RTL_LEVEL {

#if RTL_REGISTERS >= 32
constexpr int kPair = 8;  // vectors on each of two lines of a single row of the weight: 16 sums
#else
constexpr int kPair = 6;
#endif

typedef int64_t Distance __attribute__((aligned(4), may_alias));

// One input of pattern P over N lines of V vectors, which `entry` is at; `below` is the second line.
template <class T, int R, int N, int V, int P>
RTL_INLINE void convolve_input(typename Vector<T>::type (&to)[R][N * V], const T* x, const T* below, const T*& entry) {
  constexpr int L = Vector<T>::lanes, kept = __builtin_popcount(P), head = sizeof(int64_t) / sizeof(T);
  const int64_t at = *reinterpret_cast<const Distance*>(entry);
  typename Vector<T>::type w[kept];
#pragma GCC unroll 4
  for (int i = 0; i < kept; ++i) w[i] = splat(entry[head + i]);
  entry += head + kept;
#pragma GCC unroll 16
  for (int v = 0; v < N * V; ++v) {
    typename Vector<T>::type column = v < V ? load(x + at + v * L) : load(below + at + (v - V) * L);
    if (kept > 1) column = held(column);
    int i = 0;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      if (P >> r & 1) to[r][v] += w[i++] * column;
  }
}

// Inputs of one pattern. A row's sum waits 4 cycles for each multiply-add, so where there are few columns U independent
// sums take turns; they are added in a fixed order at the end.
template <class T, int R, int N, int V, int U, int P>
RTL_INLINE void convolve_bucket(typename Vector<T>::type (&sum)[U][R][N * V], const Convolve<T>& m, const T*& entry,
                                uint32_t count) {
  const T* x = m.x;
  const T* below = N > 1 ? x + m.x_line : x;
  if (U > 1) {
    for (; count >= U; count -= U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) convolve_input<T, R, N, V, P>(sum[u], x, below, entry);
    }
  }
  for (; count; --count) convolve_input<T, R, N, V, P>(sum[0], x, below, entry);
}

// The inputs of either row of a block of two, one of each in turn: what is added to one waits for the one before.
template <class T, int V>
RTL_INLINE void convolve_singles(typename Vector<T>::type (&sum)[1][2][V], const Convolve<T>& m, const T*& entry,
                                 uint32_t first, uint32_t second) {
  const T* x = m.x;
  const T* other = entry + first * (sizeof(int64_t) / sizeof(T) + 1);
  uint32_t both = first < second ? first : second;
  first -= both;
  second -= both;
  for (; both; --both) {
    convolve_input<T, 2, 1, V, 1>(sum[0], x, x, entry);
    convolve_input<T, 2, 1, V, 2>(sum[0], x, x, other);
  }
  convolve_bucket<T, 2, 1, V, 1, 1>(sum, m, entry, first);
  entry = other;
  convolve_bucket<T, 2, 1, V, 1, 2>(sum, m, entry, second);
}

template <class T, int R, int N, int V, int U>
__attribute__((noinline)) void convolve_piece(const Convolve<T>& m) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type Vec;
  const uint32_t* counts = m.program.counts;
  const T* entry = m.program.entries;
  for (int64_t tile = 0; tile < m.program.tiles; ++tile) {
    const bool last = tile + 1 == m.program.tiles, affine = last && (m.scale || m.bias), act = last && m.relu;
    for (int64_t r0 = 0; r0 < m.rows; r0 += R, counts += (1 << R) - 1) {
      Vec sum[U][R][N * V];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
          for (int v = 0; v < N * V; ++v) sum[u][r][v] = Vec{};
#define RTL_BUCKET(P) convolve_bucket<T, R, N, V, U, P>(sum, m, entry, counts[P - 1])
      if constexpr (R == 2 && U == 1) {
        convolve_singles<T, V>(sum, m, entry, counts[0], counts[1]);
      } else {
        RTL_BUCKET(1);
        if constexpr (R > 1) RTL_BUCKET(2);
      }
      if constexpr (R > 1) RTL_BUCKET(3);
      if constexpr (R > 2) {
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
      }
#undef RTL_BUCKET
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if (r0 + r >= m.rows) break;
        T* to = m.y + (r0 + r) * m.y_row;
        Vec(&s)[N * V] = sum[0][r];
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u)
#pragma GCC unroll 16
          for (int v = 0; v < N * V; ++v) s[v] += sum[u][r][v];
        if (tile) {
#pragma GCC unroll 16
          for (int v = 0; v < N * V; ++v) s[v] += load(to + v * L);
        }
        if (affine) {
          const Vec scale = splat(m.scale ? m.scale[r0 + r] : T(1)), bias = splat(m.bias ? m.bias[r0 + r] : T(0));
#pragma GCC unroll 16
          for (int v = 0; v < N * V; ++v) s[v] = s[v] * scale + bias;
        }
        if (act) {
#pragma GCC unroll 16
          for (int v = 0; v < N * V; ++v) s[v] = relu(s[v]);
        }
#pragma GCC unroll 16
        for (int v = 0; v < N * V; ++v) store(to + v * L, s[v]);
      }
    }
  }
}

// All blocks of rows, or single rows; U where the sums are fewer than 4 cycles of 2 multiply-adds fill.
template <class T, int N, int V>
void convolve_single(const Convolve<T>& m) {
  convolve_piece<T, 1, N, V, (N * V <= 2 ? 4 : N * V <= 4 ? 2 : 1)>(m);
}

template <class T, int V>
void convolve_blocks(const Convolve<T>& m) {
  convolve_piece<T, kBlockRows, 1, V, (V == 1 ? 4 : V == 2 || (V == 3 && kBlockRows == 2) ? 2 : 1)>(m);
}

template <class T>
void convolve(const Convolve<T>& m) {
#define RTL_CASE(V, run) \
  case V:                \
    run;                 \
    break
  if (m.program.block_rows > 1) {
    switch (m.vectors) {
      RTL_CASE(1, (convolve_blocks<T, 1>(m)));
      RTL_CASE(2, (convolve_blocks<T, 2>(m)));
      RTL_CASE(3, (convolve_blocks<T, 3>(m)));
      RTL_CASE(4, (convolve_blocks<T, 4>(m)));
      RTL_CASE(5, (convolve_blocks<T, 5>(m)));
      RTL_CASE(6, (convolve_blocks<T, 6>(m)));
    }
  } else if (m.lines == 1) {
    switch (m.vectors) {
      RTL_CASE(1, (convolve_single<T, 1, 1>(m)));
      RTL_CASE(2, (convolve_single<T, 1, 2>(m)));
      RTL_CASE(3, (convolve_single<T, 1, 3>(m)));
      RTL_CASE(4, (convolve_single<T, 1, 4>(m)));
      RTL_CASE(5, (convolve_single<T, 1, 5>(m)));
      RTL_CASE(6, (convolve_single<T, 1, 6>(m)));
#if RTL_REGISTERS >= 32
      RTL_CASE(7, (convolve_single<T, 1, 7>(m)));
      RTL_CASE(8, (convolve_single<T, 1, 8>(m)));
#endif
    }
  } else {
    switch (m.vectors) {
      RTL_CASE(1, (convolve_single<T, 2, 1>(m)));
      RTL_CASE(2, (convolve_single<T, 2, 2>(m)));
      RTL_CASE(3, (convolve_single<T, 2, 3>(m)));
      RTL_CASE(4, (convolve_single<T, 2, 4>(m)));
      RTL_CASE(5, (convolve_single<T, 2, 5>(m)));
      RTL_CASE(6, (convolve_single<T, 2, 6>(m)));
#if RTL_REGISTERS >= 32
      RTL_CASE(7, (convolve_single<T, 2, 7>(m)));
      RTL_CASE(8, (convolve_single<T, 2, 8>(m)));
#endif
    }
  }
#undef RTL_CASE
}

}  // namespace RTL_LEVEL
}  // namespace rtl_kernels
