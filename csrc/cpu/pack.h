// Laying samples out for the kernels: zero-padded planes of unit stride, either of pixels or of pixels × samples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace rtl_kernels {

// A block of memory from a thread's own store: glibc gives large blocks back to the system, and faulting them in again at
// every call costs more than filling them. A thread keeps up to kKept bytes; what is larger is freed after its call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { give_back(); }

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > block_.bytes) {
      give_back();
      Store& store = mine();
      for (size_t i = 0; i < store.blocks.size(); ++i) {
        if (store.blocks[i].bytes < bytes) continue;
        block_ = store.blocks[i];
        store.bytes -= block_.bytes;
        store.blocks.erase(store.blocks.begin() + i);
        return static_cast<T*>(block_.data);
      }
      block_.data = std::aligned_alloc(4096, bytes);
      if (!block_.data) throw std::bad_alloc();
      block_.bytes = bytes;
    }
    return static_cast<T*>(block_.data);
  }

 private:
  static constexpr size_t kKept = size_t(32) << 20;
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  struct Store {
    std::vector<Block> blocks;
    size_t bytes = 0;
    ~Store() {
      for (Block& block : blocks) std::free(block.data);
    }
  };
  static Store& mine() {
    static thread_local Store store;
    return store;
  }
  void give_back() {
    if (!block_.data) return;
    Store& store = mine();
    if (store.bytes + block_.bytes > kKept) {
      std::free(block_.data);
    } else {
      store.bytes += block_.bytes;
      store.blocks.push_back(block_);
    }
    block_ = {};
  }

  Block block_;
};

// Output places [first, first + height) of the plan's rows, as far as there are any, for `samples` samples. In memory x is
//   lanes:  (channel, plane, row, column, sample)          samples rounded up to whole vectors
//   pixels: (channel, plane, sample, row, column)
// and every tap lies at a fixed distance from its place in both.
struct Strip {
  int64_t first = 0;
  int64_t height = 0;
  int64_t samples = 0;  // room for
  bool lanes = false;

  // Whether everything lies at the same distances.
  bool like(const Strip& other) const {
    return height == other.height && samples == other.samples && lanes == other.lanes;
  }

  int64_t rows(const Plan& plan) const { return height + plan.reach[0]; }
  int64_t unit() const { return lanes ? samples : 1; }
  int64_t sample_plane(const Plan& plan) const { return rows(plan) * plan.plane_width(); }
  int64_t plane(const Plan& plan) const { return sample_plane(plan) * samples; }
  int64_t channel(const Plan& plan) const { return plane(plan) * plan.planes(); }
  int64_t size(const Plan& plan, int64_t channels) const {
    // Behind the planes: what whole vectors read past the last place.
    return channels * channel(plan) + 64;
  }
};

// Where input j of a phase lies, and its weight.
inline std::vector<Offset> offsets_of(const Plan& plan, const Phase& phase, const Strip& strip) {
  std::vector<Offset> table;
  table.reserve(plan.channels * phase.taps.size());
  for (int64_t c = 0; c < plan.channels; ++c)
    for (size_t t = 0; t < phase.taps.size(); ++t)
      table.push_back({c * strip.channel(plan) + phase.plane[t] * strip.plane(plan) +
                           (phase.down[t] * plan.plane_width() + phase.right[t]) * strip.unit(),
                       c * plan.channel_stride() + phase.taps[t]});
  return table;
}

constexpr int64_t kStripBytes = int64_t(768) << 10;

// How many groups of channels are packed and computed together: with few channels a group, one transpose serves many.
inline int64_t groups_together(const Plan& plan, int64_t element_bytes) {
  const int64_t channels = std::max<int64_t>(1, plan.channels);
  const int64_t bytes = channels * plan.planes() * (plan.places[0] + plan.reach[0]) * plan.plane_width() * 16 * element_bytes;
  return std::max<int64_t>(1, std::min({plan.groups, 256 / channels, (int64_t(1) << 17) / std::max<int64_t>(1, bytes)}));
}

// Rows of output places a strip of lanes takes, so that what it reads and writes stays in L2: pairs of them (kernels.h,
// Convolve), and few enough rows shared with the next strip, which are moved.
inline int64_t lane_rows(const Plan& plan, int64_t samples, int64_t element_bytes) {
  const int64_t in = plan.channels * plan.planes() * plan.plane_width(), out = plan.rows * plan.places[1];
  const int64_t room = kStripBytes / (samples * element_bytes) - in * plan.reach[0];
  const int64_t rows = room / std::max<int64_t>(1, in + out) / 2 * 2;
  return std::max((plan.reach[0] + 1) / 2 * 2, std::max<int64_t>(2, rows));
}

// Rows of output places a strip takes, so that what it reads and writes stays in L2; at least `least`.
inline int64_t strip_rows(const Plan& plan, int64_t samples, int64_t element_bytes, int64_t bytes, int64_t least) {
  const int64_t row = plan.channels * plan.planes() * plan.plane_width() * samples * element_bytes;
  return std::max(least, bytes / std::max<int64_t>(1, row));
}

// Whether `count` samples, less than a whole vector, are computed as lanes all the same: the wasted lanes against the
// zeros between the planes of single samples, which are half and more of small ones.
inline bool worth_lanes(const Plan& plan, int64_t count, int64_t lanes) {
  const double places = double(plan.places[0]) * plan.places[1];
  const double plane = double(plan.places[0] + plan.reach[0]) * plan.plane_width();
  return count * plane >= 0.625 * lanes * places;
}

// Planes of `width` pixels, `channels` of each sample: they lie one after the other in rows[s], and in `planes` at
// s · width, a channel's `step` apart; moved from there to here (`gather`) or back.
template <class T>
void move_planes(const Kernels<T>& kernels, int64_t width, T* const* rows, int64_t samples, int64_t channels, T* planes,
                 int64_t step, bool gather) {
  const bool quarters = kernels.gather_quarters && width * 4 == kernels.lanes;
  const int64_t some = quarters ? samples / 4 * 4 : 0, these = quarters ? channels / 4 * 4 : 0;
  if (some && these) (gather ? kernels.gather_quarters : kernels.scatter_quarters)({rows, some, these, planes, step});
  for (int64_t s = 0; s < samples; ++s) {
    const int64_t first = s < some ? these : 0;
    if (first == channels) continue;
    T* const row = rows[s] + first * width;
    T* const plane = planes + first * step + s * width;
    if (gather)
      kernels.copy({row, width, 1, plane, step, 1, channels - first, width});
    else
      kernels.copy({plane, step, 1, row, width, 1, channels - first, width});
  }
}

// Packs samples of x into strips. Zeros beside the rows are laid once for each kind of strip: pixels always fall on the
// same places. A strip that follows on from the one before, of the same samples, keeps the rows they share.
template <class T>
class Packer {
 public:
  Packer(const Plan& plan, int64_t channels) : plan_(plan), channels_(channels), k_(kernels<T>()) {}

  // rows[s] points at the first of `channels` planes of sample s.
  T* pack(const Strip& strip, const T* const* rows, int64_t count) {
    const int64_t first = std::min(strip.first, plan_.places[0]);
    const int64_t bottom = std::min(strip.height, plan_.places[0] - first) + plan_.reach[0];
    int64_t top = 0;
    bool cleared = false;  // what lies beyond x, by the strip before
    if (!ready_ || !strip.like(strip_)) {
      lay(strip);
      cleared = true;
    } else if (cleared = first == strip_.first;
               int64_t(rows_.size()) == count && std::equal(rows, rows + count, rows_.begin())) {
      if (first == strip_.first) return x_;
      if (first == strip_.first + strip_.height) top = plan_.reach[0];
    }
    if (top > 0) keep(top);
    strip_.first = first;
    rows_.assign(rows, rows + count);
    // Rows [top, bottom) of the planes: input rows [from, to), and zeros beyond them.
    const int64_t s = plan_.plane_stride[0], at = first * s - plan_.lead[0];
    const int64_t from = std::min(plan_.in[0], std::max<int64_t>(0, at + top * s));
    const int64_t to = std::max(from, std::min(plan_.in[0], at + bottom * s));
    for (int64_t row = top; row < bottom && !cleared; ++row)
      for (int64_t a = 0; a < s; ++a)
        if (const int64_t h = at + row * s + a; h < 0 || h >= plan_.in[0]) clear(row, a);
    if (to == from) return x_;
    if (strip.lanes)
      pack_lanes(rows, count, from, to);
    else
      pack_pixels(rows, count, from, to);
    return x_;
  }

 private:
  void lay(const Strip& strip) {
    ready_ = true;
    strip_ = strip;
    const int64_t size = strip.size(plan_, channels_);
    x_ = scratch_.take<T>(size);
    // Whole planes of whole vectors leave no gaps to be zero.
    const int64_t whole = plan_.pointwise() && strip.lanes ? channels_ * strip.channel(plan_) : 0;
    std::memset(x_ + whole, 0, (size - whole) * sizeof(T));
    if (!strip.lanes || plan_.linear()) return;
    joined_from_ = nullptr;
    place_.clear();
    const int64_t* s = plan_.plane_stride;
    for (int64_t q = 0; q < strip.rows(plan_) * s[0]; ++q)
      for (int64_t w = plan_.lead[1]; w < plan_.lead[1] + plan_.in[1]; ++w)
        place_.push_back((q % s[0] * s[1] + w % s[1]) * strip.plane(plan_) +
                         (q / s[0] * plan_.plane_width() + w / s[1]) * strip.unit());
  }

  // The strip's last `rows` rows become the first ones of the next.
  void keep(int64_t rows) {
    const int64_t row = plan_.plane_width() * strip_.unit(), runs = strip_.lanes ? 1 : strip_.samples;
    for (int64_t i = 0; i < channels_ * plan_.planes() * runs; ++i) {
      T* plane = x_ + i * strip_.rows(plan_) * row;
      std::memmove(plane, plane + strip_.height * row, rows * row * sizeof(T));
    }
  }

  void clear(int64_t row, int64_t a) {
    const int64_t width = plan_.plane_width() * strip_.unit(), runs = strip_.lanes ? 1 : strip_.samples;
    const int64_t across = plan_.plane_stride[1];
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t i = a * across * runs; i < (a + 1) * across * runs; ++i)
        std::memset(x_ + c * strip_.channel(plan_) + (i * strip_.rows(plan_) + row) * width, 0, width * sizeof(T));
  }

  void pack_lanes(const T* const* rows, int64_t count, int64_t top, int64_t bottom) {
    const int64_t width = plan_.in[1], pixels = (bottom - top) * width, image = plan_.in[0] * width;
    if (plan_.linear()) {
      for (int64_t lane = 0; lane < strip_.samples; lane += k_.lanes) {
        T* from[64];
        const int64_t here = std::max<int64_t>(0, std::min<int64_t>(k_.lanes, count - lane));
        for (int64_t s = 0; s < here; ++s) from[s] = const_cast<T*>(rows[lane + s]);
        k_.to_lanes({from, here, channels_, x_ + lane, nullptr, strip_.channel(plan_)});
      }
      return;
    }
    const int64_t* place = place_.data() + (top + plan_.lead[0] - strip_.first * plan_.plane_stride[0]) * width;
    // Planes of which a part of a vector would be left over follow one another, if all their rows are wanted.
    const bool join = pixels == image && pixels % k_.lanes;
    if (join && joined_from_ != place) {
      joined_from_ = place;
      joined_.resize(channels_ * pixels);
      for (int64_t e = 0; e < channels_ * pixels; ++e)
        joined_[e] = place[e % pixels] + e / pixels * strip_.channel(plan_);
    }
    for (int64_t lane = 0; lane < strip_.samples; lane += k_.lanes) {
      const int64_t here = std::max<int64_t>(0, std::min<int64_t>(k_.lanes, count - lane));
      T* from[64];
      for (int64_t s = 0; s < here; ++s) from[s] = const_cast<T*>(rows[lane + s]) + top * width;
      Lanes<T> m{from, here, join ? channels_ * pixels : pixels, x_ + lane, join ? joined_.data() : place};
      m.planes = join ? 1 : channels_;
      m.row_step = image;
      m.lanes_step = strip_.channel(plan_);
      k_.to_lanes(m);
    }
  }

  void pack_pixels(const T* const* rows, int64_t count, int64_t top, int64_t bottom) {
    const int64_t width = plan_.in[1], image = plan_.in[0] * width, across = plan_.plane_width();
    if (plan_.pointwise()) {
      move_planes(k_, width, const_cast<T* const*>(rows), count, channels_, x_, strip_.channel(plan_), true);
      return;
    }
    // Pixels (h, w) with (h + top) mod sh = a and (w + left) mod sw = b fall into plane (a, b).
    const int64_t sh = plan_.plane_stride[0], sw = plan_.plane_stride[1], left = plan_.lead[1];
    const int64_t channel = strip_.channel(plan_), sample = strip_.sample_plane(plan_);
    for (int64_t a = 0; a < sh; ++a) {
      const int64_t h = top + ((a - plan_.lead[0] - top) % sh + sh) % sh, row = (h + plan_.lead[0]) / sh - strip_.first;
      const int64_t height = (bottom - h + sh - 1) / sh;
      if (height <= 0) continue;
      if (sw == 2) {
        // Both planes in one reading: column w goes to plane (w + left) mod 2, at (w + left) / 2.
        T* plane[2] = {x_ + a * sw * strip_.plane(plan_) + row * across,
                       x_ + (a * sw + 1) * strip_.plane(plan_) + row * across};
        T* even = plane[left % 2] + left / 2;
        T* odd = plane[(left + 1) % 2] + (left + 1) / 2;
        for (int64_t c = 0; c < channels_; ++c)
          for (int64_t s = 0; s < count; ++s) {
            const int64_t to = c * channel + s * sample;
            k_.split({rows[s] + c * image + h * width, sh * width, even + to, odd + to, across, height, width});
          }
        continue;
      }
      for (int64_t b = 0; b < sw; ++b) {
        const int64_t w = ((b - left) % sw + sw) % sw, column = (w + left) / sw, run = (width - w + sw - 1) / sw;
        if (run <= 0) continue;
        T* to = x_ + (a * sw + b) * strip_.plane(plan_) + row * across + column;
        for (int64_t c = 0; c < channels_; ++c)
          for (int64_t s = 0; s < count; ++s)
            k_.copy({rows[s] + c * image + h * width + w, sh * width, sw, to + c * channel + s * sample, across, 1, height,
                     run});
      }
    }
  }

  const Plan& plan_;
  const int64_t channels_;
  const Kernels<T>& k_;
  Strip strip_;
  bool ready_ = false;
  Scratch scratch_;
  T* x_ = nullptr;
  std::vector<const T*> rows_;  // what is packed
  std::vector<int64_t> place_, joined_;
  const int64_t* joined_from_ = nullptr;
};

}  // namespace rtl_kernels
