// Runs the kernels of csrc/cuda on the emulator and compares them with a float64 computation on the host.
//
//   runner [--kernel FAMILY] [--size quick|full|tiny|huge] [--order forward|skew] [--copies lazy|eager] [--seed N]
//          [--plant N]
//   runner --list        every kernel: name, threads, shared memory
//   runner --invariance  bits do not depend on other groups, on the tile's size, or on the schedule
//   runner --garbage     offsets and orders that no route holds lead nowhere out of bounds
//
// Ends with 0 and a line "OK ...", or with "MISMATCH ..." (4), or with what the emulator or a sanitizer reports.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cases.h"
#include "launch.cu"

namespace {

using rtl::Type;

struct KernelInfo {
  std::string name;
  int threads;
  int shared;
  const void* kernel;
};

template <class Arguments>
const void* address(void (*kernel)(Arguments)) {
  return reinterpret_cast<const void*>(kernel);
}

std::vector<KernelInfo> all_kernels() {
  std::vector<KernelInfo> kernels;
#define RTL_LIST(name, threads, shared, ...) kernels.push_back({name, threads, shared, address(&__VA_ARGS__)});
  RTL_KERNELS(RTL_LIST)
#undef RTL_LIST
  return kernels;
}

std::map<const void*, std::string> kernel_names;
std::set<std::string> kernels_run;
std::string planted_family;
int plant_number = 0;

void on_launch(const void* kernel) {
  const auto found = kernel_names.find(kernel);
  if (found == kernel_names.end()) simt::fail("a kernel was launched that RTL_KERNELS does not list");
  kernels_run.insert(found->second);
  simt::planted = found->second.rfind(planted_family, 0) == 0 ? plant_number : 0;
}

// ---- memory: exactly as long as it should be, so that AddressSanitizer sees one element too far

struct Buffer {
  unsigned char* data = nullptr;
  size_t bytes = 0, mapped = 0;
  Type type = Type::kF32;
  unsigned char* base = nullptr;

  Buffer() = default;
  // `shift` elements past a 16-byte boundary.
  Buffer(Type t, int64_t elements, int shift = 0) : bytes(size_t(elements) * width(t)), type(t) {
    const size_t extra = size_t(shift) * width(t);
    if (bytes + extra > size_t(1) << 28) {
      // Sparse: only the pages that are touched exist.
      mapped = bytes + extra;
      base = static_cast<unsigned char*>(
          mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (base == MAP_FAILED) std::fprintf(stderr, "NO MEMORY\n"), std::exit(77);
    } else {
      void* memory = nullptr;
      if (posix_memalign(&memory, 16, bytes + extra + (bytes + extra == 0))) std::exit(77);
      base = static_cast<unsigned char*>(memory);
      std::memset(base, 0xFF, bytes + extra);  // NaN
    }
    data = base + extra;
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data, other.data), std::swap(bytes, other.bytes), std::swap(mapped, other.mapped);
    std::swap(type, other.type), std::swap(base, other.base);
    return *this;
  }
  ~Buffer() {
    if (mapped) munmap(base, mapped);
    else std::free(base);
  }

  static int width(Type t) { return t == Type::kF16 || t == Type::kBF16 ? 2 : 4; }
  double get(int64_t i) const {
    if (type == Type::kF16) return rtl::to_float(reinterpret_cast<const rtl::half_t*>(data)[i]);
    if (type == Type::kBF16) return rtl::to_float(reinterpret_cast<const rtl::bf16_t*>(data)[i]);
    return reinterpret_cast<const float*>(data)[i];
  }
  void set(int64_t i, double value) {
    if (type == Type::kF16) reinterpret_cast<rtl::half_t*>(data)[i] = rtl::from_float<rtl::half_t>(float(value));
    else if (type == Type::kBF16) reinterpret_cast<rtl::bf16_t*>(data)[i] = rtl::from_float<rtl::bf16_t>(float(value));
    else if (type == Type::kTF32) reinterpret_cast<uint32_t*>(data)[i] = rtl::to_tf32(rtl::float_bits(float(value)));
    else reinterpret_cast<float*>(data)[i] = float(value);
  }
};

struct Random {
  std::mt19937_64 bits;
  explicit Random(uint64_t seed) : bits(seed) {}
  double value() { return double(bits() >> 11) * 0x1p-52 - 1; }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  bool chance(double p) { return double(bits() >> 11) * 0x1p-53 < p; }
};

// ---- a route and its masks, as the operators get them

struct Masks {
  int64_t masks, rows, row_bits, words_per_row;
  std::vector<int32_t> words;

  Masks(int64_t k, int64_t r, int64_t n, const std::string& kinds, Random& random)
      : masks(k), rows(r), row_bits(n), words_per_row((n + 31) / 32), words(size_t(k * r * words_per_row)) {
    for (int64_t m = 0; m < k; m++) {
      const char kind = kinds[size_t(m) % kinds.size()];
      for (int64_t o = 0; o < r; o++)
        for (int64_t i = 0; i < n; i++) {
          bool keep = false;
          switch (kind) {
            case '0': break;
            case '1': keep = true; break;
            case 'h': keep = random.chance(.5); break;
            case 's': keep = random.chance(.1); break;
            case 'b': keep = ((o / 32 + i / 32 + m) % 3 == 0) && random.chance(.5); break;  // whole tiles empty
          }
          if (keep) words[size_t((m * r + o) * words_per_row + i / 32)] |= int32_t(1u << i % 32);
        }
    }
  }
  bool kept(int64_t g, int64_t o, int64_t i) const {
    return g == 0 || (uint32_t(words[size_t(((g - 1) * rows + o) * words_per_row + i / 32)]) >> i % 32 & 1u);
  }
};

struct Routing {
  rtl::Route route;
  std::vector<int64_t> offsets, order, group;  // group[row]
  std::vector<uint32_t> summary;

  Routing(const Masks& masks, const std::vector<int64_t>& counts, bool ordered, int64_t repeat, bool summarised,
          Random& random) {
    offsets.push_back(0);
    for (size_t g = 0; g < counts.size(); g++) {
      offsets.push_back(offsets.back() + counts[g]);
      for (int64_t i = 0; i < counts[g]; i++) group.push_back(int64_t(g));
    }
    const int64_t rows = offsets.back();
    if (ordered) {
      for (int64_t i = 0; i < rows; i++) order.push_back(i);
      for (int64_t i = rows; i > 1; i--) std::swap(order[size_t(i - 1)], order[size_t(random.below(i))]);
    }
    route.words = masks.words.data();
    route.offsets = offsets.data();
    route.order = ordered ? order.data() : nullptr;
    route.masks = masks.masks;
    route.rows = rows;
    route.repeat = repeat;
    route.mask_rows = masks.rows;
    route.words_per_row = masks.words_per_row;
    if (summarised) {
      summary.assign(size_t(rtl::tile_summary_words(masks.masks, masks.rows, masks.words_per_row)), 0xDEADBEEF);
      if (rtl::tile_summary(route, summary.data(), nullptr)) simt::fail("tile_summary failed");
      route.summary = summary.data();
      const int64_t across = (masks.words_per_row + 31) / 32, down = (masks.rows + 31) / 32;
      for (int64_t m = 0; m < masks.masks; m++)
        for (int64_t b = 0; b < down; b++)
          for (int64_t c = 0; c < across * 32; c++) {
            bool any = false;
            for (int64_t o = b * 32; o < std::min(b * 32 + 32, masks.rows); o++)
              if (c < masks.words_per_row) any |= masks.words[size_t((m * masks.rows + o) * masks.words_per_row + c)] != 0;
            const bool found = summary[size_t((m * down + b) * across + c / 32)] >> c % 32 & 1u;
            if (any != found) std::fprintf(stderr, "MISMATCH tile_summary: mask %ld block %ld word %ld\n", m, b, c), std::exit(4);
          }
    }
  }
  int64_t sample(int64_t row) const { return order.empty() ? row : order[size_t(row)]; }
  int64_t shared_sample(int64_t row) const { return route.repeat > 1 ? row % (route.rows / route.repeat) : sample(row); }
};

// ---- comparison: rounding of the result's type, and of sums made in float32 in any order

struct Sum {
  double value = 0, size = 0;
  int64_t terms = 0;
  void add(double term) { value += term, size += std::fabs(term), terms++; }
};

void compare(const char* what, const std::string& name, const Buffer& got, int64_t at, const Sum& want) {
  const double rounding = got.type == Type::kF16 ? 0x1p-11 : got.type == Type::kBF16 ? 0x1p-8 : 0x1p-24;
  const double tiny = got.type == Type::kF16 ? 0x1p-24 : 0;
  const double allowed = std::fabs(want.value) * rounding * 1.01 + want.size * 0x1p-24 * (8 + 2 * std::sqrt(double(want.terms))) + tiny;
  const double found = got.get(at);
  if (std::fabs(found - want.value) <= allowed) return;
  std::fprintf(stderr, "MISMATCH %s of %s: element %ld is %.9g, expected %.9g within %.2g\n", what, name.c_str(), at, found,
               want.value, allowed);
  std::exit(4);
}

void check(int error, const std::string& name) {
  if (error) std::fprintf(stderr, "ERROR %d from %s\n", error, name.c_str()), std::exit(5);
}

// ---- linear

struct LinearRun {
  const LinearCase& c;
  Masks masks;
  Routing routing;
  int64_t vectors, x_vectors;
  Buffer x, dy, weight, bias, y, dx, dw, db;
  rtl::LinearArgs args;

  LinearRun(const LinearCase& linear, uint64_t seed, Random random = Random(0))
      : c(linear),
        masks((random = Random(seed), c.masks), c.out, c.in, c.kinds, random),
        routing(masks, c.counts, c.ordered, c.repeat, c.summarised, random) {
    vectors = routing.route.rows * c.inner;
    x_vectors = vectors / c.repeat;
    const int64_t copies = c.untied ? c.masks : 1;
    x = Buffer(c.type, (x_vectors ? (x_vectors - 1) * x_stride() + c.in : 0), c.shift);
    dy = Buffer(c.type, (vectors ? (vectors - 1) * dy_stride() + c.out : 0), c.shift);
    weight = Buffer(c.type, copies * c.out * c.in, c.shift);
    bias = Buffer(c.type, copies * c.out);
    for (int64_t v = 0; v < x_vectors; v++)
      for (int64_t i = 0; i < c.in; i++) x.set(v * x_stride() + i, random.value());
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t o = 0; o < c.out; o++) dy.set(v * dy_stride() + o, random.value());
    for (int64_t i = 0; i < copies * c.out * c.in; i++) weight.set(i, random.value());
    for (int64_t i = 0; i < copies * c.out; i++) bias.set(i, random.value());
    if (!c.untied && c.counts[0] == 0) {
      // A weight that no mask keeps may be anything.
      for (int64_t o = 0; o < c.out; o++)
        for (int64_t i = 0; i < c.in; i++) {
          bool any = false;
          for (int64_t g = 1; g <= c.masks; g++) any |= masks.kept(g, o, i);
          if (!any) weight.set(o * c.in + i, NAN);
        }
    }
    args.route = routing.route;
    args.weight = weight.data;
    args.inner = c.inner, args.in = c.in, args.out = c.out, args.untied = c.untied;
  }
  int64_t x_stride() const { return c.x_stride ? c.x_stride : c.in; }
  int64_t dy_stride() const { return c.x_stride ? c.x_stride : c.out; }
  double w(int64_t g, int64_t o, int64_t i) const {
    return masks.kept(g, o, i) ? weight.get((c.untied ? (g - 1) * c.out * c.in : 0) + o * c.in + i) : 0.;
  }
  // NaN where untied weights meet rows without a mask.
  bool wrong(int64_t row) const { return c.untied && routing.group[size_t(row)] == 0; }
  int64_t at(int64_t sample, int64_t t) const { return sample * c.inner + t; }

  void forward() {
    y = Buffer(c.type, vectors * c.out);
    rtl::LinearArgs a = args;
    a.x = x.data, a.x_stride = x_stride(), a.y = y.data, a.y_stride = c.out, a.bias = c.bias ? bias.data : nullptr;
    check(rtl::masked_linear(c.type, a, nullptr), c.name);
  }
  void check_forward() {
    for (int64_t r = 0; r < routing.route.rows; r++)
      for (int64_t t = 0; t < c.inner; t++)
        for (int64_t o = 0; o < c.out; o++) {
          const int64_t g = routing.group[size_t(r)];
          const int64_t to = at(routing.sample(r), t) * c.out + o;
          if (wrong(r)) {
            if (!std::isnan(y.get(to))) std::fprintf(stderr, "MISMATCH %s: not NaN\n", c.name.c_str()), std::exit(4);
            continue;
          }
          Sum sum;
          for (int64_t i = 0; i < c.in; i++)
            if (masks.kept(g, o, i)) sum.add(x.get(at(routing.shared_sample(r), t) * x_stride() + i) * w(g, o, i));
          if (c.bias) sum.add(bias.get((c.untied ? (g - 1) * c.out : 0) + o));
          compare("y", c.name, y, to, sum);
        }
  }
  void grad_input() {
    dx = Buffer(c.type, x_vectors * c.in);
    rtl::LinearArgs a = args;
    a.x = dy.data, a.x_stride = dy_stride(), a.y = dx.data, a.y_stride = c.in;
    check(rtl::masked_linear_grad_input(c.type, a, nullptr), c.name);
  }
  void check_grad_input() {
    std::vector<Sum> sums(size_t(x_vectors * c.in));
    for (int64_t r = 0; r < routing.route.rows; r++)
      for (int64_t t = 0; t < c.inner; t++)
        for (int64_t i = 0; i < c.in; i++) {
          const int64_t g = routing.group[size_t(r)];
          Sum& sum = sums[size_t(at(routing.shared_sample(r), t) * c.in + i)];
          if (wrong(r)) {
            if (!std::isnan(dx.get(at(routing.sample(r), t) * c.in + i)))
              std::fprintf(stderr, "MISMATCH %s: not NaN\n", c.name.c_str()), std::exit(4);
            sum.size = INFINITY;
            continue;
          }
          for (int64_t o = 0; o < c.out; o++)
            if (masks.kept(g, o, i)) sum.add(dy.get(at(routing.sample(r), t) * dy_stride() + o) * w(g, o, i));
        }
    for (size_t i = 0; i < sums.size(); i++)
      if (sums[i].size < INFINITY) compare("dx", c.name, dx, int64_t(i), sums[i]);
  }
  void grad_weight() {
    const int64_t copies = c.untied ? c.masks : 1;
    dw = Buffer(c.type, copies * c.out * c.in);
    db = Buffer(c.type, copies * c.out);
    rtl::LinearArgs a = args;
    a.x = x.data, a.x_stride = x_stride(), a.dy = dy.data, a.dy_stride = dy_stride(), a.y = dw.data, a.y_stride = c.in;
    a.db = c.bias ? db.data : nullptr;
    check(rtl::masked_linear_grad_weight(c.type, a, nullptr), c.name);
  }
  void check_grad_weight() {
    const int64_t copies = c.untied ? c.masks : 1;
    std::vector<Sum> sums(size_t(copies * c.out * c.in)), bias_sums(size_t(copies * c.out));
    for (int64_t r = 0; r < routing.route.rows; r++)
      for (int64_t t = 0; t < c.inner; t++) {
        const int64_t g = routing.group[size_t(r)], copy = c.untied ? g - 1 : 0;
        if (copy < 0) continue;
        for (int64_t o = 0; o < c.out; o++) {
          const double left = dy.get(at(routing.sample(r), t) * dy_stride() + o);
          bias_sums[size_t(copy * c.out + o)].add(left);
          for (int64_t i = 0; i < c.in; i++)
            if (masks.kept(g, o, i))
              sums[size_t((copy * c.out + o) * c.in + i)].add(left * x.get(at(routing.shared_sample(r), t) * x_stride() + i));
        }
      }
    for (size_t i = 0; i < sums.size(); i++) compare("dw", c.name, dw, int64_t(i), sums[i]);
    if (c.bias)
      for (size_t i = 0; i < bias_sums.size(); i++) compare("db", c.name, db, int64_t(i), bias_sums[i]);
  }
};

// ---- depthwise convolution

struct DepthwiseRun {
  const DepthwiseCase& c;
  Masks masks;
  Routing routing;
  int64_t outputs, out_h, out_w, taps, rows, x_rows, y_rows;
  Buffer x, dy, weight, bias, y, dx, dw, db;
  rtl::DepthwiseArgs args;

  DepthwiseRun(const DepthwiseCase& depthwise, uint64_t seed, Random random = Random(0))
      : c(depthwise),
        masks((random = Random(seed), c.masks), c.channels * c.multiplier, c.kernel_h * c.kernel_w, c.kinds, random),
        routing(masks, c.counts, c.ordered, c.repeat, false, random) {
    outputs = c.channels * c.multiplier;
    out_h = (c.in_h + 2 * c.pad - c.dilation * (c.kernel_h - 1) - 1) / c.stride_h + 1;
    out_w = (c.in_w + 2 * c.pad - c.dilation * (c.kernel_w - 1) - 1) / c.stride_w + 1;
    taps = c.kernel_h * c.kernel_w;
    rows = routing.route.rows;
    x_rows = c.transposed ? rows : rows / c.repeat, y_rows = c.transposed ? rows / c.repeat : rows;
    const int64_t copies = c.untied ? c.masks : 1;
    x = Buffer(c.type, extent(x_strides(), x_rows, c.channels, c.in_h, c.in_w));
    dy = Buffer(c.type, extent(y_strides(), y_rows, outputs, out_h, out_w));
    weight = Buffer(c.type, copies * outputs * taps);
    bias = Buffer(c.type, copies * outputs);
    each(x_rows, c.channels, c.in_h, c.in_w, [&](int64_t n, int64_t ch, int64_t h, int64_t w) {
      x.set(at(x_strides(), n, ch, h, w), random.value());
    });
    each(y_rows, outputs, out_h, out_w, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
      dy.set(at(y_strides(), n, o, h, w), random.value());
    });
    for (int64_t i = 0; i < copies * outputs * taps; i++) weight.set(i, random.value());
    for (int64_t i = 0; i < copies * outputs; i++) bias.set(i, random.value());
    args.route = routing.route;
    args.weight = weight.data;
    args.channels = c.channels, args.multiplier = c.multiplier;
    args.in_h = c.in_h, args.in_w = c.in_w, args.out_h = out_h, args.out_w = out_w;
    args.kernel_h = int(c.kernel_h), args.kernel_w = int(c.kernel_w);
    args.stride_h = int(c.stride_h), args.stride_w = int(c.stride_w);
    args.pad_top = args.pad_left = int(c.pad);
    args.dilation_h = args.dilation_w = int(c.dilation);
    args.untied = c.untied, args.batch_inner = c.channel_major, args.transposed = c.transposed;
  }

  rtl::Strides strides(int64_t n, int64_t channels, int64_t h, int64_t w) const {
    if (c.sample_stride) return {c.sample_stride, h * w, w, 1};
    if (c.channel_major) return {1, h * w * n, w * n, n};
    return {channels * h * w, h * w, w, 1};
  }
  rtl::Strides x_strides() const { return strides(x_rows, c.channels, c.in_h, c.in_w); }
  rtl::Strides y_strides() const { return strides(y_rows, outputs, out_h, out_w); }
  static int64_t at(const rtl::Strides& s, int64_t n, int64_t ch, int64_t h, int64_t w) {
    return n * s.n + ch * s.c + h * s.h + w * s.w;
  }
  static int64_t extent(const rtl::Strides& s, int64_t n, int64_t ch, int64_t h, int64_t w) {
    return n && ch && h && w ? at(s, n - 1, ch - 1, h - 1, w - 1) + 1 : 0;
  }
  template <class F>
  static void each(int64_t n, int64_t ch, int64_t h, int64_t w, F f) {
    for (int64_t a = 0; a < n; a++)
      for (int64_t b = 0; b < ch; b++)
        for (int64_t i = 0; i < h; i++)
          for (int64_t j = 0; j < w; j++) f(a, b, i, j);
  }
  // Calls f(row, output, oh, ow, ih, iw, tap) for every product of the convolution.
  template <class F>
  void products(F f) const {
    each(rows, outputs, out_h, out_w, [&](int64_t r, int64_t o, int64_t oh, int64_t ow) {
      for (int64_t i = 0; i < c.kernel_h; i++)
        for (int64_t j = 0; j < c.kernel_w; j++) {
          const int64_t ih = oh * c.stride_h - c.pad + i * c.dilation, iw = ow * c.stride_w - c.pad + j * c.dilation;
          if (ih >= 0 && ih < c.in_h && iw >= 0 && iw < c.in_w) f(r, o, oh, ow, ih, iw, i * c.kernel_w + j);
        }
    });
  }
  double w(int64_t g, int64_t o, int64_t tap) const {
    return weight.get(((c.untied ? (g - 1) * outputs : 0) + o) * taps + tap);
  }
  // Which of the two holds a sample once for all its repeats.
  int64_t x_sample(int64_t r) const { return c.transposed ? routing.sample(r) : routing.shared_sample(r); }
  int64_t y_sample(int64_t r) const { return c.transposed ? routing.shared_sample(r) : routing.sample(r); }
  // The bias belongs to what the convolution gives, which a transposed one gives on x's side.
  void add_bias(Sum& sum, int64_t r, int64_t o, int64_t width) const {
    if (c.bias) sum.add(bias.get((c.untied ? (routing.group[size_t(r)] - 1) * width : 0) + o));
  }
  double x_at(int64_t r, int64_t o, int64_t ih, int64_t iw) const {
    return x.get(at(x_strides(), x_sample(r), o / c.multiplier, ih, iw));
  }
  double dy_at(int64_t r, int64_t o, int64_t oh, int64_t ow) const {
    return dy.get(at(y_strides(), y_sample(r), o, oh, ow));
  }

  // Everything once, compared with nothing.
  void run_unchecked() {
    y = Buffer(c.type, extent(y_strides(), y_rows, outputs, out_h, out_w));
    dx = Buffer(c.type, extent(x_strides(), x_rows, c.channels, c.in_h, c.in_w));
    dw = Buffer(c.type, (c.untied ? c.masks : 1) * outputs * taps);
    rtl::DepthwiseArgs a = args;
    a.x = x.data, a.x_strides = x_strides(), a.y = y.data, a.y_strides = y_strides(), a.bias = bias.data;
    check(rtl::masked_depthwise(c.type, a, nullptr), c.name);
    a.x = dy.data, a.x_strides = y_strides(), a.y = dx.data, a.y_strides = x_strides(), a.bias = nullptr;
    check(rtl::masked_depthwise_grad_input(c.type, a, nullptr), c.name);
    a.x = x.data, a.x_strides = x_strides(), a.dy = dy.data, a.dy_strides = y_strides(), a.y = dw.data;
    check(rtl::masked_depthwise_grad_weight(c.type, a, nullptr), c.name);
  }

  void run(const std::string& family) {
    const auto wants = [&](const char* name) { return family.empty() || std::string(name).rfind(family, 0) == 0; };
    if (wants("depthwise_forward")) {
      y = Buffer(c.type, extent(y_strides(), y_rows, outputs, out_h, out_w));
      rtl::DepthwiseArgs a = args;
      a.x = x.data, a.x_strides = x_strides(), a.y = y.data, a.y_strides = y_strides();
      a.bias = c.bias && !c.transposed ? bias.data : nullptr;
      check(rtl::masked_depthwise(c.type, a, nullptr), c.name);
      std::vector<Sum> sums(size_t(y_rows * outputs * out_h * out_w));
      const auto slot = [&](int64_t r, int64_t o, int64_t h, int64_t w) { return size_t(((r * outputs + o) * out_h + h) * out_w + w); };
      products([&](int64_t r, int64_t o, int64_t oh, int64_t ow, int64_t ih, int64_t iw, int64_t tap) {
        const int64_t g = routing.group[size_t(r)];
        if (masks.kept(g, o, tap)) sums[slot(y_sample(r), o, oh, ow)].add(x_at(r, o, ih, iw) * w(g, o, tap));
      });
      if (!c.transposed)
        each(rows, outputs, out_h, out_w, [&](int64_t r, int64_t o, int64_t h, int64_t w) {
          add_bias(sums[slot(y_sample(r), o, h, w)], r, o, outputs);
        });
      each(y_rows, outputs, out_h, out_w, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
        compare("y", c.name, y, at(y_strides(), n, o, h, w), sums[slot(n, o, h, w)]);
      });
    }
    if (wants("depthwise_grad_input")) {
      dx = Buffer(c.type, extent(x_strides(), x_rows, c.channels, c.in_h, c.in_w));
      rtl::DepthwiseArgs a = args;
      a.x = dy.data, a.x_strides = y_strides(), a.y = dx.data, a.y_strides = x_strides();
      a.bias = c.bias && c.transposed ? bias.data : nullptr;
      check(rtl::masked_depthwise_grad_input(c.type, a, nullptr), c.name);
      std::vector<Sum> sums(size_t(x_rows * c.channels * c.in_h * c.in_w));
      const auto slot = [&](int64_t n, int64_t ch, int64_t h, int64_t w) { return size_t(((n * c.channels + ch) * c.in_h + h) * c.in_w + w); };
      products([&](int64_t r, int64_t o, int64_t oh, int64_t ow, int64_t ih, int64_t iw, int64_t tap) {
        const int64_t g = routing.group[size_t(r)];
        if (masks.kept(g, o, tap))
          sums[slot(x_sample(r), o / c.multiplier, ih, iw)].add(dy_at(r, o, oh, ow) * w(g, o, tap));
      });
      if (c.transposed)
        each(rows, c.channels, c.in_h, c.in_w, [&](int64_t r, int64_t ch, int64_t h, int64_t w) {
          add_bias(sums[slot(x_sample(r), ch, h, w)], r, ch, c.channels);
        });
      each(x_rows, c.channels, c.in_h, c.in_w, [&](int64_t n, int64_t ch, int64_t h, int64_t w) {
        compare("dx", c.name, dx, at(x_strides(), n, ch, h, w), sums[slot(n, ch, h, w)]);
      });
    }
    if (wants("depthwise_grad_weight")) {
      const int64_t copies = c.untied ? c.masks : 1;
      dw = Buffer(c.type, copies * outputs * taps);
      db = Buffer(c.type, copies * outputs);
      rtl::DepthwiseArgs a = args;
      a.x = x.data, a.x_strides = x_strides(), a.dy = dy.data, a.dy_strides = y_strides(), a.y = dw.data;
      a.db = c.bias ? db.data : nullptr;
      check(rtl::masked_depthwise_grad_weight(c.type, a, nullptr), c.name);
      std::vector<Sum> sums(size_t(copies * outputs * taps)), bias_sums(size_t(copies * outputs));
      products([&](int64_t r, int64_t o, int64_t oh, int64_t ow, int64_t ih, int64_t iw, int64_t tap) {
        const int64_t g = routing.group[size_t(r)], copy = c.untied ? g - 1 : 0;
        if (masks.kept(g, o, tap)) sums[size_t((copy * outputs + o) * taps + tap)].add(dy_at(r, o, oh, ow) * x_at(r, o, ih, iw));
      });
      each(rows, outputs, out_h, out_w, [&](int64_t r, int64_t o, int64_t h, int64_t w) {
        bias_sums[size_t((c.untied ? routing.group[size_t(r)] - 1 : 0) * outputs + o)].add(dy_at(r, o, h, w));
      });
      for (size_t i = 0; i < sums.size(); i++) compare("dw", c.name, dw, int64_t(i), sums[i]);
      if (c.bias)
        for (size_t i = 0; i < bias_sums.size(); i++) compare("db", c.name, db, int64_t(i), bias_sums[i]);
      if (c.bias && c.transposed) check_bias_alone(a, copies);
    }
  }
  // A transposed convolution's db is of the tensor on x's side: a call that wants nothing else.
  void check_bias_alone(rtl::DepthwiseArgs a, int64_t copies) {
    db = Buffer(c.type, copies * c.channels);
    a.x = nullptr, a.dy = x.data, a.dy_strides = x_strides(), a.y = nullptr, a.db = db.data;
    a.multiplier = 1, a.out_h = c.in_h, a.out_w = c.in_w, a.transposed = false;
    check(rtl::masked_depthwise_grad_weight(c.type, a, nullptr), c.name);
    std::vector<Sum> sums(size_t(copies * c.channels));
    each(rows, c.channels, c.in_h, c.in_w, [&](int64_t r, int64_t ch, int64_t h, int64_t w) {
      sums[size_t((c.untied ? routing.group[size_t(r)] - 1 : 0) * c.channels + ch)].add(x.get(at(x_strides(), x_sample(r), ch, h, w)));
    });
    for (size_t i = 0; i < sums.size(); i++) compare("db alone", c.name, db, int64_t(i), sums[i]);
  }
};

// ---- bits

bool same_bits(const Buffer& a, int64_t a_first, const Buffer& b, int64_t b_first, int64_t count) {
  const int width = Buffer::width(a.type);
  return std::memcmp(a.data + a_first * width, b.data + b_first * width, size_t(count) * width) == 0;
}

void demand(bool truth, const char* what, const std::string& name) {
  if (!truth) std::fprintf(stderr, "MISMATCH %s: %s\n", name.c_str(), what), std::exit(4);
}

int invariance(uint64_t seed) {
  int checks = 0;
  for (const LinearCase& whole : invariance_cases()) {
    simt::options = {};
    LinearRun run(whole, seed);
    run.forward(), run.grad_input(), run.grad_weight();
    run.check_forward(), run.check_grad_input(), run.check_grad_weight();
    {
      simt::options = {simt::Order::kSkew, simt::Copies::kEager, seed + 1};
      LinearRun again(whole, seed);
      again.forward(), again.grad_input(), again.grad_weight();
      demand(same_bits(run.y, 0, again.y, 0, run.vectors * whole.out), "y depends on the schedule", whole.name);
      demand(same_bits(run.dx, 0, again.dx, 0, run.x_vectors * whole.in), "dx depends on the schedule", whole.name);
      demand(same_bits(run.dw, 0, again.dw, 0, whole.out * whole.in), "dw depends on the schedule", whole.name);
      simt::options = {};
    }
    // Each group by itself: the others have vanished, and it stands at the beginning.
    int64_t first = 0;
    for (size_t g = 0; g < whole.counts.size(); first += whole.counts[g], g++) {
      const int64_t count = whole.counts[g];
      if (count == 0) continue;
      LinearCase alone = whole;
      std::fill(alone.counts.begin(), alone.counts.end(), 0);
      alone.counts[g] = count;
      LinearRun single(alone, seed);
      std::memcpy(single.weight.data, run.weight.data, run.weight.bytes);
      std::memcpy(single.bias.data, run.bias.data, run.bias.bytes);
      const int width = Buffer::width(whole.type);
      std::memcpy(single.x.data, run.x.data + first * whole.in * width, size_t(count * whole.in * width));
      std::memcpy(single.dy.data, run.dy.data + first * whole.out * width, size_t(count * whole.out * width));
      single.forward(), single.grad_input(), single.grad_weight();
      demand(same_bits(run.y, first * whole.out, single.y, 0, count * whole.out), "y depends on other groups", whole.name);
      demand(same_bits(run.dx, first * whole.in, single.dx, 0, count * whole.in), "dx depends on other groups", whole.name);
      if (whole.untied) {
        const int64_t at = (int64_t(g) - 1) * whole.out * whole.in;
        demand(same_bits(run.dw, at, single.dw, at, whole.out * whole.in), "dw depends on other groups", whole.name);
      }
      checks++;
    }
  }
  std::printf("OK %d groups alone and in company\n", checks);
  return 0;
}

// Masks of more than 2³¹ words, of which the last few are looked at.
void far_summary() {
  rtl::Route route;
  route.masks = 3, route.mask_rows = 1 << 16, route.words_per_row = 1 << 14;
  const int64_t words = route.masks * route.mask_rows * route.words_per_row;
  Buffer memory(Type::kF32, words);
  reinterpret_cast<int32_t*>(memory.data)[words - 1] = 1;
  route.words = reinterpret_cast<const int32_t*>(memory.data);
  std::vector<uint32_t> summary(size_t(rtl::tile_summary_words(route.masks, route.mask_rows, route.words_per_row)));
  simt::options.last_blocks = 2;
  const size_t made = size_t(simt::options.last_blocks * rtl::kSummaryThreads / 32);
  std::fill(summary.end() - int64_t(made), summary.end(), 0xDEADBEEF);
  check(rtl::tile_summary(route, summary.data(), nullptr), "far summary");
  simt::options.last_blocks = 0;
  for (size_t i = 1; i <= made; i++)
    demand(summary[summary.size() - i] == (i == 1 ? 0x80000000u : 0u), "the last tiles are not what they should be", "far summary");
}

// Offsets and orders that no Route holds: nothing may be read or written out of bounds. The results mean nothing.
int garbage(uint64_t seed) {
  Random random(seed);
  int runs = 0;
  const auto spoil = [&](Routing& routing) {
    const int64_t rows = routing.route.rows;
    for (int64_t& offset : routing.offsets)
      offset = random.chance(.2) ? int64_t(random.bits()) : random.below(2 * rows + 3) - rows / 2 - 1;
    for (int64_t& entry : routing.order)
      if (random.chance(.3)) entry = random.chance(.5) ? int64_t(random.bits()) : random.below(3 * rows + 1) - rows;
  };
  for (int round = 0; round < 2; round++) {
    for (const LinearCase& c : linear_cases("quick")) {
      LinearRun run(c, seed + uint64_t(round));
      spoil(run.routing);
      run.forward(), run.grad_input(), run.grad_weight(), runs++;
    }
    for (const DepthwiseCase& c : depthwise_cases("quick")) {
      DepthwiseRun run(c, seed + uint64_t(round));
      spoil(run.routing);
      run.run_unchecked(), runs++;
    }
  }
  std::printf("OK %d runs\n", runs);
  return 0;
}

}  // namespace

int main(int count, char** values) {
  std::string kernel, size = "quick";
  uint64_t seed = 0;
  for (const KernelInfo& info : all_kernels()) kernel_names[info.kernel] = info.name;
  simt::before_launch = on_launch;
  bool bits = false, spoiled = false;
  for (int i = 1; i < count; i++) {
    const std::string name = values[i];
    if (name == "--list") {
      for (const KernelInfo& info : all_kernels()) std::printf("%s %d %d\n", info.name.c_str(), info.threads, info.shared);
      return 0;
    }
    if (name == "--invariance" || name == "--garbage") {
      (name == "--garbage" ? spoiled : bits) = true;
      continue;
    }
    const std::string value = i + 1 < count ? values[++i] : "";
    if (name == "--kernel") kernel = value;
    else if (name == "--size") size = value;
    else if (name == "--order") simt::options.order = value == "skew" ? simt::Order::kSkew : simt::Order::kForward;
    else if (name == "--copies") simt::options.copies = value == "eager" ? simt::Copies::kEager : simt::Copies::kLazy;
    else if (name == "--seed") seed = std::strtoull(value.c_str(), nullptr, 10);
    else if (name == "--plant") plant_number = std::atoi(value.c_str());
    else return std::fprintf(stderr, "unknown option %s\n", name.c_str()), 2;
  }
  simt::options.seed = seed;
  planted_family = kernel;
  if (bits) return invariance(seed);
  if (spoiled) return garbage(seed);

  const auto wants = [&](const char* family) { return kernel.empty() || std::string(family).rfind(kernel, 0) == 0; };
  int cases = 0;
  for (const LinearCase& c : linear_cases(size)) {
    LinearRun run(c, seed + 1);
    cases++;
    if (wants("small_forward") || wants("gemm_forward") || kernel == "tile_summary") run.forward(), run.check_forward();
    if (wants("small_grad_input") || wants("gemm_grad_input")) run.grad_input(), run.check_grad_input();
    if (wants("gemm_grad_weight") || wants("grad_bias")) run.grad_weight(), run.check_grad_weight();
  }
  if (size == "huge" && wants("tile_summary")) far_summary(), cases++;
  for (const DepthwiseCase& c : depthwise_cases(size)) {
    if (!kernel.empty() && kernel.rfind("depthwise", 0) != 0) break;
    DepthwiseRun run(c, seed + 1);
    cases++;
    run.run(kernel);
  }
  std::printf("OK %d cases, %ld launches, %ld blocks, %ld collectives, %ld barriers, %ld copies\n", cases,
              long(simt::counts.launches), long(simt::counts.blocks), long(simt::counts.collectives),
              long(simt::counts.barriers), long(simt::counts.copies));
  for (const std::string& name : kernels_run) std::printf("RAN %s\n", name.c_str());
  return 0;
}
