// Batch normalisation's passes over memory; included by kernels_impl.h.

namespace rtl_kernels {
namespace RTL_LEVEL {

enum NormStep { kSum, kSquares, kProducts };

// What one vector (or element) of x and dy adds to the two sums.
template <int Step, class V>
RTL_INLINE void norm_add(V x, V dy, V a, V& first, V& second) {
  if (Step == kSum) first += x;
  if (Step == kSquares) first += (x - a) * (x - a);
  if (Step == kProducts) first += dy, second += dy * (x - a);
}

// Sums are of the type itself over at most this many terms, and of doubles beyond.
constexpr int64_t kNormTerms = 16;

// Planes of one channel lie far apart, where no hardware fetches ahead: so many rows ahead they are asked for.
constexpr int64_t kNormAhead = 4;

// As doubles, which a vector of floats fills two of: lane by lane, so that no sum waits for another.
template <class T>
RTL_INLINE void widen_add(typename Vector<T>::type v, double* sums) {
  constexpr int L = Vector<T>::lanes;
  T part[L];
  store(part, v);
#pragma GCC unroll 64
  for (int l = 0; l < L; ++l) sums[l] += part[l];
}

// A sum of every column: some rows at a time pass under a few vectors of columns.
template <class T, int Step>
void norm_columns(const Norm<T>& m) {
  constexpr int L = Vector<T>::lanes, N = 4;
  typedef typename Vector<T>::type V;
  for (int64_t r0 = 0; r0 < m.rows; r0 += kNormTerms) {
    const int64_t end = r0 + kNormTerms < m.rows ? r0 + kNormTerms : m.rows;
    int64_t w = 0;
    for (; w + N * L <= m.width; w += N * L) {
      V a[N], first[N], second[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        a[n] = Step == kSum ? V{} : load(m.a + w + n * L);
        first[n] = second[n] = V{};
      }
      for (int64_t r = r0; r < end; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          norm_add<Step, V>(load(m.x + r * m.row + w + n * L),
                            Step == kProducts ? load(m.dy + r * m.row + w + n * L) : V{}, a[n], first[n], second[n]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        widen_add<T>(first[n], m.first + w + n * L);
        if (Step == kProducts) widen_add<T>(second[n], m.second + w + n * L);
      }
    }
    for (; w < m.width; ++w) {
      T first = 0, second = 0;
      for (int64_t r = r0; r < end; ++r)
        norm_add<Step, T>(m.x[r * m.row + w], Step == kProducts ? m.dy[r * m.row + w] : T(0),
                          Step == kSum ? T(0) : m.a[w], first, second);
      m.first[w] += first;
      if (Step == kProducts) m.second[w] += second;
    }
  }
}

// One sum of all: along the rows, four vectors at a time.
template <class T, int Step>
void norm_planes(const Norm<T>& m) {
  constexpr int L = Vector<T>::lanes, N = 4;
  typedef typename Vector<T>::type V;
  const V a = splat(Step == kSum ? T(0) : *m.a);
  V first[N], second[N];
  double lanes[2][L] = {}, rest[2] = {0, 0};
  int64_t terms = 0;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) first[n] = second[n] = V{};
  auto flush = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      widen_add<T>(first[n], lanes[0]);
      if (Step == kProducts) widen_add<T>(second[n], lanes[1]);
      first[n] = second[n] = V{};
    }
    terms = 0;
  };
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* x = m.x + r * m.row;
    const T* dy = Step == kProducts ? m.dy + r * m.row : x;
    int64_t w = 0;
    for (; w + N * L <= m.width; w += N * L) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        if (Step != kSquares) __builtin_prefetch(x + kNormAhead * m.row + w + n * L);
        if (Step == kProducts) __builtin_prefetch(dy + kNormAhead * m.row + w + n * L);
        norm_add<Step, V>(load(x + w + n * L), load(dy + w + n * L), a, first[n], second[n]);
      }
      if (++terms == kNormTerms) flush();
    }
    if (w == m.width) continue;
#pragma GCC unroll 3
    for (int n = 0; n < N - 1; ++n) {
      if (w + L > m.width) break;
      norm_add<Step, V>(load(x + w), load(dy + w), a, first[n], second[n]);
      w += L;
    }
    if (++terms == kNormTerms) flush();
    T last[2] = {0, 0};
    for (; w < m.width; ++w) norm_add<Step, T>(x[w], dy[w], Step == kSum ? T(0) : *m.a, last[0], last[1]);
    rest[0] += last[0];
    rest[1] += last[1];
  }
  flush();
  for (int l = 0; l < L; ++l) rest[0] += lanes[0][l], rest[1] += lanes[1][l];
  *m.first += rest[0];
  if (Step == kProducts) *m.second += rest[1];
}

template <class T, int Step>
void norm_reduce(const Norm<T>& m) {
  if (m.columns)
    norm_columns<T, Step>(m);
  else
    norm_planes<T, Step>(m);
}

template <class T, bool Grad, bool Columns>
void norm_map_rows(const Norm<T>& m) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type V;
  auto vector = [&](const T* p, int64_t w) __attribute__((always_inline)) { return Columns ? load(p + w) : splat(*p); };
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* x = m.x + r * m.row;
    const T* dy = Grad ? m.dy + r * m.row : nullptr;
    T* y = m.y + r * m.row;
    int64_t w = 0;
    for (; w + L <= m.width; w += L) {
      const V a = vector(m.a, w), b = vector(m.b, w);
      if (!Columns) __builtin_prefetch(y + kNormAhead * m.row + w, 1);
      store(y + w, Grad ? V(load(dy + w) * a + (load(x + w) * b + vector(m.c, w))) : V(load(x + w) * a + b));
    }
    for (; w < m.width; ++w) {
      const int64_t i = Columns ? w : 0;
      y[w] = Grad ? dy[w] * m.a[i] + (x[w] * m.b[i] + m.c[i]) : x[w] * m.a[i] + m.b[i];
    }
  }
}

// y = x · a + b, or with Grad y = dy · a + x · b + c.
template <class T, bool Grad>
void norm_map(const Norm<T>& m) {
  if (m.columns)
    norm_map_rows<T, Grad, true>(m);
  else
    norm_map_rows<T, Grad, false>(m);
}

}  // namespace RTL_LEVEL
}  // namespace rtl_kernels
