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

// A sum of every column: the rows pass under two vectors of columns at a time.
template <class T, int Step>
void norm_columns(const Norm<T>& m) {
  constexpr int L = Vector<T>::lanes, N = 2;
  typedef typename Vector<T>::type V;
  int64_t w = 0;
  for (; w + N * L <= m.width; w += N * L) {
    V a[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) a[n] = Step == kSum ? V{} : load(m.a + w + n * L);
    for (int64_t r0 = 0; r0 < m.rows; r0 += kNormTerms) {
      const int64_t end = r0 + kNormTerms < m.rows ? r0 + kNormTerms : m.rows;
      V first[N], second[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) first[n] = second[n] = V{};
      for (int64_t r = r0; r < end; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n)
          norm_add<Step, V>(load(m.x + r * m.row + w + n * L),
                            Step == kProducts ? load(m.dy + r * m.row + w + n * L) : V{}, a[n], first[n], second[n]);
      T part[N * L];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) store(part + n * L, first[n]);
      for (int l = 0; l < N * L; ++l) m.first[w + l] += part[l];
      if (Step != kProducts) continue;
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) store(part + n * L, second[n]);
      for (int l = 0; l < N * L; ++l) m.second[w + l] += part[l];
    }
  }
  for (; w < m.width; ++w)
    for (int64_t r0 = 0; r0 < m.rows; r0 += kNormTerms) {
      const int64_t end = r0 + kNormTerms < m.rows ? r0 + kNormTerms : m.rows;
      T first = 0, second = 0;
      for (int64_t r = r0; r < end; ++r)
        norm_add<Step, T>(m.x[r * m.row + w], Step == kProducts ? m.dy[r * m.row + w] : T(0),
                          Step == kSum ? T(0) : m.a[w], first, second);
      m.first[w] += first;
      if (Step == kProducts) m.second[w] += second;
    }
}

// One sum of all: along the rows, four vectors at a time.
template <class T, int Step>
void norm_planes(const Norm<T>& m) {
  constexpr int L = Vector<T>::lanes, N = 4;
  typedef typename Vector<T>::type V;
  const T a = Step == kSum ? T(0) : *m.a;
  V first[N], second[N];
  double totals[2] = {0, 0};
  int64_t terms = 0;
  auto flush = [&] {
    T part[L];
    for (int n = 0; n < N; ++n) {
      store(part, first[n]);
      for (int l = 0; l < L; ++l) totals[0] += part[l];
      store(part, second[n]);
      for (int l = 0; Step == kProducts && l < L; ++l) totals[1] += part[l];
      first[n] = second[n] = V{};
    }
    terms = 0;
  };
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) first[n] = second[n] = V{};
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* x = m.x + r * m.row;
    const T* dy = Step == kProducts ? m.dy + r * m.row : x;
    int64_t w = 0;
    for (; w + N * L <= m.width; w += N * L) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        norm_add<Step, V>(load(x + w + n * L), load(dy + w + n * L), splat(a), first[n], second[n]);
      if (++terms == kNormTerms) flush();
    }
    for (; w + L <= m.width; w += L)
      norm_add<Step, V>(load(x + w), load(dy + w), splat(a), first[0], second[0]);
    T rest[2] = {0, 0};
    for (; w < m.width; ++w) norm_add<Step, T>(x[w], dy[w], a, rest[0], rest[1]);
    totals[0] += rest[0];
    totals[1] += rest[1];
    // Whole vectors past the last four added to the first sum alone.
    terms += N;
    if (terms >= kNormTerms) flush();
  }
  flush();
  *m.first += totals[0];
  if (Step == kProducts) *m.second += totals[1];
}

template <class T, int Step>
void norm_reduce(const Norm<T>& m) {
  if (m.columns)
    norm_columns<T, Step>(m);
  else
    norm_planes<T, Step>(m);
}

// y = x · a + b, or with Grad y = dy · a + x · b + c.
template <class T, bool Grad>
void norm_map(const Norm<T>& m) {
  constexpr int L = Vector<T>::lanes;
  typedef typename Vector<T>::type V;
  auto vector = [&](const T* p, int64_t w) __attribute__((always_inline)) { return m.columns ? load(p + w) : splat(*p); };
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* x = m.x + r * m.row;
    const T* dy = Grad ? m.dy + r * m.row : nullptr;
    T* y = m.y + r * m.row;
    int64_t w = 0;
    for (; w + L <= m.width; w += L) {
      const V a = vector(m.a, w), b = vector(m.b, w);
      store(y + w, Grad ? V(load(dy + w) * a + (load(x + w) * b + vector(m.c, w))) : V(load(x + w) * a + b));
    }
    for (; w < m.width; ++w) {
      const int64_t i = m.columns ? w : 0;
      y[w] = Grad ? dy[w] * m.a[i] + (x[w] * m.b[i] + m.c[i]) : x[w] * m.a[i] + m.b[i];
    }
  }
}

}  // namespace RTL_LEVEL
}  // namespace rtl_kernels
