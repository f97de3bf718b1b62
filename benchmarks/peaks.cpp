// What one core can do at most: multiply-adds from registers, and loads from a buffer. Compiled and called by
// roofline.py, with -march=native: this measures a machine, it is not shipped to another.
#include <cstddef>
#include <cstring>

#if defined(__AVX512F__)
constexpr std::size_t WIDTH = 16;
#elif defined(__AVX__)
constexpr std::size_t WIDTH = 8;
#else
constexpr std::size_t WIDTH = 4;
#endif
typedef float vec __attribute__((vector_size(WIDTH * sizeof(float))));

// Enough chains that neither latency nor the loop counts.
constexpr int CHAINS = WIDTH == 16 ? 24 : 12;

// A sum of all elements, so that nothing is left out as unused.
static float total(const vec* v) {
  float sum = 0;
  for (int c = 0; c < CHAINS; ++c)
    for (std::size_t i = 0; i < WIDTH; ++i) sum += v[c][i];
  return sum;
}

extern "C" {

// Floating-point operations in one repetition of multiply_add().
double multiply_add_operations() { return 2.0 * CHAINS * WIDTH; }

float multiply_add(long repetitions, float a, float b) {
  vec v[CHAINS], scale, shift;
  for (std::size_t i = 0; i < WIDTH; ++i) scale[i] = a, shift[i] = b;
  for (int c = 0; c < CHAINS; ++c) v[c] = shift * float(c);
  for (long r = 0; r < repetitions; ++r)
#pragma GCC unroll 32
    for (int c = 0; c < CHAINS; ++c) v[c] = v[c] * scale + shift;
  return total(v);
}

// Reads a buffer of `floats` (a multiple of load_step()) from begin to end, again and again.
std::size_t load_step() { return 8 * WIDTH; }

float load(const float* data, std::size_t floats, long repetitions) {
  vec v[CHAINS] = {};
  for (long r = 0; r < repetitions; ++r) {
    for (std::size_t i = 0; i < floats; i += 8 * WIDTH)
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) v[c] += *reinterpret_cast<const vec*>(data + i + c * WIDTH);
    asm volatile("" ::: "memory");  // the next repetition reads again
  }
  return total(v);
}
}
