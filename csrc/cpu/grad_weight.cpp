#include <memory>

#include "flat.h"
#include "grad_weight.h"
#include "pack.h"
#include "structure.h"

namespace rtl_kernels {
namespace {

template <class T>
class Gradient {
 public:
  Gradient(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
           const Parallel& parallel)
      : plan_(plan), batch_(batch), masks_(masks), call_(call), parallel_(parallel), k_(kernels<T>()) {
    in_ = plan.in[0] * plan.in[1];
    out_ = plan.out[0] * plan.out[1];
    if (Reads::suit(plan, k_, 16)) reads_ = std::make_unique<Reads>(plan, k_.lanes);
  }

  // Masks one after another, and a mask's samples piece by piece, so that sums do not depend on the threads: these
  // divide the rows of the weight among them.
  void run() {
    for (int64_t g = 0; g <= batch_.masks; ++g) {
      const int64_t start = batch_.offsets[g] * batch_.inner, stop = batch_.offsets[g + 1] * batch_.inner;
      if (stop == start) continue;
      words_ = g ? masks_.words + (g - 1) * masks_.mask_words : nullptr;
      dw_ = call_.dw + std::max<int64_t>(0, g - 1) * call_.weight_stride;
      if (reads_) {
        flat(start, stop);
        continue;
      }
      structure_ = structure_of(plan_, words_, masks_.row_words, Kind::kBlocks);
      segment(start, stop);
    }
  }

 private:
  const T* input(int64_t row) const {
    const int64_t r = row / batch_.inner, rest = row % batch_.inner;
    const int64_t sample = batch_.order ? batch_.order[r] : r % call_.input_samples;
    return call_.input + (sample * batch_.inner + rest) * plan_.groups * plan_.channels * in_;
  }

  const T* output(int64_t row) const {
    const int64_t r = row / batch_.inner, rest = row % batch_.inner;
    const int64_t sample = batch_.order ? batch_.order[r] : r % call_.output_samples;
    return call_.output + (sample * batch_.inner + rest) * plan_.groups * plan_.rows * out_;
  }

  void flat(int64_t start, int64_t stop) {
    flat_.keep(plan_, *reads_, words_, masks_.row_words, nullptr, nullptr);
    // So many that a channel's stay in L1 from tap to tap, while the lanes are seldom added up.
    constexpr int64_t samples = 128;
    parallel_(plan_.groups, [&](int64_t begin, int64_t end) {
      std::vector<const T*> x(samples), dy(samples);
      for (int64_t i = start; i < stop; i += samples) {
        const int64_t here = std::min(samples, stop - i);
        for (int64_t s = 0; s < here; ++s) {
          x[s] = input(i + s);
          dy[s] = output(i + s);
        }
        for (int64_t g = begin; g < end; ++g)
          k_.flat_dots({x.data(), dy.data(), here, g * in_, in_, flat_.taps.data() + flat_.first[g],
                        flat_.first[g + 1] - flat_.first[g], dw_ + g * plan_.group_weights()});
      }
    });
  }

  void segment(int64_t start, int64_t stop) {
    const int64_t L = k_.lanes, count = stop - start;
    const int64_t height = plan_.places[0];
    const int64_t plane = plan_.plane_width() * (height + plan_.reach[0]);
    // Dot products of 4 KiB at least: the lanes of each have to be added up.
    const int64_t rows = std::max(lane_rows(plan_, L, sizeof(T)), kRun / int64_t(sizeof(T)) / std::max<int64_t>(1, plan_.out[1] * L));
    int64_t done = 0;
    while (count > done && (count - done >= L || worth_lanes(plan_, count - done, L))) {
      const int64_t here = std::min(L, count - done);
      strips(start + done, here, rows, L, true);
      done += here;
    }
    if (done < count) {
      const int64_t each = std::max<int64_t>(1, std::min(count - done, 768 / std::max<int64_t>(1, plane)));
      const int64_t rows = std::max<int64_t>(plan_.reach[0] + 1, std::min(768 / plan_.plane_width() + 1,
                                                                          strip_rows(plan_, 1, sizeof(T), 1 << 19, 1)));
      for (int64_t i = done; i < count; i += each)
        strips(start + i, std::min(each, count - i), each > 1 ? height : rows, each, false);
    }
  }

  void strips(int64_t start, int64_t count, int64_t rows, int64_t samples, bool lanes) {
    const int64_t height = plan_.places[0], pieces = std::max<int64_t>(1, (height + rows - 1) / rows);
    const int64_t each = std::max<int64_t>(1, (height + pieces - 1) / pieces);
    for (int64_t h = 0; h < height; h += each)
      piece(start, count, {h, each, samples, lanes});
  }

  void piece(int64_t start, int64_t count, const Strip& strip) {
    const int64_t together = groups_together(plan_, sizeof(T));
    for (int64_t g = 0; g < plan_.groups; g += together)
      groups(start, count, strip, g, std::min(together, plan_.groups - g));
  }

  void groups(int64_t start, int64_t count, const Strip& strip, int64_t g0, int64_t groups) {
    const Phase& phase = plan_.phases[0];
    const int64_t L = k_.lanes, width = plan_.out[1], unit = strip.unit();
    const int64_t height = std::min(strip.height, plan_.places[0] - strip.first);
    if (width == 0) return;
    auto& packer = packers_[groups == groups_together(plan_, sizeof(T)) ? 0 : 1];
    if (!packer) packer = std::make_unique<Packer<T>>(plan_, groups * plan_.channels);
    if (!plan_.pointwise() && (!ready_ || !strip.like(strip_))) {
      ready_ = true;
      strip_ = strip;
      table_ = offsets_of(plan_, phase, strip);
    }
    // dy lies as the places do: whole in lanes; among zeros, one plane's width apart, in pixels.
    const int64_t line = plan_.plane_width() * unit;
    int64_t dy_row, dy_line;
    if (strip.lanes) {
      dy_line = width * unit;
      dy_row = height * dy_line;
    } else {
      dy_line = line;
      const int64_t columns = (count - 1) * strip.sample_plane(plan_) + (height - 1) * line + width;
      dy_row = (columns + L - 1) / L * L;
    }
    x_rows_.resize(count);
    for (int64_t s = 0; s < count; ++s) x_rows_[s] = input(start + s) + g0 * plan_.channels * in_;
    T* dy = dy_.template take<T>(groups * plan_.rows * dy_row);
    const T* x = nullptr;
    parallel_(2, [&](int64_t begin, int64_t end) {
      if (begin == 0) x = packer->pack(strip, x_rows_.data(), count);
      if (end == 2) pack_dy(start, count, strip, height, g0, groups, dy, dy_row, dy_line);
    });
    const int64_t blocks = (plan_.rows + structure_->block_rows - 1) / structure_->block_rows;
    parallel_(groups * blocks, [&](int64_t begin, int64_t end) {
      // Of each row of dy 4 KiB at a time: four rows and the inputs they meet stay in L1.
      const int64_t run = strip.lanes ? dy_line : dy_row;
      const bool joined = strip.lanes && dy_line == line;
      const int64_t total = strip.lanes ? (joined ? height * dy_line : dy_line) : dy_row;
      const int64_t lines = strip.lanes && !joined ? height : 1;
      const int64_t most = std::max<int64_t>(L, kRun / int64_t(sizeof(T)));
      const int64_t lines_each = std::max<int64_t>(1, most / std::max<int64_t>(1, run));
      for (int64_t l = 0; l < lines; l += lines_each) {
        for (int64_t c = 0; c < total; c += most) {
          for (int64_t at = begin; at < end;) {
            const int64_t g = at / blocks, first = at % blocks, last = std::min(blocks, first + end - at);
            Correlate<T> m{};
            m.kept = structure_->at(plan_, g0 + g, 0);
            m.x = x + g * plan_.channels * strip.channel(plan_) + l * line + c;
            m.x_stride = strip.channel(plan_);
            m.table = plan_.pointwise() ? nullptr : table_.data();
            m.dy = dy + g * plan_.rows * dy_row + l * dy_line + c;
            m.dy_row = dy_row;
            m.first_block = first;
            m.end_block = last;
            m.g = dw_ + (g0 + g) * plan_.group_weights();
            m.g_row = plan_.row_stride();
            m.columns = std::min(most, total - c);
            m.segments = std::min(lines_each, lines - l);
            m.x_segment = line;
            m.dy_segment = dy_line;
            k_.correlate(m);
            at += last - first;
          }
        }
      }
    });
  }

  void pack_dy(int64_t start, int64_t count, const Strip& strip, int64_t height, int64_t g0, int64_t groups, T* dy,
               int64_t dy_row, int64_t dy_line) {
    const int64_t rows = groups * plan_.rows, width = plan_.out[1], area = height * width;
    if (strip.lanes) {
      const bool whole = area == out_;
      const int64_t run = whole ? rows * area : area;
      T* from[64];
      for (int64_t lane = 0; lane < strip.samples; lane += k_.lanes) {
        const int64_t here = std::max<int64_t>(0, std::min<int64_t>(k_.lanes, count - lane));
        for (int64_t r = 0; r < (whole ? 1 : rows); ++r) {
          for (int64_t s = 0; s < here; ++s)
            from[s] = const_cast<T*>(output(start + lane + s)) + (g0 * plan_.rows + r) * out_ + strip.first * width;
          k_.to_lanes({from, here, run, dy + r * dy_row + lane, nullptr, strip.samples});
        }
      }
      return;
    }
    std::memset(dy, 0, rows * dy_row * sizeof(T));
    for (int64_t s = 0; s < count; ++s)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t h = 0; h < height; ++h)
          std::memcpy(dy + r * dy_row + s * strip.sample_plane(plan_) + h * dy_line,
                      output(start + s) + (g0 * plan_.rows + r) * out_ + (strip.first + h) * width, width * sizeof(T));
  }

  static constexpr int64_t kRun = 4096;  // bytes

  const Plan& plan_;
  const Batch& batch_;
  const Masks& masks_;
  const GradWeight<T>& call_;
  const Parallel& parallel_;
  const Kernels<T>& k_;
  int64_t in_, out_;
  const uint32_t* words_ = nullptr;
  T* dw_ = nullptr;
  std::shared_ptr<const Structure> structure_;
  std::unique_ptr<Reads> reads_;  // of a layer that is taken flat
  FlatTaps<T> flat_;
  std::unique_ptr<Packer<T>> packers_[2];
  Scratch dy_;
  bool ready_ = false;
  Strip strip_;
  std::vector<Offset> table_;
  std::vector<const T*> x_rows_;
};

// A pointwise layer's planes of up to four pixels, turned into rows of channels: over so few columns a dot product of
// every kept weight is little else than adding up its lanes, where a linear layer has outer products.
template <class T>
void pixels_as_rows(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
                    const Parallel& parallel) {
  const Kernels<T>& k = kernels<T>();
  const int64_t pixels = plan.in[1], inputs = plan.groups * plan.channels, outputs = plan.groups * plan.rows;
  Scratch x, dy;
  const auto turned = [&](const T* from, int64_t samples, int64_t width, T* to) {
    parallel(samples * batch.inner, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        k.copy({from + s * width * pixels, 1, pixels, to + s * width * pixels, width, 1, pixels, width});
    });
    return to;
  };
  GradWeight<T> rows = call;
  const int64_t x_rows = call.input_samples * batch.inner * pixels, dy_rows = call.output_samples * batch.inner * pixels;
  rows.input = turned(call.input, call.input_samples, inputs, x.take<T>(x_rows * inputs));
  rows.output = turned(call.output, call.output_samples, outputs, dy.take<T>(dy_rows * outputs));
  Batch each = batch;
  each.inner *= pixels;
  const Geometry linear = {{1, 1}, {1, 1}, {0, 0}, {1, 1}, plan.groups};
  grad_weight_linear<T>(make_plan(false, plan.groups, plan.rows, plan.channels, linear, {1, 1}, {1, 1}), each, masks, rows,
                        parallel);
}

// Sum of a run: 16 partial sums added in a fixed order, as vectors would.
template <class T>
double sum(const T* from, int64_t count) {
  T part[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int l = 0; l < 16; ++l) part[l] += from[i + l];
  double total = 0;
  for (; i < count; ++i) total += from[i];
  for (int l = 0; l < 16; ++l) total += part[l];
  return total;
}

}  // namespace

template <class T>
void grad_weight(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
                 const Parallel& parallel) {
  if (plan.linear())
    grad_weight_linear<T>(plan, batch, masks, call, parallel);
  else if (plan.pointwise() && plan.in[1] <= 4)
    pixels_as_rows(plan, batch, masks, call, parallel);
  else
    Gradient<T>(plan, batch, masks, call, parallel).run();
}

template <class T>
void grad_bias(const Batch& batch, const T* dy, int64_t channels, int64_t pixels, T* db, int64_t bias_stride) {
  std::vector<double> total(channels);
  for (int64_t g = 0; g <= batch.masks; ++g) {
    if (bias_stride || g == 0) std::fill(total.begin(), total.end(), 0.0);
    for (int64_t r = batch.offsets[g]; r < batch.offsets[g + 1]; ++r) {
      const T* row = dy + (batch.order ? batch.order[r] : r) * batch.inner * channels * pixels;
      if (pixels == 1) {
        for (int64_t i = 0; i < batch.inner; ++i)
          for (int64_t c = 0; c < channels; ++c) total[c] += row[i * channels + c];
      } else {
        for (int64_t c = 0; c < channels; ++c) total[c] += sum(row + c * pixels, pixels);
      }
    }
    if (bias_stride ? g > 0 : g == batch.masks)
      for (int64_t c = 0; c < channels; ++c) db[std::max<int64_t>(0, g - 1) * bias_stride + c] = T(total[c]);
  }
}

#define RTL_INSTANTIATE(T)                                                                                       \
  template void grad_weight(const Plan&, const Batch&, const Masks&, const GradWeight<T>&, const Parallel&); \
  template void grad_bias(const Batch&, const T*, int64_t, int64_t, T*, int64_t);
RTL_INSTANTIATE(float)
RTL_INSTANTIATE(double)

}  // namespace rtl_kernels
