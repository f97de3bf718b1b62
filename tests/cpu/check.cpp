// The CPU kernels (csrc/cpu/operators.h) against naive double loops. Built and run by check.py; knows nothing of torch.
//
//   check --levels                   the instruction sets this CPU can run (RTL_KERNELS_CPU_LEVEL chooses one)
//   check [--random N] [--seed S] [--only TEXT] [--plant BUG] [--verbose]      named cases, then N random ones
//   check --part I N [...]           every Nth of these from the Ith, counted from 0
//   check --far [...]                the same operators on tensors of more than 2^31 elements, of which few exist
//
// Every tensor ends where its buffer ends: an unmapped page follows, or AddressSanitizer watches. Results are preset to
// NaN, so that one not written is seen. Each call runs on 1, 2, 3 and 5 threads, piece by piece backwards and beside
// another, and has to give the same bits; threads are new at every call, so that nothing is kept in them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/operators.h"

using namespace rtl_kernels;

namespace {

using Ints = std::vector<int64_t>;

// Bugs put into what the kernels are given, so that each watcher can be seen to watch.
enum class Plant { kNone, kOverrun, kOverflow, kRace, kMask, kNarrow };
const char* const kPlants[] = {"none", "overrun", "overflow", "race", "mask", "narrow"};
Plant plant = Plant::kNone;

// ---- memory

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kGuarded = false;  // the sanitizer sees a byte past a block of malloc's
#else
constexpr bool kGuarded = true;
#endif

// `count` elements of T. `sparse`: zeros that take no memory until written; else all of them `fill`.
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, T fill, bool sparse = false) : bytes_(size_t(count) * sizeof(T)) {
    if (kGuarded || sparse) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE));
      mapped_ = (bytes_ + page - 1) / page * page + page;
      base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base_ == MAP_FAILED) throw std::runtime_error("mmap of " + std::to_string(mapped_) + " bytes failed");
      char* const end = static_cast<char*>(base_) + mapped_ - page;
      if (mprotect(end, page, PROT_NONE)) throw std::runtime_error("mprotect failed");
      data_ = reinterpret_cast<T*>(end - bytes_);
    } else {
      base_ = std::malloc(bytes_);
      data_ = static_cast<T*>(base_);
    }
    if (!sparse) std::fill(data_, data_ + count, fill);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (mapped_)
      munmap(base_, mapped_);
    else
      std::free(base_);
  }
  T* data() const { return data_; }

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  void* base_ = nullptr;
  T* data_ = nullptr;
};

// ---- cases

// A convolution with everything around it; a linear layer is one of 1 × 1 on planes of one pixel. `a` is what its forward
// reads (groups · second channels), `b` what it gives (groups · lead), as in the weight (groups · lead, second, kernel).
struct Case {
  std::string name;
  int64_t lead, second, groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t in[2], out[2];
  Ints sizes;                  // samples of no mask, of mask 0, of mask 1 ...
  std::vector<double> density; // of each mask
  int64_t inner = 1;
  int64_t every = 0;           // > 0: so many samples, each through all masks (`sizes` then follows)
  bool untied = false, bias = true;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t weights() const { return groups * lead * second * taps(); }
  int64_t masks() const { return int64_t(density.size()); }
  int64_t a_size() const { return groups * second * in[0] * in[1]; }
  int64_t b_size() const { return groups * lead * out[0] * out[1]; }
  int64_t samples() const {
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    return total;
  }
};

int64_t out_size(const Case& c, int d, int64_t after) {
  return (c.in[d] + c.padding[d] + after - c.dilation[d] * (c.kernel[d] - 1) - 1) / c.stride[d] + 1;
}

Case linear(std::string name, int64_t out, int64_t in, Ints sizes, std::vector<double> density) {
  return {std::move(name), out, in, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {1, 1}, {1, 1}, std::move(sizes), std::move(density)};
}

struct Window {
  int64_t kernel[2], stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1}, after[2] = {0, 0};
};

Case conv(std::string name, int64_t out, int64_t in, int64_t groups, Window w, int64_t height, int64_t width, Ints sizes,
          std::vector<double> density) {
  Case c{std::move(name), out / groups, in / groups, groups, {w.kernel[0], w.kernel[1]}, {w.stride[0], w.stride[1]},
         {w.padding[0], w.padding[1]}, {w.dilation[0], w.dilation[1]}, {height, width}, {}, std::move(sizes),
         std::move(density)};
  for (int d = 0; d < 2; ++d) c.out[d] = out_size(c, d, w.padding[d] + w.after[d]);
  return c;
}

Case with(Case c, const std::function<void(Case&)>& change) {
  change(c);
  return c;
}

Case every(Case c, int64_t samples) {
  c.every = samples;
  c.sizes.assign(c.density.size() + 1, samples);
  c.sizes[0] = 0;
  return c;
}

Case untied(Case c) {
  c.untied = true;
  c.sizes[0] = 0;
  return c;
}

const Window kSame{{3, 3}, {1, 1}, {1, 1}};

std::vector<Case> named() {
  return {
      linear("linear", 33, 70, {5, 17, 0, 28}, {.5, .5, .25}),
      linear("linear, groups of every size", 9, 40, {1, 2, 3, 4, 5, 8, 16, 33, 70}, {.5, .9, 0, 1, .1, .3, .05, .5}),
      linear("linear, a long row", 7, 1500, {0, 9, 1, 10}, {.9, .5, .05}),
      linear("linear, wide", 300, 270, {3, 12, 6, 1}, {.5, .1, .75}),
      linear("linear, many samples of one mask", 24, 48, {0, 200}, {.5}),
      linear("linear, many samples of a sparse mask", 40, 100, {0, 95, 150}, {.1, .1}),
      linear("linear, tiles of inputs", 20, 600, {0, 30, 60, 90}, {.5, .3, .9}),
      linear("linear, masks that threads compare side by side", 500, 520, {1, 9, 5, 1, 6, 1, 1, 9},
             {.5, .1, .3, .05, .5, .1, .9}),
      linear("linear, results past the caches", 1024, 6, {0, 4100}, {.5}),
      linear("linear, one weight", 1, 1, {3, 12, 1}, {1, 0}),
      linear("linear, no masks kept, all kept", 33, 65, {7, 40, 36, 1}, {0, 1, .5}),
      linear("linear, no batch", 5, 8, {0, 0, 0}, {.5, .5}),
      with(linear("linear, inner dimensions", 6, 11, {1, 4, 4}, {.5, .5}), [](Case& c) { c.inner = 6; }),
      every(linear("linear, all masks for every sample", 13, 35, {}, {.5, .2, .9}), 21),
      untied(linear("linear, untied", 13, 35, {0, 21, 4, 30}, {.5, .2, .9})),
      untied(every(linear("linear, untied, all masks", 13, 35, {}, {.5, .2, .9}), 7)),
      conv("1×1", 24, 20, 1, {{1, 1}}, 4, 4, {3, 30, 9}, {.5, .25}),
      conv("1×1, planes of whole vectors", 12, 6, 1, {{1, 1}}, 8, 16, {2, 4, 3}, {.5, .25}),
      conv("1×1, planes of four pixels", 26, 20, 2, {{1, 1}}, 2, 2, {3, 30, 9}, {.5, .25}),
      conv("1×1, wide planes", 8, 24, 1, {{1, 1}}, 32, 32, {1, 1, 1}, {.5, .25}),
      conv("1×1, one pixel that reads only zeros", 7, 5, 1, {{1, 1}, {3, 3}, {1, 1}}, 1, 1, {4, 10, 6}, {.5, .5}),
      conv("1×1, stride 2", 7, 5, 1, {{1, 1}, {2, 2}}, 9, 8, {5, 19, 13}, {.5, .5}),
      conv("3×3, one pixel", 7, 5, 1, kSame, 1, 1, {9, 20, 11}, {.5, .5}),
      conv("3×3", 10, 9, 1, kSame, 8, 7, {9, 33, 16, 1}, {.5, .1, .9}),
      conv("3×3, few samples", 10, 9, 1, kSame, 20, 31, {1, 2, 0, 3}, {.5, .1, .9}),
      conv("3×3, many channels", 8, 70, 1, kSame, 6, 6, {0, 20, 17}, {.5, .1}),
      conv("3×3, strips", 6, 40, 1, kSame, 60, 40, {0, 17}, {.5}),
      conv("3×3, strips of one sample", 5, 3, 1, kSame, 90, 70, {1, 1, 1}, {.5, .5}),
      conv("unaligned rows past the caches", 3, 1, 1, {{1, 3}, {1, 1}, {0, 1}}, 1000, 1401, {0, 1}, {.6}),
      conv("3×3, stride 2", 10, 9, 1, {{3, 3}, {2, 2}, {1, 1}}, 9, 8, {3, 20, 17}, {.5, .1}),
      conv("stride (1, 2), dilation (2, 1)", 5, 4, 1, {{3, 2}, {1, 2}, {2, 1}, {2, 1}}, 11, 17, {5, 9, 9}, {.5, .3}),
      conv("stride past the kernel", 5, 4, 1, {{2, 2}, {3, 3}}, 11, 12, {4, 16, 3}, {.5, .3}),
      conv("asymmetric padding", 5, 4, 1, {{2, 4}, {1, 1}, {0, 1}, {1, 1}, {1, 1}}, 6, 7, {4, 16, 20}, {.5, .3}),
      conv("padding past the kernel", 5, 4, 1, {{2, 2}, {1, 1}, {3, 4}}, 3, 3, {4, 16, 20}, {.5, .3}),
      conv("stride and dilation that share a factor", 4, 6, 2, {{3, 2}, {2, 3}, {2, 1}, {4, 6}}, 14, 15, {2, 16, 5}, {.5, .3}),
      conv("groups", 12, 9, 3, kSame, 6, 6, {4, 16, 20}, {.5, .3}),
      conv("many groups", 300, 300, 300, kSame, 5, 5, {1, 16, 3}, {.5, .3}),
      conv("depthwise", 20, 20, 20, kSame, 16, 16, {3, 9, 8}, {.5, .3}),
      conv("depthwise, small planes", 20, 20, 20, kSame, 4, 4, {5, 33, 8}, {.5, .3}),
      conv("depthwise, planes of one vector", 6, 6, 6, kSame, 3, 4, {2, 9, 17}, {.5, .3}),
      conv("depthwise, planes of three vectors", 6, 6, 6, kSame, 6, 7, {2, 9, 3}, {.5, .3}),
      conv("depthwise, planes of many vectors", 6, 6, 6, kSame, 14, 14, {2, 9, 3}, {.5, .3}),
      conv("depthwise, dilated past the plane", 6, 6, 6, {{5, 5}, {1, 1}, {6, 6}, {3, 3}}, 5, 6, {2, 9, 3}, {.5, .3}),
      conv("depthwise, asymmetric padding", 6, 6, 6, {{2, 4}, {1, 1}, {0, 1}, {1, 1}, {1, 1}}, 6, 7, {4, 16, 5}, {.5, .3}),
      conv("depthwise, smaller than its input", 6, 6, 6, {{3, 3}}, 19, 18, {1, 4, 4}, {.5, 0}),
      every(conv("depthwise, smaller, all masks", 6, 6, 6, {{3, 3}}, 19, 18, {}, {.5, .3}), 3),
      untied(conv("depthwise, smaller, untied", 6, 6, 6, {{3, 3}}, 19, 18, {0, 4, 5}, {.5, .3})),
      conv("depthwise, stride 2", 6, 6, 6, {{5, 5}, {2, 2}, {2, 2}}, 33, 30, {1, 4, 4}, {.5, .3}),
      conv("depthwise, no tap kept, all kept", 6, 6, 6, kSame, 17, 19, {1, 4, 4}, {0, 1}),
      conv("depthwise, rows past the caches", 4, 4, 4, {{3, 3}, {1, 1}, {1, 1}}, 1027, 1024, {0, 1}, {.5}),
      conv("depthwise, two filters a channel", 12, 6, 6, kSame, 9, 9, {3, 16, 1}, {.5, .3}),
      every(conv("depthwise, all masks for every sample", 8, 8, 8, kSame, 16, 16, {}, {.5, .3}), 5),
      every(conv("3×3, all masks for every sample", 8, 6, 1, kSame, 7, 7, {}, {.5, .3}), 18),
      untied(conv("3×3, untied", 8, 6, 1, {{3, 3}}, 7, 7, {0, 20, 5, 5}, {.5, .3, .9})),
      untied(conv("depthwise, untied", 6, 6, 6, kSame, 16, 17, {0, 4, 5}, {.5, .3})),
  };
}

// One of each way through the kernels, on few samples far apart.
std::vector<Case> far_named() {
  return {
      linear("linear, few", 33, 70, {1, 3, 2}, {.5, .25}),
      linear("linear, vectors of samples", 33, 70, {5, 20, 17}, {.5, .25}),
      linear("linear, wide", 300, 270, {3, 12, 6}, {.5, .1}),
      with(linear("linear, inner dimensions", 6, 11, {1, 4, 4}, {.5, .5}), [](Case& c) { c.inner = 6; }),
      untied(linear("linear, untied", 33, 70, {0, 3, 20, 5}, {.5, .25, .1})),
      conv("1×1, in place", 12, 6, 1, {{1, 1}}, 8, 16, {2, 4, 3}, {.5, .25}),
      conv("1×1", 24, 20, 1, {{1, 1}}, 4, 4, {3, 20, 5}, {.5, .25}),
      conv("3×3, vectors of samples", 10, 9, 1, kSame, 8, 7, {3, 17, 5}, {.5, .1}),
      conv("3×3, few samples", 10, 9, 1, kSame, 20, 31, {1, 2, 3}, {.5, .1}),
      conv("3×3, stride 2, groups", 12, 9, 3, {{3, 3}, {2, 2}, {1, 1}}, 9, 8, {3, 17, 5}, {.5, .1}),
      untied(conv("3×3, untied", 8, 6, 1, {{3, 3}}, 7, 7, {0, 17, 5}, {.5, .3})),
      conv("depthwise", 20, 20, 20, kSame, 16, 16, {3, 9, 8}, {.5, .3}),
      conv("depthwise, smaller than its input", 20, 20, 20, {{3, 3}}, 18, 18, {3, 9, 8}, {.5, .3}),
      untied(conv("depthwise, untied", 6, 6, 6, kSame, 16, 17, {0, 4, 5}, {.5, .3})),
  };
}

Case drawn(std::mt19937& random, int number) {
  auto pick = [&](std::initializer_list<int64_t> of) { return of.begin()[random() % of.size()]; };
  auto up_to = [&](int64_t from, int64_t to) { return from + int64_t(random() % uint64_t(to - from + 1)); };
  for (;;) {
    const int64_t kind = up_to(0, 4);  // linear, 1×1, any convolution twice, depthwise
    Case c;
    if (kind == 0) {
      c = linear("", up_to(1, 140), up_to(1, 140), {}, {});
    } else {
      Window w{{up_to(1, 4), up_to(1, 4)}};
      int64_t groups = pick({1, 1, 2, 3}), lead = up_to(1, 9), second = up_to(1, 9);
      for (int d = 0; d < 2; ++d) {
        w.stride[d] = pick({1, 1, 2, 3});
        w.padding[d] = up_to(0, 3);
        w.after[d] = up_to(-w.padding[d], 1);
        w.dilation[d] = pick({1, 1, 2, 3});
        if (kind == 1) w.kernel[d] = 1;
        if (kind == 1 && random() % 4) w.stride[d] = 1, w.padding[d] = w.after[d] = 0;
      }
      if (kind == 4) {
        groups = up_to(1, 30), lead = pick({1, 1, 2}), second = 1;
        const bool same = random() % 2;  // outputs as large as inputs
        for (int d = 0; d < 2 && same; ++d) {
          const int64_t beside = w.dilation[d] * (w.kernel[d] - 1);
          w.stride[d] = 1, w.padding[d] = beside / 2, w.after[d] = beside % 2;
        }
      }
      c = conv("", groups * lead, groups * second, groups, w, up_to(1, 24), up_to(1, 24), {}, {});
    }
    if (c.out[0] < 1 || c.out[1] < 1) continue;
    // A division that rounds to zero makes one output of none.
    bool fits = true;
    for (int d = 0; d < 2; ++d) fits &= c.in[d] + c.padding[d] * 2 + 1 >= c.dilation[d] * (c.kernel[d] - 1) + 1;
    if (!fits) continue;
    const int64_t masks = up_to(1, 4);
    for (int64_t m = 0; m < masks; ++m) c.density.push_back(double(pick({0, 5, 10, 25, 50, 50, 75, 90, 100})) / 100);
    c.bias = random() % 4 != 0;
    if (random() % 6 == 0) {
      c = every(c, up_to(1, 24));
    } else {
      for (int64_t m = 0; m <= masks; ++m) c.sizes.push_back(pick({0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, up_to(1, 70)}));
      if (kind == 0 && random() % 3 == 0) c.inner = up_to(1, 5);
    }
    if (random() % 5 == 0) c = untied(c);
    if (c.samples() * c.inner * c.weights() * c.out[0] * c.out[1] > 3000000) continue;
    c.name = "random " + std::to_string(number);
    return c;
  }
}

std::string described(const Case& c) {
  auto pair = [](const int64_t (&p)[2]) { return std::to_string(p[0]) + "×" + std::to_string(p[1]); };
  std::string text = c.name + ": weight " + std::to_string(c.groups * c.lead) + "×" + std::to_string(c.second) + "×" +
                     pair(c.kernel) + ", groups " + std::to_string(c.groups) + ", in " + pair(c.in) + ", out " +
                     pair(c.out) + ", stride " + pair(c.stride) + ", padding " + pair(c.padding) + ", dilation " +
                     pair(c.dilation) + ", inner " + std::to_string(c.inner) + (c.untied ? ", untied" : "") +
                     (c.every ? ", every" : "") + ", samples of each mask";
  for (int64_t size : c.sizes) text += " " + std::to_string(size);
  return text;
}

// ---- threads

Parallel on(int threads) {
  return [threads](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    std::vector<std::thread> running;
    const int64_t each = plant == Plant::kRace ? count : (count + threads - 1) / threads;
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t begin = plant == Plant::kRace ? 0 : t * each, end = std::min(count, begin + each);
      if (begin < end) running.emplace_back([&body, begin, end] { body(begin, end); });
    }
    for (std::thread& thread : running) thread.join();
  };
}

void backwards(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = count; i-- > 0;) body(i, i + 1);
}

// ---- the naive loops

struct Exact {
  std::vector<double> value, terms;  // a sum, and the sum of its terms' magnitudes
  std::vector<int32_t> count;        // of terms
  explicit Exact(int64_t size) : value(size), terms(size), count(size) {}
};

// One sample's products: b = W a, a = Wᵀ b, dw += b aᵀ, where the mask keeps. Not instrumented: it is what takes the time.
template <class T>
__attribute__((no_sanitize("address"), no_sanitize("undefined"), no_sanitize("thread"), optimize("O2")))
void naive(const Case& c, const T* a, const T* b, const T* w, const uint8_t* keep, Exact& gathered, int64_t b_at,
           Exact& scattered, int64_t a_at, Exact& dw, int64_t dw_at) {
  const int64_t a_plane = c.in[0] * c.in[1], b_plane = c.out[0] * c.out[1];
  auto add = [](Exact& to, int64_t at, double term) __attribute__((
                 no_sanitize("address"), no_sanitize("undefined"), no_sanitize("thread"), always_inline)) {
    to.value.data()[at] += term;
    to.terms.data()[at] += std::fabs(term);
    ++to.count.data()[at];
  };
  int64_t weight = 0;
  for (int64_t o = 0; o < c.groups * c.lead; ++o)
    for (int64_t s = 0; s < c.second; ++s)
      for (int64_t kh = 0; kh < c.kernel[0]; ++kh)
        for (int64_t kw = 0; kw < c.kernel[1]; ++kw, ++weight) {
          if (!keep[weight]) continue;
          const double value = w[weight];
          const int64_t channel = o / c.lead * c.second + s;
          for (int64_t h = 0; h < c.out[0]; ++h)
            for (int64_t v = 0; v < c.out[1]; ++v) {
              const int64_t y = h * c.stride[0] + kh * c.dilation[0] - c.padding[0];
              const int64_t x = v * c.stride[1] + kw * c.dilation[1] - c.padding[1];
              if (y < 0 || y >= c.in[0] || x < 0 || x >= c.in[1]) continue;
              const int64_t from = channel * a_plane + y * c.in[1] + x, to = o * b_plane + h * c.out[1] + v;
              add(gathered, b_at + to, value * a[from]);
              add(scattered, a_at + from, value * b[to]);
              add(dw, dw_at + weight, double(a[from]) * b[to]);
            }
        }
}

// ---- running a case

int64_t compared = 0;

struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// |got - exact| may be what rounding every term and every addition once, in any order, can make of it.
template <class T>
void compare(const char* what, const T* got, const Exact& exact, int64_t at, int64_t count) {
  const double eps = std::numeric_limits<T>::epsilon();
  for (int64_t i = 0; i < count; ++i, ++compared) {
    const double error = std::fabs(double(got[i]) - exact.value[at + i]);
    const double allowed = eps * (2.0 * exact.count[at + i] + 4) * exact.terms[at + i];
    if (!(error <= allowed))
      throw Mismatch(std::string(what) + "[" + std::to_string(at + i) + "] is " + std::to_string(double(got[i])) +
                     ", expected " + std::to_string(exact.value[at + i]) + " (allowed error " +
                     std::to_string(allowed) + ")");
  }
}

template <class T>
void same_bits(const char* what, const std::string& how, const T* got, const T* first, int64_t count) {
  if (std::memcmp(got, first, size_t(count) * sizeof(T)))
    throw Mismatch(std::string(what) + " differs " + how + " from one thread's");
}

// `call` on one thread makes result 0; results 1 and 2, made in other ways, have to hold the same bits. Two callers at
// once come first: both meet a mask that is not compiled yet.
void in_every_way(const std::function<void(const Parallel&, int)>& call,
                  const std::function<void(const std::string&, int)>& same) {
  std::thread one([&] { call(on(2), 1); }), two([&] { call(on(2), 2); });
  one.join();
  two.join();
  call(on(plant == Plant::kRace ? 2 : 1), 0);
  same("by one of two callers at once", 1);
  same("by the other of two callers at once", 2);
  for (int threads : {2, 3, 5}) {
    call(on(threads), 1);
    same("on " + std::to_string(threads) + " threads", 1);
  }
  call(backwards, 1);
  same("piece by piece", 1);
}

template <class T>
class Run {
 public:
  // With `transposed` it is a, not b, that has a row for every sample and mask: a transposed convolution's every().
  Run(const Case& c, std::mt19937& random, bool transposed, bool far) : c_(c), far_(far) {
    rows_ = c.samples();
    Ints bounds(1, 0);
    for (int64_t size : c.sizes) bounds.push_back(bounds.back() + size);
    offsets_ = copied(bounds);
    spread_ = far ? (kFar / std::min(c.a_size(), c.b_size()) / c.inner + rows_) / std::max<int64_t>(1, rows_ - 1) : 1;
    if (!c.every) {
      Ints order(rows_);
      for (int64_t r = 0; r < rows_; ++r) order[r] = r * spread_;
      std::shuffle(order.begin(), order.end(), random);
      order_ = copied(order);
    }
    a_samples_ = c.every && !transposed ? c.every : rows_;
    b_samples_ = c.every && transposed ? c.every : rows_;
    std::normal_distribution<double> normal;
    auto draw = [&] { return T(normal(random)); };
    a_ = tensor(a_samples_ * c.inner, c.a_size());
    b_ = tensor(b_samples_ * c.inner, c.b_size());
    for (int64_t v = 0; v < a_samples_ * c.inner; ++v)
      for (int64_t i = 0; i < c.a_size(); ++i) at(a_, v, c.a_size())[i] = draw();
    for (int64_t v = 0; v < b_samples_ * c.inner; ++v)
      for (int64_t i = 0; i < c.b_size(); ++i) at(b_, v, c.b_size())[i] = draw();
    if (plant == Plant::kOverrun) {  // the last element lies past the end
      auto shorter = std::make_unique<Buffer<T>>(a_samples_ * c.inner * c.a_size() - 1, T(1));
      a_.swap(shorter);
    }
    const int64_t copies = c.untied ? c.masks() : 1, far_stride = far ? kFar : 0;
    weight_stride_ = c.untied ? std::max(far_stride, c.weights()) : 0;
    weight_ = std::make_unique<Buffer<T>>((copies - 1) * weight_stride_ + c.weights(), T(), far);
    for (int64_t k = 0; k < copies; ++k)
      for (int64_t i = 0; i < c.weights(); ++i) weight_->data()[k * weight_stride_ + i] = draw();
    bias_stride_ = std::max<int64_t>(far_stride, channels());
    bias_ = std::make_unique<Buffer<T>>((copies - 1) * bias_stride_ + channels(), T(), far);
    for (int64_t k = 0; k < copies; ++k)
      for (int64_t i = 0; i < channels(); ++i) bias_->data()[k * bias_stride_ + i] = draw();
    draw_masks(random);
    solve();
  }

  void check() {
    scatter_or_gather(false);
    scatter_or_gather(true);
    weight_gradient();
    bias_gradient(false);
    bias_gradient(true);
  }

 private:
  static constexpr int64_t kFar = (int64_t(1) << 31) + 64;

  int64_t channels() const { return c_.groups * std::max(c_.lead, c_.second); }

  template <class V>
  static std::unique_ptr<Buffer<V>> copied(const std::vector<V>& values) {
    auto buffer = std::make_unique<Buffer<V>>(int64_t(values.size()), V());
    std::copy(values.begin(), values.end(), buffer->data());
    return buffer;
  }

  std::unique_ptr<Buffer<T>> tensor(int64_t vectors, int64_t size, T fill = T()) const {
    const int64_t last = std::max<int64_t>(0, vectors / c_.inner - 1) * spread_ * c_.inner + c_.inner;
    return std::make_unique<Buffer<T>>(vectors ? last * size : 0, fill, far_);
  }

  // Vector v of a tensor: its samples lie spread_ apart.
  T* at(const std::unique_ptr<Buffer<T>>& tensor, int64_t v, int64_t size) const {
    return tensor->data() + (v / c_.inner * spread_ * c_.inner + v % c_.inner) * size;
  }

  // Which vector row r of the batch is, of a tensor of so many samples.
  int64_t vector(int64_t r, int64_t samples) const {
    const int64_t row = r / c_.inner, sample = order_ ? order_->data()[row] / spread_ : row % samples;
    return sample * c_.inner + r % c_.inner;
  }

  int64_t mask_of(int64_t r) const {  // -1: none
    int64_t g = 0;
    while (offsets_->data()[g + 1] <= r / c_.inner) ++g;
    return g - 1;
  }

  void draw_masks(std::mt19937& random) {
    const int64_t lead = c_.groups * c_.lead, trailing = c_.second * c_.taps();
    row_words_ = (trailing + 31) / 32;
    mask_words_ = far_ ? kFar / 2 : lead * row_words_;
    words_ = std::make_unique<Buffer<uint32_t>>((c_.masks() - 1) * mask_words_ + lead * row_words_, 0, far_);
    keep_.assign((c_.masks() + 1) * c_.weights(), 1);  // mask k's at (k + 1) · weights: the first is dense
    std::uniform_real_distribution<double> uniform;
    for (int64_t k = 0; k < c_.masks(); ++k)
      for (int64_t i = 0; i < c_.weights(); ++i) {
        const bool kept = uniform(random) < c_.density[k];
        keep_[(k + 1) * c_.weights() + i] = kept;
        const int64_t row = i / trailing, bit = i % trailing;
        words_->data()[k * mask_words_ + row * row_words_ + bit / 32] |= uint32_t(kept) << (bit % 32);
      }
    if (plant == Plant::kMask)
      for (uint8_t& kept : keep_) kept ^= 1;
  }

  void solve() {
    const int64_t vectors = rows_ * c_.inner;
    gathered_ = std::make_unique<Exact>(vectors * c_.b_size());
    scattered_ = std::make_unique<Exact>(vectors * c_.a_size());
    dw_ = std::make_unique<Exact>((c_.untied ? c_.masks() : 1) * c_.weights());
    if (plant == Plant::kOverrun) return;
    for (int64_t r = 0; r < vectors; ++r) {
      const int64_t mask = mask_of(r), own = c_.untied ? mask : 0;
      naive(c_, at(a_, vector(r, a_samples_), c_.a_size()), at(b_, vector(r, b_samples_), c_.b_size()),
            weight_->data() + own * weight_stride_, keep_.data() + (mask + 1) * c_.weights(), *gathered_,
            r * c_.b_size(), *scattered_, r * c_.a_size(), *dw_, own * c_.weights());
    }
  }

  Plan plan(bool scatter) const {
    Geometry geometry{{c_.kernel[0], c_.kernel[1]}, {c_.stride[0], c_.stride[1]}, {c_.padding[0], c_.padding[1]},
                      {c_.dilation[0], c_.dilation[1]}, c_.groups};
    if (plant == Plant::kOverflow) geometry.dilation[0] = std::numeric_limits<int64_t>::max();
    return scatter ? make_plan(true, c_.groups, c_.second, c_.lead, geometry, c_.out, c_.in)
                   : make_plan(false, c_.groups, c_.lead, c_.second, geometry, c_.in, c_.out);
  }

  Batch batch(int64_t samples) {
    const int64_t* order = order_ ? order_->data() : nullptr;
    if (plant == Plant::kNarrow && order) {  // what 31 bits leave of an element's number
      Ints cut(order, order + rows_);
      const int64_t size = c_.inner * std::max(c_.a_size(), c_.b_size());
      for (int64_t& sample : cut) sample = (sample * size & 0x7fffffff) / size;
      narrow_ = copied(cut);
      order = narrow_->data();
    }
    return {offsets_->data(), c_.masks(), order, samples, c_.inner};
  }

  Masks masks() const { return {words_->data(), mask_words_, row_words_}; }

  void scatter_or_gather(bool scatter) {
    const char* const what = scatter ? "scatter" : "gather";
    const int64_t size = scatter ? c_.a_size() : c_.b_size(), vectors = rows_ * c_.inner;
    const int64_t samples = scatter ? b_samples_ : a_samples_;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const Plan p = plan(scatter);
    std::unique_ptr<Buffer<T>> y[3];
    Forward<T> call{};
    call.x = (scatter ? b_ : a_)->data();
    call.x_sample = c_.inner * (scatter ? c_.b_size() : c_.a_size());
    call.y_row = c_.inner * size;
    call.weight = weight_->data();
    call.weight_stride = weight_stride_;
    call.bias = c_.bias ? bias_->data() : nullptr;
    call.bias_stride = c_.untied && c_.bias ? bias_stride_ : 0;
    const Batch b = batch(samples);
    in_every_way(
        [&](const Parallel& parallel, int which) {
          y[which] = tensor(vectors, size, nan);
          if (far_)
            for (int64_t v = 0; v < vectors; ++v) std::fill_n(at(y[which], v, size), size, nan);
          Forward<T> own = call;
          own.y = y[which]->data();
          if (vectors) forward<T>(p, b, masks(), own, parallel);
        },
        [&](const std::string& how, int which) {
          for (int64_t v = 0; v < vectors; ++v) same_bits(what, how, at(y[which], v, size), at(y[0], v, size), size);
        });
    if (plant == Plant::kOverrun) return;
    Exact expected = scatter ? *scattered_ : *gathered_;
    const int64_t pixels = size / c_.groups / (scatter ? c_.second : c_.lead);
    for (int64_t r = 0; r < vectors; ++r) {
      if (c_.bias)
        for (int64_t i = 0; i < size; ++i) {
          const double bias = bias_->data()[(c_.untied ? mask_of(r) * bias_stride_ : 0) + i / pixels];
          expected.value[r * size + i] += bias;
          expected.terms[r * size + i] += std::fabs(bias);
          ++expected.count[r * size + i];
        }
      compare(what, at(y[0], vector(r, rows_), size), expected, r * size, size);
    }
  }

  void weight_gradient() {
    const int64_t copies = c_.untied ? c_.masks() : 1;
    const Plan p = plan(false);
    const Batch b = batch(a_samples_);
    std::unique_ptr<Buffer<T>> dw[3];
    // A linear layer's is filled whatever stands there.
    const T untouched = p.linear() && rows_ ? std::numeric_limits<T>::quiet_NaN() : T();
    in_every_way(
        [&](const Parallel& parallel, int which) {
          dw[which] = std::make_unique<Buffer<T>>((copies - 1) * weight_stride_ + c_.weights(), untouched, far_);
          GradWeight<T> call{};
          call.input = a_->data();
          call.output = b_->data();
          call.dw = dw[which]->data();
          call.weight_stride = weight_stride_;
          call.input_samples = std::max<int64_t>(1, a_samples_);
          call.output_samples = std::max<int64_t>(1, b_samples_);
          if (rows_) grad_weight<T>(p, b, masks(), call, parallel);
        },
        [&](const std::string& how, int which) {
          for (int64_t k = 0; k < copies; ++k)
            same_bits("dw", how, dw[which]->data() + k * weight_stride_, dw[0]->data() + k * weight_stride_, c_.weights());
        });
    for (int64_t k = 0; k < copies; ++k)
      compare("dw", dw[0]->data() + k * weight_stride_, *dw_, k * c_.weights(), c_.weights());
  }

  // Of b, or of a; where one has fewer samples than rows it is no gradient.
  void bias_gradient(bool of_a) {
    if ((of_a ? a_samples_ : b_samples_) != rows_ || !rows_) return;
    const int64_t size = of_a ? c_.a_size() : c_.b_size(), copies = c_.untied ? c_.masks() : 1;
    const int64_t channels = c_.groups * (of_a ? c_.second : c_.lead), pixels = size / channels;
    const int64_t stride = c_.untied ? bias_stride_ : 0;
    Exact expected(copies * channels);
    for (int64_t r = 0; r < rows_ * c_.inner; ++r)
      for (int64_t i = 0; i < size; ++i) {
        const double term = at(of_a ? a_ : b_, vector(r, rows_), size)[i];
        const int64_t to = (c_.untied ? mask_of(r) * channels : 0) + i / pixels;
        expected.value[to] += term;
        expected.terms[to] += std::fabs(term);
        ++expected.count[to];
      }
    Buffer<T> db((copies - 1) * stride + channels, T(), far_);
    grad_bias<T>(batch(rows_), (of_a ? a_ : b_)->data(), channels, pixels, db.data(), stride);
    for (int64_t k = 0; k < copies; ++k) compare("db", db.data() + k * stride, expected, k * channels, channels);
  }

  const Case& c_;
  const bool far_;
  int64_t rows_, spread_, a_samples_, b_samples_;
  int64_t weight_stride_, bias_stride_, row_words_, mask_words_;
  std::unique_ptr<Buffer<int64_t>> offsets_, order_, narrow_;
  std::unique_ptr<Buffer<T>> a_, b_, weight_, bias_;
  std::unique_ptr<Buffer<uint32_t>> words_;
  std::vector<uint8_t> keep_;
  std::unique_ptr<Exact> gathered_, scattered_, dw_;
};

// Batch norm of groups of 3, 0 and 5 samples, its derivatives, and the same with fixed coefficients.
template <class T>
class Norms {
 public:
  Norms(int64_t channels, int64_t pixels, uint32_t seed) : channels_(channels), pixels_(pixels) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (Buffer<T>* to : {&x_, &dy_})
      for (int64_t i = 0; i < size(); ++i) to->data()[i] = T(normal(random) + (to == &x_ ? 3 : 0));
    for (Buffer<T>* to : {&weight_, &bias_})
      for (int64_t i = 0; i < statistics(); ++i) to->data()[i] = T(normal(random));
  }

  void check() {
    using Buffers = std::vector<std::unique_ptr<Buffer<T>>>;
    Buffers out[3];
    in_every_way(
        [&](const Parallel& parallel, int which) {
          const T nan = std::numeric_limits<T>::quiet_NaN();
          Buffers& o = out[which];
          o.clear();
          for (int64_t count : {size(), size(), size(), statistics(), statistics(), statistics()})
            o.push_back(std::make_unique<Buffer<T>>(count, nan));
          for (int i = 0; i < 2; ++i) o.push_back(std::make_unique<Buffer<T>>(statistics(), T()));
          batch_norm<T>(batch(), {x_.data(), channels_, pixels_, weight_.data(), bias_.data(), channels_, kEps, o[0]->data(),
                                  o[3]->data(), o[4]->data(), o[5]->data()}, parallel);
          batch_norm_grad<T>(batch(), {dy_.data(), x_.data(), channels_, pixels_, weight_.data(), channels_, o[3]->data(),
                                       o[5]->data(), o[1]->data(), o[6]->data(), o[7]->data()}, parallel);
          BatchNorm<T> fixed{};
          fixed.x = x_.data();
          fixed.channels = channels_;
          fixed.pixels = pixels_;
          fixed.weight = weight_.data();
          fixed.bias = bias_.data();
          fixed.affine_stride = channels_;
          fixed.y = o[2]->data();
          batch_norm_fixed<T>(batch(), fixed, parallel);
        },
        [&](const std::string& how, int which) {
          for (size_t i = 0; i < out[0].size(); ++i)
            same_bits("batch norm", how, out[which][i]->data(), out[0][i]->data(), i < 3 ? size() : statistics());
        });
    for (int64_t k = 0; k < kMasks; ++k)
      for (int64_t c = 0; c < channels_ && kOffsets[k + 1] < kOffsets[k + 2]; ++c) check_channel(k, c, out[0]);
  }

 private:
  static constexpr int64_t kMasks = 3, kOffsets[] = {0, 0, 3, 3, 8};
  static constexpr double kEps = 1e-5;

  int64_t size() const { return kOffsets[kMasks + 1] * channels_ * pixels_; }
  int64_t statistics() const { return kMasks * channels_; }
  Batch batch() const { return {kOffsets, kMasks, nullptr, kOffsets[kMasks + 1], 1}; }

  // One term's rounding for each addition, and a few more, of `size`, the terms' magnitudes.
  void near(const char* what, T got, double expected, double magnitude, double count) const {
    const double allowed = std::numeric_limits<T>::epsilon() * (8 + (sizeof(T) == 8 ? 4 * count : 0)) * magnitude;
    ++compared;
    if (!(std::fabs(got - expected) <= allowed))
      throw Mismatch(std::string("batch norm's ") + what + " is " + std::to_string(double(got)) + ", expected " +
                     std::to_string(expected) + " (" + std::to_string(channels_) + " channels of " +
                     std::to_string(pixels_) + " pixels)");
  }

  void check_channel(int64_t k, int64_t c, const std::vector<std::unique_ptr<Buffer<T>>>& out) const {
    const T* x = x_.data();
    const T* dy = dy_.data();
    const int64_t own = k * channels_ + c;
    std::vector<int64_t> places;
    for (int64_t row = kOffsets[k + 1]; row < kOffsets[k + 2]; ++row)
      for (int64_t p = 0; p < pixels_; ++p) places.push_back((row * channels_ + c) * pixels_ + p);
    const double count = double(places.size()), weight = weight_.data()[own], bias = bias_.data()[own];
    double sum = 0, squares = 0, sum_dy = 0, product = 0, size_dy = 0, size_product = 0;
    for (int64_t i : places) sum += x[i];
    const double mean = sum / count;
    for (int64_t i : places) {
      squares += (x[i] - mean) * (x[i] - mean);
      sum_dy += dy[i];
      product += dy[i] * (x[i] - mean);
      size_dy += std::fabs(dy[i]);
      size_product += std::fabs(dy[i]) * (std::fabs(x[i]) + std::fabs(mean));
    }
    const double inverse = 1 / std::sqrt(squares / count + kEps), scale = weight * inverse;
    const double slope = -scale * inverse * inverse * product / count;
    const double size_slope = std::fabs(scale) * inverse * inverse * size_product / count;
    near("mean", out[3]->data()[own], mean, std::fabs(mean), count);
    near("variance", out[4]->data()[own], squares / (count - 1), squares / (count - 1) + mean * mean / count, count);
    near("inverse_std", out[5]->data()[own], inverse, inverse * (1 + inverse * inverse * mean * mean / count), count);
    near("dw", out[6]->data()[own], product * inverse, size_product * inverse, count);
    near("db", out[7]->data()[own], sum_dy, size_dy, count);
    for (int64_t i : places) {
      const double y = (x[i] - mean) * scale + bias, size_y = (std::fabs(x[i]) + std::fabs(mean)) * std::fabs(scale) + std::fabs(bias);
      near("y", out[0]->data()[i], y, size_y, count);
      near("dx", out[1]->data()[i], scale * (dy[i] - sum_dy / count) + slope * (x[i] - mean),
           std::fabs(scale) * (std::fabs(dy[i]) + size_dy / count) + size_slope * (std::fabs(x[i]) + std::fabs(mean)), count);
      near("y of fixed coefficients", out[2]->data()[i], x[i] * weight + bias, std::fabs(x[i] * weight) + std::fabs(bias), 1);
    }
  }

  const int64_t channels_, pixels_;
  Buffer<T> x_{size(), T()}, dy_{size(), T()}, weight_{statistics(), T()}, bias_{statistics(), T()};
};

int failed_norms(uint32_t seed) {
  int failed = 0;
  for (int64_t channels : {1, 5, 37})
    for (int64_t pixels : {1, 4, 6, 25, 64, 65, 90, 256, 300}) {
      try {
        Norms<float>(channels, pixels, seed).check();
        Norms<double>(channels, pixels, seed).check();
      } catch (const Mismatch& mismatch) {
        std::fprintf(stderr, "MISMATCH %s\n", mismatch.what());
        ++failed;
      }
    }
  return failed;
}

template <class T>
bool passes(const Case& c, uint32_t seed, bool far) {
  for (const bool transposed : {false, true}) {
    if (transposed && !c.every) continue;
    std::mt19937 random(seed);
    try {
      Run<T>(c, random, transposed, far).check();
    } catch (const Mismatch& mismatch) {
      std::fprintf(stderr, "MISMATCH %s%s\n  %s\n", described(c).c_str(), sizeof(T) == 8 ? ", double" : ", float",
                   mismatch.what());
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  int drawn_cases = 0, part = 0, parts = 1;
  uint32_t seed = 0;
  bool far = false, verbose = false;
  std::string only;
  for (int i = 1; i < count; ++i) {
    const std::string option = arguments[i];
    const std::string value = i + 1 < count ? arguments[i + 1] : "";
    if (option == "--levels") {
      for (const std::string& name : available_levels()) std::printf("%s\n", name.c_str());
      return 0;
    } else if (option == "--far") {
      far = true;
    } else if (option == "--verbose") {
      verbose = true;
    } else if (option == "--random") {
      drawn_cases = std::stoi(value), ++i;
    } else if (option == "--seed") {
      seed = uint32_t(std::stoul(value)), ++i;
    } else if (option == "--part" && i + 2 < count) {
      part = std::stoi(value), parts = std::stoi(arguments[i + 2]), i += 2;
      if (part < 0 || part >= parts) {
        std::fprintf(stderr, "--part %d %d: expected I from 0 to N - 1\n", part, parts);
        return 2;
      }
    } else if (option == "--only") {
      only = value, ++i;
    } else if (option == "--plant") {
      const auto found = std::find(std::begin(kPlants), std::end(kPlants), value);
      if (found == std::end(kPlants)) {
        std::fprintf(stderr, "no such plant: %s\n", value.c_str());
        return 2;
      }
      plant = Plant(found - std::begin(kPlants)), ++i;
    } else {
      std::fprintf(stderr, "unknown option %s\n", option.c_str());
      return 2;
    }
  }
  std::vector<Case> cases = far ? far_named() : named();
  std::mt19937 random(seed);
  for (int i = 0; i < drawn_cases; ++i) cases.push_back(drawn(random, i));
  int failed = 0, run = 0, found = 0;
  const auto chosen = [&](const std::string& name) {
    return name.find(only) != std::string::npos && found++ % parts == part;
  };
  for (const Case& c : cases) {
    if (!chosen(c.name)) continue;
    if (verbose) std::fprintf(stderr, "%s\n", described(c).c_str());
    ++run;
    failed += !passes<float>(c, seed, far) || !passes<double>(c, seed, far);
  }
  if (!far && chosen("batch norm")) ++run, failed += failed_norms(seed);
  std::printf("%s: %d cases, %lld values compared, %d failed\n", level().name, run, static_cast<long long>(compared),
              failed);
  if (found == 0) std::fprintf(stderr, "no case is called '%s'\n", only.c_str());
  return failed || found == 0;
}
