#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "operators.h"

namespace rtl_kernels {
namespace {

// Channels of one group of samples, as rows for the kernels: planes of more than a few vectors are taken a channel at a
// time; of smaller ones a sample's channels lie side by side in one row, and every pixel has its channel's coefficients.
template <class T>
class Channels {
 public:
  Channels(int64_t channels, int64_t pixels) : channels_(channels), pixels_(pixels), k_(kernels<T>()) {
    columns_ = side_by_side(pixels);
    each_ = columns_ ? std::max<int64_t>(1, 256 / std::max<int64_t>(1, pixels)) : 1;
  }

  static bool side_by_side(int64_t pixels) { return pixels <= 4 * kernels<T>().lanes; }

  // body(first channel, end, Norm of their rows) for every piece of the channels; pieces do not depend on the threads.
  template <class Body>
  void pieces(const Parallel& parallel, int64_t start, int64_t stop, const Body& body) const {
    parallel((channels_ + each_ - 1) / each_, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t c = piece * each_, last = std::min(channels_, c + each_);
        Norm<T> m{};
        m.row = channels_ * pixels_;
        m.rows = stop - start;
        m.width = (last - c) * pixels_;
        m.columns = columns_;
        body(c, last, start * m.row + c * pixels_, m);
      }
    });
  }

  int64_t sums() const { return columns_ ? each_ * pixels_ : 1; }

  // Sums of channel c, the `at`-th of its piece.
  double sum(const double* sums, int64_t at) const {
    if (!columns_) return *sums;
    double total = 0;
    for (int64_t p = 0; p < pixels_; ++p) total += sums[at * pixels_ + p];
    return total;
  }

  void spread(T value, int64_t at, T* to) const {
    for (int64_t p = 0; p < (columns_ ? pixels_ : 1); ++p) to[(columns_ ? at * pixels_ : 0) + p] = value;
  }

 private:
  const int64_t channels_, pixels_;
  const Kernels<T>& k_;
  bool columns_;
  int64_t each_;
};

}  // namespace

template <class T>
void batch_norm(const Batch& batch, const BatchNorm<T>& call, const Parallel& parallel) {
  const Kernels<T>& k = kernels<T>();
  const Channels<T> channels(call.channels, call.pixels);
  for (int64_t g = 0; g < batch.masks; ++g) {
    const int64_t start = batch.offsets[g + 1], stop = batch.offsets[g + 2];
    if (start == stop) continue;
    const double count = double(stop - start) * call.pixels;
    const int64_t own = call.affine_stride * g;
    channels.pieces(parallel, start, stop, [&](int64_t c, int64_t last, int64_t at, Norm<T> m) {
      std::vector<double> sums(channels.sums());
      std::vector<T> scale(channels.sums()), shift(channels.sums());
      std::vector<double> mean(last - c);
      m.x = call.x + at;
      m.first = sums.data();
      k.norm_sum(m);
      for (int64_t i = c; i < last; ++i) {
        mean[i - c] = channels.sum(sums.data(), i - c) / count;
        channels.spread(T(mean[i - c]), i - c, shift.data());
      }
      std::fill(sums.begin(), sums.end(), 0.0);
      m.a = shift.data();
      k.norm_squares(m);
      for (int64_t i = c; i < last; ++i) {
        // About the rounded mean; what that adds is taken off.
        const double off = mean[i - c] - double(T(mean[i - c]));
        const double squares = channels.sum(sums.data(), i - c) - count * off * off;
        const double inverse = 1 / std::sqrt(squares / count + call.eps);
        const double weight = call.weight ? call.weight[own + i] : 1, bias = call.bias ? call.bias[own + i] : 0;
        call.mean[g * call.channels + i] = T(mean[i - c]);
        call.variance[g * call.channels + i] = T(squares / (count - 1));
        call.inverse_std[g * call.channels + i] = T(inverse);
        channels.spread(T(inverse * weight), i - c, scale.data());
        channels.spread(T(bias - mean[i - c] * inverse * weight), i - c, shift.data());
      }
      m.a = scale.data();
      m.b = shift.data();
      m.y = call.y + at;
      k.norm_scale(m);
    });
  }
}

template <class T>
void batch_norm_fixed(const Batch& batch, const BatchNorm<T>& call, const Parallel& parallel) {
  const Kernels<T>& k = kernels<T>();
  const bool columns = Channels<T>::side_by_side(call.pixels);
  const int64_t row = call.channels * call.pixels;
  std::vector<T> scale(columns ? row : 0), shift(scale.size());
  for (int64_t g = 0; g < batch.masks; ++g) {
    const int64_t start = batch.offsets[g + 1], stop = batch.offsets[g + 2];
    if (start == stop) continue;
    const T* weight = call.weight + call.affine_stride * g;
    const T* bias = call.bias + call.affine_stride * g;
    for (int64_t i = 0; columns && i < row; ++i) scale[i] = weight[i / call.pixels], shift[i] = bias[i / call.pixels];
    parallel(stop - start, [&](int64_t begin, int64_t end) {
      Norm<T> m{};
      m.row = row;
      m.columns = columns;
      m.rows = columns ? end - begin : 1;
      m.width = columns ? row : call.pixels;
      for (int64_t at = (start + begin) * row, c = 0; at < (start + end) * row; at += m.rows * m.width) {
        m.x = call.x + at;
        m.y = call.y + at;
        m.a = columns ? scale.data() : weight + c;
        m.b = columns ? shift.data() : bias + c;
        k.norm_scale(m);
        if (++c == call.channels) c = 0;
      }
    });
  }
}

template <class T>
void batch_norm_grad(const Batch& batch, const BatchNormGrad<T>& call, const Parallel& parallel) {
  const Kernels<T>& k = kernels<T>();
  const Channels<T> channels(call.channels, call.pixels);
  for (int64_t g = 0; g < batch.masks; ++g) {
    const int64_t start = batch.offsets[g + 1], stop = batch.offsets[g + 2];
    if (start == stop) continue;
    const double count = double(stop - start) * call.pixels;
    const int64_t own = call.affine_stride * g;
    channels.pieces(parallel, start, stop, [&](int64_t c, int64_t last, int64_t at, Norm<T> m) {
      std::vector<double> first(channels.sums()), second(channels.sums());
      std::vector<T> a(channels.sums()), b(channels.sums()), shift(channels.sums());
      const T* mean = call.mean + g * call.channels;
      for (int64_t i = c; i < last; ++i) channels.spread(mean[i], i - c, a.data());
      m.x = call.x + at;
      m.dy = call.dy + at;
      m.a = a.data();
      m.first = first.data();
      m.second = second.data();
      k.norm_products(m);
      for (int64_t i = c; i < last; ++i) {
        const double sum = channels.sum(first.data(), i - c), product = channels.sum(second.data(), i - c);
        const double inverse = call.inverse_std[g * call.channels + i];
        const double weight = call.weight ? call.weight[own + i] : 1;
        if (call.dw) {
          call.dw[own + i] += T(product * inverse);
          call.db[own + i] += T(sum);
        }
        // dx = w/σ · (dy − mean(dy) − (x − μ)/σ² · mean(dy · (x − μ)))
        const double slope = -weight * inverse * inverse * inverse * product / count;
        channels.spread(T(weight * inverse), i - c, a.data());
        channels.spread(T(slope), i - c, b.data());
        channels.spread(T(-weight * inverse * sum / count - slope * mean[i]), i - c, shift.data());
      }
      m.b = b.data();
      m.c = shift.data();
      m.y = call.dx + at;
      k.norm_grad(m);
    });
  }
}

#define RTL_INSTANTIATE(T)                                                            \
  template void batch_norm(const Batch&, const BatchNorm<T>&, const Parallel&);       \
  template void batch_norm_fixed(const Batch&, const BatchNorm<T>&, const Parallel&); \
  template void batch_norm_grad(const Batch&, const BatchNormGrad<T>&, const Parallel&);
RTL_INSTANTIATE(float)
RTL_INSTANTIATE(double)

}  // namespace rtl_kernels
