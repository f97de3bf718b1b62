#include <array>
#include <memory>

#include "flat.h"
#include "operators.h"
#include "pack.h"
#include "program.h"
#include "structure.h"

namespace rtl_kernels {
namespace {

struct Segment {
  int64_t mask, start, stop;  // rows of the batch, times `inner`
  bool few;  // takes the path for few samples
  std::shared_ptr<const Structure> structure;
};

enum class Path { kInPlace, kStrip, kFilter, kFlat, kFew };

// A piece of work that writes outputs no other piece does, so that threads can take them in any order.
struct Unit {
  int64_t segment, start, count;
  Path path;
  Strip strip;
};

template <class T>
class Runner {
 public:
  Runner(const Plan& plan, const Batch& batch, const Masks& masks, const Forward<T>& call, const Parallel& parallel)
      : plan_(plan), batch_(batch), masks_(masks), call_(call), k_(kernels<T>()) {
    in_ = plan.in[0] * plan.in[1];
    out_ = plan.out[0] * plan.out[1];
    if (Reads::suit(plan, k_, std::min<int64_t>(64, 8 * k_.lanes))) reads_ = std::make_unique<Reads>(plan, k_.lanes);
    const int64_t row = plan.groups * plan.rows * out_ * int64_t(sizeof(T));
    large_ = row * batch.offsets[batch.masks + 1] * batch.inner >= kStream && !call.residual;
    stream_ = large_ && row % 64 == 0 && call.y_row % kLine == 0 && reinterpret_cast<uintptr_t>(call.y) % 64 == 0;
    far_ = plan.groups * plan.channels * in_ * batch.offsets[batch.masks + 1] * batch.inner * int64_t(sizeof(T)) >= kFar;
    for (int64_t g = 0; g <= batch.masks; ++g) {
      const int64_t start = batch.offsets[g] * batch.inner, stop = batch.offsets[g + 1] * batch.inner;
      if (stop == start) continue;
      segments_.push_back({g - 1, start, stop, false, nullptr});
      segments_.back().few = few(segments_.back());
    }
    if (!reads_ && !depthwise())
      each_mask(parallel, int64_t(segments_.size()), masks.mask_words, [this](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) compile(segments_[s]);
      });
    for (int64_t s = 0; s < int64_t(segments_.size()); ++s) divide(s);
    const auto is_few = [](const Unit& unit) { return unit.path == Path::kFew; };
    for (auto end = units_.begin(); end != units_.end();) {
      const auto begin = std::find_if(end, units_.end(), is_few);
      end = std::find_if_not(begin, units_.end(), is_few);
      std::stable_sort(begin, end, [](const Unit& a, const Unit& b) { return a.strip.first < b.strip.first; });
    }
  }

  void run(const Parallel& parallel) {
    if (weight_bound()) {
      // Those of few samples have their own way, the others go together.
      const auto strips = std::stable_partition(units_.begin(), units_.end(),
                                                [](const Unit& unit) { return unit.path == Path::kFew; });
      parallel(strips - units_.begin(), [this](int64_t begin, int64_t end) { Worker(*this).work(begin, end); });
      units_.erase(units_.begin(), strips);
      run_by_rows(parallel);
      return;
    }
    parallel(int64_t(units_.size()), [this](int64_t begin, int64_t end) { Worker(*this).work(begin, end); });
  }

 private:
  bool depthwise() const {
    // Rows of at least three quarters of a vector; narrower planes go through the lanes of several samples.
    return plan_.rows == 1 && plan_.channels == 1 && plan_.phases.size() == 1 && plan_.out[1] * 4 >= k_.lanes * 3;
  }

  bool in_place() const { return plan_.pointwise() && in_ >= 4 * k_.lanes && in_ % k_.lanes == 0; }

  // A group of a few samples fills part of a vector, while the weights it reads are those of a full one: then every weight
  // is taken, in whole vectors of inputs, with the mask's bits applied. Worth it up to 4 samples; up to 8 where the mask
  // keeps about half or more; up to 24 where besides the weights come from beyond L2, which buckets wait for, and the bits
  // are applied by the load itself.
  bool few(const Segment& segment) const {
    const int64_t count = segment.stop - segment.start;
    if (!plan_.linear() || plan_.scatter || count > 24) return false;
    if (count <= 4 || segment.mask < 0) return count <= 8;
    const int64_t weights = plan_.groups * plan_.group_weights();
    if (count > 8 && (k_.block_rows == 2 || weights * int64_t(sizeof(T)) < (int64_t(4) << 20))) return false;
    return kept(segment) >= 0.45;
  }

  // The share of a linear layer's weights that a mask keeps.
  double kept(const Segment& segment) const {
    const int64_t leads = plan_.groups * (plan_.scatter ? plan_.channels : plan_.rows);
    return density(masks_.words + segment.mask * masks_.mask_words, leads * masks_.row_words,
                   plan_.scatter ? plan_.rows : plan_.channels);
  }

  // Rows are taken one by one where little is kept and samples or inputs are few: entering buckets is then most of the
  // work. With more of both the inputs lie beyond L1, which blocks of rows load less often. Blocks of two rows have but
  // three buckets.
  bool lists(const Segment& segment) const {
    const int64_t count = segment.stop - segment.start;
    const bool small = k_.block_rows == 2 ? count <= 2 * k_.lanes : count <= 64 || plan_.channels <= 256;
    return plan_.linear() && small && segment.mask >= 0 && plan_.channels <= 65536 &&
           plan_.group_weights() <= INT64_C(0xffffffff) && kept(segment) <= 0.18;
  }

  void compile(Segment& segment) const {
    if (segment.few) return;
    const int64_t vectors = plan_.linear() ? (segment.stop - segment.start + k_.lanes - 1) / k_.lanes : kManyVectors;
    segment.structure = structure_of(plan_, words(segment), masks_.row_words,
                                     lists(segment) ? Kind::kLists : Kind::kBuckets, vectors);
  }

  // What one group of samples is divided into depends on its size and the shapes alone.
  void divide(int64_t s) {
    const int64_t L = k_.lanes;
    const int64_t start = segments_[s].start, count = segments_[s].stop - start;
    const int64_t height = plan_.places[0], width = plan_.places[1];
    const int64_t plane = plan_.plane_width() * (height + plan_.reach[0]);
    if (reads_) {
      // Up to eight vectors at once, of several samples where a plane has fewer.
      const int64_t each = in_ > 4 * L ? 1 : in_ > 2 * L ? 2 : in_ > L ? 4 : 8;
      for (int64_t i = 0; i < count; i += each)
        units_.push_back({s, start + i, std::min(each, count - i), Path::kFlat, {}});
      return;
    }
    if (depthwise()) {
      const int64_t rows = std::max<int64_t>(8, 8192 / (plan_.plane_width() * plan_.planes()));
      for (int64_t i = 0; i < count; ++i)
        for (int64_t h = 0; h < height; h += rows)
          units_.push_back({s, start + i, 1, Path::kFilter, {h, std::min(rows, height - h), 1, false}});
      return;
    }
    if (in_place()) {
      for (int64_t i = 0; i < count; ++i) units_.push_back({s, start + i, 1, Path::kInPlace, {}});
      return;
    }
    if (segments_[s].few) {
      // Rows in pieces of about 128 KiB of weights, that stay in L2 while one mask after the other takes them.
      const int64_t each = std::max<int64_t>(16, (int64_t(128) << 10) / int64_t(sizeof(T)) /
                                                     std::max<int64_t>(1, plan_.channels) / 16 * 16);
      for (int64_t r = 0; r < plan_.rows; r += each)
        units_.push_back({s, start, count, Path::kFew, {r, std::min(each, plan_.rows - r), 0, true}});
      return;
    }
    if (plan_.linear()) {
      const int64_t most = segments_[s].structure->block_rows ? k_.block_columns : k_.list_columns;
      const int64_t chunks = (count + most - 1) / most;
      const int64_t each = ((count + chunks - 1) / chunks + L - 1) / L * L;
      for (int64_t i = 0; i < count; i += each) {
        const int64_t here = std::min(each, count - i);
        units_.push_back({s, start + i, here, Path::kStrip, {0, 1, (here + L - 1) / L * L, true}});
      }
      return;
    }
    if (plan_.pointwise()) {
      // Whole planes one after another: as many columns as the registers hold, of short rows if need be.
      const int64_t most = std::max<int64_t>(1, k_.block_columns / std::max<int64_t>(1, width));
      const int64_t each = (count + (count + most - 1) / most - 1) / ((count + most - 1) / most);
      for (int64_t i = 0; i < count; i += each) strips(s, start + i, std::min(each, count - i), 1, each, false);
      return;
    }
    int64_t done = 0;
    // Whole vectors of samples, several where a row of the plane alone would not fill the registers.
    const int64_t run = plan_.reach[1] == 0 ? height * width : width;
    const int64_t wide = std::max<int64_t>(1, std::min<int64_t>(4, 4 / std::max<int64_t>(1, run)));
    while (count > done && (count - done >= L || worth_lanes(plan_, count - done, L))) {
      int64_t samples = std::min(wide * L, (count - done) / L * L);
      if (samples < L) samples = L;
      const int64_t rows = lane_rows(plan_, samples, sizeof(T));
      const int64_t here = std::min(samples, count - done);
      strips(s, start + done, here, rows, samples, true);
      done += here;
    }
    if (done < count) {
      const int64_t each = std::max<int64_t>(1, std::min(count - done, 768 / std::max<int64_t>(1, plane)));
      const int64_t rows = std::max<int64_t>(plan_.reach[0] + 1, strip_rows(plan_, 1, sizeof(T), 1 << 19, 1));
      for (int64_t i = done; i < count; i += each)
        strips(s, start + i, std::min(each, count - i), each > 1 ? height : rows, each, false);
    }
  }

  void strips(int64_t s, int64_t start, int64_t count, int64_t rows, int64_t samples, bool lanes) {
    const int64_t height = plan_.places[0], pieces = std::max<int64_t>(1, (height + rows - 1) / rows);
    int64_t each = std::max<int64_t>(1, (height + pieces - 1) / pieces);
    if (pieces > 1 && lanes) each = std::min(rows, (each + 1) / 2 * 2);
    for (int64_t h = 0; h < height; h += each)
      units_.push_back({s, start, count, Path::kStrip, {h, each, samples, lanes}});
  }

  // Without a division where there is nothing to divide by: these are taken for every row of every layer.
  const T* input(int64_t row) const {
    if (batch_.inner == 1 && batch_.order) return call_.x + batch_.order[row] * call_.x_sample;
    const int64_t r = row / batch_.inner, rest = row % batch_.inner;
    const int64_t sample = batch_.order ? batch_.order[r] : r % batch_.samples;
    return call_.x + sample * call_.x_sample + rest * plan_.groups * plan_.channels * in_;
  }

  T* output(int64_t row) const { return call_.y + place(row, call_.y_row); }

  const T* residual(int64_t row) const { return call_.residual + place(row, call_.residual_row); }

  int64_t place(int64_t row, int64_t stride) const {
    if (batch_.inner == 1) return (batch_.order ? batch_.order[row] : row) * stride;
    const int64_t r = row / batch_.inner, rest = row % batch_.inner;
    return (batch_.order ? batch_.order[r] : r) * stride + rest * plan_.groups * plan_.rows * out_;
  }

  const T* weight(const Segment& segment, int64_t group) const {
    return call_.weight + std::max<int64_t>(0, segment.mask) * call_.weight_stride + group * plan_.group_weights();
  }

  const uint32_t* words(const Segment& segment) const {
    return segment.mask < 0 ? nullptr : masks_.words + segment.mask * masks_.mask_words;
  }

  // What is done to the sums of rows `row`, … of a group.
  struct After {
    const T* scale;
    const T* bias;
    bool relu;

    template <class M>
    void to(M& m) const {
      m.scale = scale;
      m.bias = bias;
      m.relu = relu;
    }
  };

  After after(const Segment& segment, int64_t group, int64_t row = 0) const {
    const int64_t mask = std::max<int64_t>(0, segment.mask), at = group * plan_.rows + row;
    return {call_.scale ? call_.scale + mask * call_.scale_stride + at : nullptr,
            call_.bias ? call_.bias + mask * call_.bias_stride + at : nullptr, call_.relu && !call_.residual};
  }

  // Adds the residual to rows [row, row + rows) of all samples of a unit, each `height` pixels from `first` on, while
  // they lie in the caches.
  void add_residual(const Unit& unit, int64_t row, int64_t rows, int64_t first, int64_t height) const {
    if (!call_.residual) return;
    const bool whole = height == out_;
    for (int64_t s = 0; s < unit.count; ++s) {
      const int64_t at = row * out_ + first;
      k_.add({residual(unit.start + s) + at, out_, output(unit.start + s) + at, out_, whole ? 1 : rows,
              whole ? rows * out_ : height, call_.relu});
    }
  }

  // A wide linear layer on few samples reads more weights than inputs: then all of x is packed first, and each chunk of
  // the weight's rows passes all masks while it lies in L2. 2048 → 2048, 64 samples, 4 masks: 64 MB from L3 become 16.
  static constexpr int64_t kChunkBytes = 256 << 10;

  bool weight_bound() const {
    const int64_t weights = plan_.group_weights() * int64_t(sizeof(T));
    int64_t columns = 0;
    for (const Unit& unit : units_) {
      if (unit.path == Path::kStrip) columns += unit.strip.samples;
    }
    return columns > 0 && plan_.linear() && plan_.groups == 1 && weights > 2 * kChunkBytes &&
           columns * plan_.channels * int64_t(sizeof(T)) <= 16 * weights;
  }

  void run_by_rows(const Parallel& parallel) {
    const int64_t L = k_.lanes, channels = plan_.channels;
    std::vector<int64_t> at(units_.size() + 1, 0);
    for (size_t u = 0; u < units_.size(); ++u) at[u + 1] = at[u] + units_[u].strip.samples * channels;
    Scratch all;
    T* x = all.take<T>(at.back());
    parallel(int64_t(units_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const Unit& unit = units_[u];
        for (int64_t lane = 0; lane < unit.strip.samples; lane += L) {
          const int64_t here = std::min(L, unit.count - lane);
          T* from[64];
          for (int64_t s = 0; s < here; ++s) from[s] = const_cast<T*>(input(unit.start + lane + s));
          k_.to_lanes({from, here, channels, x + at[u] + lane, nullptr, unit.strip.samples});
        }
      }
    });
    // A tile of the weight, rows × inputs, stays in L2 while every mask passes it, and a mask's tile of x in L1.
    int64_t most = 1, tile_inputs = channels;
    for (const Segment& segment : segments_) {
      if (!segment.structure) continue;
      most = std::max(most, segment.structure->at(plan_, 0, 0).tiles);
      tile_inputs = std::min(tile_inputs, segment.structure->tile_inputs);
    }
    // Quarters at most: threads share them.
    const int64_t inputs = std::max<int64_t>(1, plan_.scatter ? channels : tile_inputs);
    const int64_t fitting = kChunkBytes / int64_t(sizeof(T)) / inputs;
    const int64_t rows = std::max<int64_t>(64, std::min((plan_.rows + 3) / 4, fitting) / 16 * 16);
    const int64_t chunks = (plan_.rows + rows - 1) / rows;
    // An odd number of cache lines, so that rows of the turned weight fall on different ones.
    const int64_t line = 64 / int64_t(sizeof(T)), pitch = ((channels + line - 1) / line | 1) * line;
    parallel(chunks, [&](int64_t begin, int64_t end) {
      Scratch turned, results;
      std::vector<const T*> ahead;
      T* y = results.take<T>(rows * at.back() / std::max<int64_t>(1, channels));
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t row = chunk * rows, here = std::min(rows, plan_.rows - row);
        T* w = plan_.scatter ? turned.take<T>(here * pitch) : nullptr;
        for (int64_t step = 0; step < most; ++step) {
          int64_t turned_mask = -2;
          for (size_t u = 0; u < units_.size(); ++u) {
            const Unit& unit = units_[u];
            const Segment& segment = segments_[unit.segment];
            Multiply<T> m{};
            m.kept = segment.structure->at(plan_, 0, 0);
            m.kept.skip_rows(row);
            const int64_t tiles = m.kept.tiles;
            m.kept.first_tile = tiles * step / most;
            m.kept.tiles = tiles * (step + 1) / most;
            m.x = x + at[u];
            m.x_stride = unit.strip.samples;
            m.w = weight(segment, 0) + row * plan_.row_stride();
            m.w_stride = plan_.channel_stride();
            m.w_row = plan_.row_stride();
            if (!call_.weight_stride) fetch_ahead(row, rows, chunk + 1 < end, step, most, int64_t(u), ahead, m);
            if (plan_.scatter) {
              // Columns of the weight, a power of two apart as often as not, would fall on the same few lines of L2.
              const int64_t mask = call_.weight_stride ? segment.mask : -1;
              if (turned_mask != mask && (step == 0 || mask >= 0)) turn(m.w, here, w, pitch);
              turned_mask = mask;
              m.w = w;
              m.w_stride = 1;
              m.w_row = pitch;
            }
            if (step + 1 == most) after(segment, 0, row).to(m);
            m.rows = here;
            m.y = y + at[u] / std::max<int64_t>(1, channels) * rows;
            m.y_row = unit.strip.samples;
            m.columns = granules(unit.count);
            k_.multiply(m);
          }
        }
        for (size_t u = 0; u < units_.size(); ++u) {
          const Unit& unit = units_[u];
          for (int64_t lane = 0; lane < unit.count; lane += L) {
            T* to[64];
            const int64_t count = std::min(L, unit.count - lane);
            for (int64_t s = 0; s < count; ++s) to[s] = output(unit.start + lane + s) + row;
            T* const from = y + at[u] / std::max<int64_t>(1, channels) * rows + lane;
            k_.from_lanes({to, count, here, from, nullptr, unit.strip.samples});
          }
          add_residual(unit, row, here, 0, 1);
        }
      }
    });
  }

  // The tile of the weight after this one, `unit`'s share of it, into L2 while this one is computed. In the kernels'
  // own order its lines would be waited for one by one.
  void fetch_ahead(int64_t row, int64_t rows, bool more, int64_t step, int64_t steps, int64_t unit,
                   std::vector<const T*>& ahead, Multiply<T>& m) const {
    const int64_t units = int64_t(units_.size()), channels = plan_.channels;
    int64_t share = unit, shares = units, first = channels * (step + 1) / steps, last = channels * (step + 2) / steps;
    if (plan_.scatter) {
      share += step * units;
      shares *= steps;
    }
    if (plan_.scatter || step + 1 == steps) {
      if (!more) return;
      row += rows;
      first = 0;
      last = plan_.scatter ? channels : channels / steps;
    }
    rows = std::min(rows, plan_.rows - row);
    const int64_t lines = plan_.scatter ? last - first : rows, length = plan_.scatter ? rows : last - first;
    const T* const weight = call_.weight + row * plan_.row_stride() + first * plan_.channel_stride();
    const int64_t stride = plan_.scatter ? plan_.channel_stride() : plan_.row_stride();
    m.ahead_lines = (length * int64_t(sizeof(T)) + 63) / 64;
    const int64_t from = lines * m.ahead_lines * share / shares, to = lines * m.ahead_lines * (share + 1) / shares;
    ahead.clear();
    for (int64_t l = from / m.ahead_lines; l * m.ahead_lines < to; ++l) ahead.push_back(weight + l * stride);
    m.ahead = ahead.data();
    m.ahead_from = from % m.ahead_lines;
    m.ahead_to = m.ahead_from + to - from;
  }

  int64_t granules(int64_t columns) const { return (columns + k_.granule - 1) / k_.granule * k_.granule; }

  // Rows [0, rows) of a scatter's weight, which lie across it, `pitch` apart.
  void turn(const T* from, int64_t rows, T* to, int64_t pitch) const {
    const int64_t L = k_.lanes, channels = plan_.channels, stride = plan_.channel_stride();
    int64_t c = 0;
    for (; c + L <= channels; c += L) {
      T* lines[64];
      for (int64_t l = 0; l < L; ++l) {
        lines[l] = const_cast<T*>(from + (c + l) * stride);
        const T* const later = lines[l] + std::min(2 * L, channels - c - L) * stride;
        for (int64_t r = 0; r < rows; r += kLine) __builtin_prefetch(later + r);
      }
      k_.to_lanes({lines, L, rows, to + c, nullptr, pitch});
    }
    for (; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r) to[r * pitch + c] = from[c * stride + r];
  }

  class Worker {
   public:
    explicit Worker(const Runner& job) : job_(job), plan_(job.plan_), k_(job.k_) {
      together_ = groups_together(plan_, sizeof(T));
    }

    void work(int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const Unit& unit = job_.units_[u];
        const Segment& segment = job_.segments_[unit.segment];
        next_ = u + 1 < end && job_.far_ ? &job_.units_[u + 1] : nullptr;
        if (unit.path == Path::kInPlace)
          in_place(unit, segment);
        else if (unit.path == Path::kFlat)
          flat(unit, segment);
        else if (unit.path == Path::kFilter)
          filter(unit, segment);
        else if (unit.path == Path::kFew)
          few(unit, segment);
        else
          strip(unit, segment);
      }
      if (job_.large_) k_.fence();
    }

   private:
    void in_place(const Unit& unit, const Segment& segment) {
      const int64_t pixels = job_.in_, channels = plan_.channels;
      // A plane stride of a multiple of 4 KiB maps a column's inputs onto the same few lines of L1: then they are copied.
      const bool copied = pixels * sizeof(T) % 4096 == 0 && channels > 8;
      const int64_t held = segment.structure->block_rows == 1 ? 2 * k_.pair * k_.lanes : k_.block_columns;
      const int64_t most = copied ? held : pixels;
      T* const copy = copied ? x_.template take<T>(channels * most) : nullptr;
      for (int64_t g = 0; g < plan_.groups; ++g) {
        const T* const x = job_.input(unit.start) + g * channels * pixels;
        Multiply<T> m{};
        m.kept = segment.structure->at(plan_, g, 0);
        m.w = job_.weight(segment, g);
        m.w_stride = plan_.channel_stride();
        m.w_row = plan_.row_stride();
        job_.after(segment, g).to(m);
        m.rows = plan_.rows;
        m.y_row = pixels;
        m.stream = job_.stream_ && m.kept.tiles == 1 && pixels % kLine == 0;
        for (int64_t c = 0; c < pixels; c += m.columns) {
          m.columns = std::min(most, pixels - c);
          if (copied) k_.copy({x + c, pixels, 1, copy, m.columns, 1, channels, m.columns});
          m.x = copied ? copy : x;
          m.x_stride = copied ? m.columns : pixels;
          m.y = job_.output(unit.start) + g * plan_.rows * pixels + c;
          m.ahead = nullptr;
          if (g + 1 == plan_.groups && c + m.columns == pixels) fetch_next(m);
          k_.multiply(m);
        }
      }
      job_.add_residual(unit, 0, plan_.groups * plan_.rows, 0, job_.out_);
    }

    void few(const Unit& unit, const Segment& segment) {
      for (int64_t g = 0; g < plan_.groups; ++g) {
        const T* x[32];
        T* y[32];
        const int64_t row = unit.strip.first;
        for (int64_t s = 0; s < unit.count; ++s) {
          x[s] = job_.input(unit.start + s) + g * plan_.channels;
          y[s] = job_.output(unit.start + s) + g * plan_.rows + row;
        }
        Few<T> m{};
        m.x = x;
        m.y = y;
        m.samples = unit.count;
        m.inputs = plan_.channels;
        m.rows = unit.strip.height;
        if (segment.mask >= 0) m.words = job_.words(segment) + (g * plan_.rows + row) * job_.masks_.row_words;
        m.words_row = job_.masks_.row_words;
        m.w = job_.weight(segment, g) + row * plan_.channels;
        m.w_row = plan_.channels;
        job_.after(segment, g, row).to(m);
        k_.few(m);
        job_.add_residual(unit, g * plan_.rows + row, unit.strip.height, 0, 1);
      }
    }

    void flat(const Unit& unit, const Segment& segment) {
      const After after = job_.after(segment, 0);
      if (last_ != unit.segment) {
        last_ = unit.segment;
        flat_.keep(plan_, *job_.reads_, job_.words(segment), job_.masks_.row_words, job_.weight(segment, 0), after.scale);
      }
      const T* x[8];
      T* y[8];
      for (int64_t s = 0; s < unit.count; ++s) {
        x[s] = job_.input(unit.start + s);
        y[s] = job_.output(unit.start + s);
      }
      k_.flat({x, y, unit.count, plan_.groups, job_.out_, flat_.taps.data(), flat_.first.data(), after.bias, after.relu,
               job_.stream_ && job_.out_ % kLine == 0});
      job_.add_residual(unit, 0, plan_.groups, 0, job_.out_);
    }

    void filter(const Unit& unit, const Segment& segment) {
      prepare(unit.strip);
      if (last_ != unit.segment) {
        // The kept taps of every channel, once for all samples of the mask.
        last_ = unit.segment;
        taps_.assign(1, 0);
        values_.clear();
        at_.clear();
        const T* scale = job_.after(segment, 0).scale;
        for (int64_t g = 0; g < plan_.groups; ++g) {
          each_kept_tap(plan_, job_.words(segment), job_.masks_.row_words, g, [&](size_t t, int64_t tap) {
            values_.push_back(job_.weight(segment, g)[tap] * (scale ? scale[g] : T(1)));
            at_.push_back(tables_[0][t].x);
          });
          taps_.push_back(int64_t(values_.size()));
        }
      }
      const Phase& phase = plan_.phases[0];
      const int64_t begin = std::max(unit.strip.first, phase.begin[0]);
      const int64_t end = std::min(unit.strip.first + unit.strip.height, phase.end[0]);
      const After after = job_.after(segment, 0);
      Filter<T> m{};
      m.x_row = plan_.plane_width();
      m.y_row = plan_.out[1];
      m.height = end - begin;
      m.width = phase.end[1] - phase.begin[1];
      m.relu = after.relu;
      m.stream = job_.stream_ && m.y_row % kLine == 0 && m.width == m.y_row;
      const int64_t channel = unit.strip.channel(plan_), out = job_.out_;
      const T* const x = job_.input(unit.start);
      T* const y = job_.output(unit.start) + (begin + phase.shift[0]) * m.y_row + phase.begin[1] + phase.shift[1];
      each_packer([&](Packer<T>& packer, int64_t g0, int64_t groups) {
        const T* planes = x + g0 * job_.in_;
        m.x = packer.pack(unit.strip, &planes, 1) + (begin - unit.strip.first) * m.x_row + phase.begin[1];
        for (int64_t g = g0; g < g0 + groups; ++g, m.x += channel) {
          m.weights = values_.data() + taps_[g];
          m.at = at_.data() + taps_[g];
          m.taps = taps_[g + 1] - taps_[g];
          m.bias = after.bias ? after.bias[g] : T(0);
          m.y = y + g * out;
          k_.filter(m);
        }
      });
      add_residual(unit);
    }

    // body(packer, g0, groups) for all groups of the layer, as many at a time as the packer takes.
    template <class Body>
    void each_packer(const Body& body) {
      if (!packer_) packer_ = std::make_unique<Packer<T>>(plan_, together_ * plan_.channels);
      int64_t g = 0;
      for (; g + together_ <= plan_.groups; g += together_) body(*packer_, g, together_);
      if (g < plan_.groups && !single_) single_ = std::make_unique<Packer<T>>(plan_, plan_.channels);
      for (; g < plan_.groups; ++g) body(*single_, g, 1);
    }

    // To what a strip's places became: whole rows of pixels, of all phases together.
    void add_residual(const Unit& unit) const {
      const Phase& phase = plan_.phases[0];
      const int64_t begin = unit.strip.first * phase.step[0] + phase.shift[0];
      const int64_t top = std::max<int64_t>(0, begin);
      const int64_t bottom = std::min(plan_.out[0], begin + unit.strip.height * phase.step[0]);
      if (bottom > top)
        job_.add_residual(unit, 0, plan_.groups * plan_.rows, top * plan_.out[1], (bottom - top) * plan_.out[1]);
    }

    void prepare(const Strip& strip) {
      if (ready_ && strip.like(strip_)) return;
      ready_ = true;
      strip_ = strip;
      last_ = -1;
      tables_.clear();
      for (const Phase& phase : plan_.phases) tables_.push_back(offsets_of(plan_, phase, strip));
    }

    void strip(const Unit& unit, const Segment& segment) {
      const Strip& strip = unit.strip;
      if (!plan_.pointwise()) prepare(strip);
      from_.resize(unit.count);
      each_packer([&](Packer<T>& packer, int64_t g0, int64_t groups) { run_groups(unit, segment, packer, g0, groups); });
      add_residual(unit);
    }

    void run_groups(const Unit& unit, const Segment& segment, Packer<T>& packer, int64_t g0, int64_t groups) {
      const Strip& strip = unit.strip;
      for (int64_t s = 0; s < unit.count; ++s)
        from_[s] = job_.input(unit.start + s) + g0 * plan_.channels * job_.in_;
      const T* x = packer.pack(strip, from_.data(), unit.count);
      const int64_t rows = groups * plan_.rows;
      if (strip.lanes) {
        // The places of all phases, put in order when they are unpacked.
        lay_lanes(unit, segment, rows);
        T* y = y_.template take<T>(y_size_);
        for (size_t p = 0; p < plan_.phases.size(); ++p) run_phase(unit, segment, p, g0, groups, x, y);
        unpack_lanes(unit, y, g0 * plan_.rows, rows);
        return;
      }
      for (size_t p = 0; p < plan_.phases.size(); ++p) {
        const Area area = area_of(strip, plan_.phases[p]);
        if (area.height <= 0 || area.width <= 0) continue;
        lay_pixels(unit, segment, p, area, rows);
        T* y = y_.template take<T>(y_size_);
        run_phase(unit, segment, p, g0, groups, x, y);
        unpack_pixels(unit, plan_.phases[p], area, y, g0 * plan_.rows, rows);
      }
    }

    // A phase's places in a strip, from row `begin` and the phase's first column on.
    struct Area {
      int64_t begin, height, width;
    };

    Area area_of(const Strip& strip, const Phase& phase) const {
      const int64_t begin = std::max(strip.first, phase.begin[0]);
      return {begin, std::min(strip.first + strip.height, phase.end[0]) - begin, phase.end[1] - phase.begin[1]};
    }

    // Columns that the kernel holds in registers at once: `lines` lines of `vectors` vectors, x_line apart from x on. In y
    // they follow one another; of all the columns of their phase's area they are number `first` and on, and line_step
    // further.
    struct Piece {
      int64_t x, x_line, lines, vectors, first, line_step, y;
    };

    void run_phase(const Unit& unit, const Segment& segment, size_t p, int64_t g0, int64_t groups, const T* x, T* y) {
      const Strip& strip = unit.strip;
      const Area area = area_of(strip, plan_.phases[p]);
      if (area.height <= 0 || area.width <= 0) return;
      x += ((area.begin - strip.first) * plan_.plane_width() + plan_.phases[p].begin[1]) * strip.unit();
      for (int64_t g = 0; g < groups; ++g) {
        if (plan_.pointwise())
          multiply(unit, segment, g0 + g, x, y);
        else
          convolve(unit, segment, g0 + g, p, x, y);
        x += plan_.channels * strip.channel(plan_);
        y += plan_.rows * y_row_;
      }
    }

    void multiply(const Unit& unit, const Segment& segment, int64_t group, const T* x, T* y) {
      Multiply<T> m{};
      m.kept = segment.structure->at(plan_, group, 0);
      m.x = x;
      m.x_stride = unit.strip.channel(plan_);
      m.w = job_.weight(segment, group);
      m.w_stride = plan_.channel_stride();
      m.w_row = plan_.row_stride();
      job_.after(segment, group).to(m);
      m.rows = plan_.rows;
      m.y = y;
      m.y_row = y_row_;
      m.columns = plan_.linear() ? job_.granules(unit.count) : y_row_;
      if (group + 1 == plan_.groups) fetch_next(m);
      k_.multiply(m);
    }

    // What the next unit reads, while this one is computed: its samples lie anywhere, and no hardware can tell where.
    void fetch_next(Multiply<T>& m) {
      if (!next_) return;
      const int64_t bytes = plan_.groups * plan_.channels * job_.in_ * int64_t(sizeof(T));
      if (next_->count * bytes > kAhead) return;
      ahead_.clear();
      for (int64_t s = 0; s < next_->count; ++s) ahead_.push_back(job_.input(next_->start + s));
      m.ahead = ahead_.data();
      m.ahead_lines = (bytes + 63) / 64;
      m.ahead_from = 0;
      m.ahead_to = next_->count * m.ahead_lines;
    }

    void convolve(const Unit& unit, const Segment& segment, int64_t group, int64_t phase, const T* x, T* y) {
      if (last_ != unit.segment) {
        last_ = unit.segment;
        programs_.build(plan_, *segment.structure, tables_, job_.weight(segment, 0));
      }
      Convolve<T> m{};
      m.program = programs_.at(group, phase);
      job_.after(segment, group).to(m);
      m.rows = plan_.rows;
      m.y_row = y_row_;
      for (const Piece& piece : pieces_[phase]) {
        m.x = x + piece.x;
        m.x_line = piece.x_line;
        m.lines = piece.lines;
        m.vectors = piece.vectors;
        m.y = y + piece.y;
        k_.convolve(m);
      }
    }

    // `count` columns of vectors, evenly in pieces of at most `most`.
    void cut_line(int64_t count, int64_t most, Piece piece, std::vector<Piece>& pieces) const {
      const int64_t number = (count + most - 1) / most, x = piece.x, first = piece.first;
      for (int64_t i = 0, at = 0; i < number; ++i) {
        const int64_t end = count * (i + 1) / number;
        piece.x = x + at * k_.lanes;
        piece.first = first + at;
        piece.vectors = end - at;
        pieces.push_back(piece);
        at = end;
      }
    }

    // One run of columns; of single rows two stretches of it pass for two lines.
    void cut_run(int64_t count, bool single, std::vector<Piece>& pieces) const {
      const int64_t pair = k_.pair;
      int64_t at = 0;
      for (; single && count - at >= 2 * pair; at += 2 * pair)
        pieces.push_back({at * k_.lanes, pair * k_.lanes, 2, pair, at, pair, 0});
      cut_line(count - at, single ? pair : k_.block_columns / k_.lanes, {at * k_.lanes, 0, 1, 0, at, 0, 0}, pieces);
    }

    // y of a strip of lanes: all `rows` rows of a piece lie together, y_row_ apart, and stay in L1 while the inputs pass
    // tile by tile. place_ tells where the pixels of the strip's rows lie, of every vector of samples.
    void lay_lanes(const Unit& unit, const Segment& segment, int64_t rows) {
      const Strip& strip = unit.strip;
      const bool single = segment.structure->block_rows == 1;
      const std::array<int64_t, 5> key = {strip.first, strip.height, strip.samples, single, rows};
      if (key == lanes_key_) return;
      lanes_key_ = key;
      if (plan_.linear()) {
        y_row_ = strip.samples;
        y_size_ = rows * y_row_;
        return;
      }
      const int64_t L = k_.lanes, each = strip.samples / L, line = plan_.plane_width() * strip.unit();
      const int64_t above = strip.first * plan_.phases[0].step[0] + plan_.phases[0].shift[0];
      top_ = std::max<int64_t>(0, above);
      pixels_ = std::max<int64_t>(0, std::min(plan_.out[0], above + strip.height * plan_.phases[0].step[0]) - top_) * plan_.out[1];
      pieces_.resize(plan_.phases.size());
      y_row_ = 0;
      for (size_t p = 0; p < plan_.phases.size(); ++p) {
        const Area area = area_of(strip, plan_.phases[p]);
        std::vector<Piece>& pieces = pieces_[p];
        pieces.clear();
        if (area.height <= 0 || area.width <= 0) continue;
        const int64_t count = area.width * each, most = single ? k_.pair : k_.block_columns / L;
        int64_t h = 0;
        if (plan_.pointwise()) {
          pieces.push_back({0, 0, 1, area.height * count, 0, 0, 0});
          h = area.height;
        } else if (count * L == line) {
          cut_run(area.height * count, single, pieces);
          h = area.height;
        }
        for (; single && h + 2 <= area.height; h += 2)
          cut_line(count, most, {h * line, line, 2, 0, h * count, count, 0}, pieces);
        for (; h < area.height; ++h) cut_line(count, most, {h * line, 0, 1, 0, h * count, 0, 0}, pieces);
        for (const Piece& piece : pieces) y_row_ = std::max(y_row_, piece.lines * piece.vectors * L);
      }
      // Planes of which a part of a vector would be left over follow one another, if they are whole.
      joined_ = pixels_ == job_.out_ && pixels_ % L ? rows : 1;
      place_.resize(each * joined_ * pixels_);
      y_size_ = 0;
      for (size_t p = 0; p < plan_.phases.size(); ++p) {
        const Phase& phase = plan_.phases[p];
        const Area area = area_of(strip, phase);
        for (Piece& piece : pieces_[p]) {
          piece.y = y_size_;
          y_size_ += rows * y_row_;
          for (int64_t i = 0; i < piece.lines * piece.vectors; ++i) {
            const int64_t vector = piece.first + i / piece.vectors * piece.line_step + i % piece.vectors;
            const int64_t at = vector / each, h = area.begin + at / area.width, w = phase.begin[1] + at % area.width;
            place_[vector % each * joined_ * pixels_ + (h * phase.step[0] + phase.shift[0] - top_) * plan_.out[1] +
                   w * phase.step[1] + phase.shift[1]] = piece.y + i * L;
          }
        }
      }
      for (int64_t v = 0; v < each; ++v) {
        int64_t* place = place_.data() + v * joined_ * pixels_;
        for (int64_t e = pixels_; e < joined_ * pixels_; ++e) place[e] = place[e - pixels_] + y_row_;
      }
    }

    void unpack_lanes(const Unit& unit, T* y, int64_t row, int64_t rows) {
      const int64_t L = k_.lanes, first = row * job_.out_ + (plan_.linear() ? 0 : top_ * plan_.out[1]);
      T* to[64];
      for (int64_t lane = 0; lane < unit.count; lane += L) {
        const int64_t here = std::min<int64_t>(L, unit.count - lane);
        for (int64_t s = 0; s < here; ++s) to[s] = job_.output(unit.start + lane + s) + first;
        if (plan_.linear()) {
          const bool stream = job_.stream_ && first % kLine == 0 && rows % kLine == 0;
          k_.from_lanes({to, here, rows, y + lane, nullptr, y_row_, stream});
          continue;
        }
        Lanes<T> m{to, here, joined_ * pixels_, y, place_.data() + lane / L * joined_ * pixels_};
        m.planes = rows / joined_;
        m.stream = job_.stream_ && first % kLine == 0 && m.length % kLine == 0 && (m.planes == 1 || job_.out_ % kLine == 0);
        m.row_step = job_.out_;
        m.lanes_step = y_row_;
        k_.from_lanes(m);
      }
    }

    // y of pixels: one run over the planes of all samples, with what lies between their rows.
    void lay_pixels(const Unit& unit, const Segment& segment, size_t p, const Area& area, int64_t rows) {
      const int64_t columns =
          (unit.count - 1) * unit.strip.sample_plane(plan_) + (area.height - 1) * plan_.plane_width() + area.width;
      pieces_.resize(plan_.phases.size());
      pieces_[p].clear();
      lanes_key_[0] = -1;
      y_row_ = plan_.pointwise() ? job_.granules(columns) : (columns + k_.lanes - 1) / k_.lanes * k_.lanes;
      y_size_ = rows * y_row_;
      if (plan_.pointwise()) return;
      cut_run(y_row_ / k_.lanes, segment.structure->block_rows == 1, pieces_[p]);
      for (Piece& piece : pieces_[p]) piece.y = piece.first * k_.lanes;
    }

    void unpack_pixels(const Unit& unit, const Phase& phase, const Area& area, T* y, int64_t row, int64_t rows) {
      if (plan_.pointwise()) {
        to_.resize(unit.count);
        for (int64_t s = 0; s < unit.count; ++s) to_[s] = job_.output(unit.start + s) + row * area.width;
        move_planes(k_, area.width, to_.data(), unit.count, rows, y, y_row_, false);
        return;
      }
      for (int64_t s = 0; s < unit.count; ++s) {
        // Places (height, width) of every plane to their pixels.
        const int64_t first = (area.begin * phase.step[0] + phase.shift[0]) * plan_.out[1] +
                              phase.begin[1] * phase.step[1] + phase.shift[1];
        for (int64_t r = 0; r < rows; ++r)
          k_.copy({y + r * y_row_ + s * unit.strip.sample_plane(plan_), plan_.plane_width(), 1,
                   job_.output(unit.start + s) + (row + r) * job_.out_ + first, phase.step[0] * plan_.out[1],
                   phase.step[1], area.height, area.width, job_.large_});
      }
    }

    const Runner& job_;
    const Plan& plan_;
    const Kernels<T>& k_;
    int64_t together_;
    std::unique_ptr<Packer<T>> packer_, single_;
    Scratch x_, y_;
    bool ready_ = false;
    Strip strip_;
    std::vector<std::vector<Offset>> tables_;
    std::vector<const T*> from_;
    std::vector<T*> to_;
    Programs<T> programs_;  // of the last segment's mask, as are the kept taps
    int64_t last_ = -1;
    const Unit* next_ = nullptr;  // after this one; null: none, or what it reads is in the caches
    std::vector<const T*> ahead_;
    // How y is laid out: the pieces of every phase, and where what is unpacked lies.
    std::array<int64_t, 5> lanes_key_ = {-1, -1, -1, -1, -1};
    std::vector<std::vector<Piece>> pieces_;
    std::vector<int64_t> place_;
    int64_t y_row_ = 0, y_size_ = 0, top_ = 0, pixels_ = 0, joined_ = 1;
    FlatTaps<T> flat_;
    std::vector<int64_t> taps_, at_;
    std::vector<T> values_;
  };

  const Plan& plan_;
  const Batch& batch_;
  const Masks& masks_;
  const Forward<T>& call_;
  const Kernels<T>& k_;
  // Outputs of this many bytes are not in the caches when they are read next.
  static constexpr int64_t kStream = int64_t(16) << 20;
  static constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // elements of a cache line
  // Inputs of kFar bytes lie beyond L2, in which kAhead are room enough for what is fetched ahead.
  static constexpr int64_t kFar = int64_t(2) << 20, kAhead = int64_t(128) << 10;

  int64_t in_, out_;
  std::unique_ptr<Reads> reads_;  // of a layer that is taken flat
  bool large_ = false, stream_ = false, far_ = false;  // stream_: and every sample in whole cache lines
  std::vector<Segment> segments_;
  std::vector<Unit> units_;
};

}  // namespace

template <class T>
void forward(const Plan& plan, const Batch& batch, const Masks& masks, const Forward<T>& call,
             const Parallel& parallel) {
  Runner<T>(plan, batch, masks, call, parallel).run(parallel);
}

template void forward(const Plan&, const Batch&, const Masks&, const Forward<float>&, const Parallel&);
template void forward(const Plan&, const Batch&, const Masks&, const Forward<double>&, const Parallel&);

}  // namespace rtl_kernels
