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

// Output places [first, first + height) of the plan's rows, for `samples` samples. In memory x is
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
    // Behind the planes: a place for pixels no output reads, and what whole vectors read past the last place.
    return channels * channel(plan) + unit() + 64;
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

// How many groups of channels are packed and computed together: with few channels a group, one transpose serves many.
inline int64_t groups_together(const Plan& plan, int64_t element_bytes) {
  const int64_t channels = std::max<int64_t>(1, plan.channels);
  const int64_t bytes = channels * plan.planes() * (plan.places[0] + plan.reach[0]) * plan.plane_width() * 16 * element_bytes;
  return std::max<int64_t>(1, std::min({plan.groups, 256 / channels, (int64_t(1) << 17) / std::max<int64_t>(1, bytes)}));
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

// Packs samples of x into strips. Zeros are laid once for each kind of strip; pixels then always fall on the same places.
template <class T>
class Packer {
 public:
  Packer(const Plan& plan, int64_t channels) : plan_(plan), channels_(channels) {}

  // rows[s] points at the first of `channels` planes of sample s.
  T* pack(const Strip& strip, const T* const* rows, int64_t count) {
    prepare(strip);
    if (strip.lanes)
      pack_lanes(rows, count);
    else
      pack_pixels(rows, count);
    return x_;
  }

 private:
  void prepare(const Strip& strip) {
    // Input rows [top, bottom) fall into the strip.
    const int64_t s = plan_.plane_stride[0], above = strip.first * s - plan_.lead[0];
    const int64_t top = std::max<int64_t>(0, above);
    const int64_t bottom = std::max(top, std::min(plan_.in[0], (strip.first + strip.rows(plan_)) * s - plan_.lead[0]));
    const bool same = ready_ && strip.like(strip_) && top - above == top_ - above_ && bottom - top == bottom_ - top_;
    strip_ = strip;
    above_ = above;
    top_ = top;
    bottom_ = bottom;
    if (same) return;
    ready_ = true;
    const int64_t size = strip.size(plan_, channels_);
    x_ = scratch_.take<T>(size);
    // Whole planes of whole vectors leave no gaps to be zero.
    const int64_t whole = plan_.pointwise() && strip.lanes ? channels_ * strip.channel(plan_) : 0;
    std::memset(x_ + whole, 0, (size - whole) * sizeof(T));
    if (!strip.lanes) return;
    whole_ = top_ == 0 && bottom_ == plan_.in[0];
    const int64_t pixels = (bottom_ - top_) * plan_.in[1];
    place_.clear();
    for (int64_t h = top_; h < bottom_; ++h)
      for (int64_t w = 0; w < plan_.in[1]; ++w) place_.push_back(place(h, w));
    if (whole_) {
      place_.resize(channels_ * pixels);
      const int64_t spare = channels_ * strip.channel(plan_);
      for (int64_t c = 1; c < channels_; ++c)
        for (int64_t p = 0; p < pixels; ++p)
          place_[c * pixels + p] = place_[p] == spare ? spare : place_[p] + c * strip.channel(plan_);
    }
  }

  int64_t place(int64_t h, int64_t w) const {
    const int64_t* s = plan_.plane_stride;
    const int64_t qh = h + plan_.lead[0], qw = w + plan_.lead[1];
    const int64_t row = qh / s[0] - strip_.first, column = qw / s[1];
    if (row < 0 || row >= strip_.rows(plan_) || column >= plan_.plane_width())
      return channels_ * strip_.channel(plan_);
    return (qh % s[0] * s[1] + qw % s[1]) * strip_.plane(plan_) +
           (row * plan_.plane_width() + column) * strip_.unit();
  }

  void pack_lanes(const T* const* rows, int64_t count) {
    const Kernels<T>& k = kernels<T>();
    const int64_t pixels = (bottom_ - top_) * plan_.in[1], image = plan_.in[0] * plan_.in[1];
    for (int64_t lane = 0; lane < strip_.samples; lane += k.lanes) {
      const int64_t here = std::max<int64_t>(0, std::min<int64_t>(k.lanes, count - lane));
      T* from[64];
      if (whole_) {
        for (int64_t s = 0; s < here; ++s) from[s] = const_cast<T*>(rows[lane + s]);
        k.to_lanes({from, here, channels_ * pixels, x_ + lane, place_.data()});
        continue;
      }
      for (int64_t c = 0; c < channels_; ++c) {
        for (int64_t s = 0; s < here; ++s)
          from[s] = const_cast<T*>(rows[lane + s]) + c * image + top_ * plan_.in[1];
        // The spare place lies past all channels, and wherever a channel's own shift takes it still inside them or past.
        k.to_lanes({from, here, pixels, x_ + lane, shifted(c, pixels)});
      }
    }
  }

  const int64_t* shifted(int64_t c, int64_t pixels) {
    if (c == 0) return place_.data();
    shifted_.resize(pixels);
    const int64_t spare = channels_ * strip_.channel(plan_), by = c * strip_.channel(plan_);
    for (int64_t p = 0; p < pixels; ++p) shifted_[p] = place_[p] == spare ? spare : place_[p] + by;
    return shifted_.data();
  }

  void pack_pixels(const T* const* rows, int64_t count) {
    const Kernels<T>& k = kernels<T>();
    const int64_t width = plan_.in[1], image = plan_.in[0] * width, across = plan_.plane_width();
    if (plan_.pointwise()) {
      for (int64_t s = 0; s < count; ++s)
        k.copy({rows[s], width, 1, x_ + s * across, strip_.channel(plan_), 1, channels_, width});
      return;
    }
    // Pixels (h, w) with (h + top) mod sh = a and (w + left) mod sw = b fall into plane (a, b).
    const int64_t sh = plan_.plane_stride[0], sw = plan_.plane_stride[1];
    for (int64_t a = 0; a < sh; ++a) {
      const int64_t h = top_ + ((a - plan_.lead[0] - top_) % sh + sh) % sh, row = (h + plan_.lead[0]) / sh - strip_.first;
      const int64_t height = std::min((bottom_ - h + sh - 1) / sh, strip_.rows(plan_) - row);
      if (height > 0 && sw == 2 && plan_.lead[1] + width <= 2 * across) {
        // Both planes in one reading: column w goes to plane (w + left) mod 2, at (w + left) / 2.
        const int64_t left = plan_.lead[1];
        T* plane[2] = {x_ + a * sw * strip_.plane(plan_) + row * across,
                       x_ + (a * sw + 1) * strip_.plane(plan_) + row * across};
        T* even = plane[left % 2] + left / 2;
        T* odd = plane[(left + 1) % 2] + (left + 1) / 2;
        for (int64_t c = 0; c < channels_; ++c)
          for (int64_t s = 0; s < count; ++s) {
            const int64_t to = c * strip_.channel(plan_) + s * strip_.sample_plane(plan_);
            k.split({rows[s] + c * image + h * width, sh * width, even + to, odd + to, across, height, width});
          }
        continue;
      }
      for (int64_t b = 0; b < sw; ++b) {
        const int64_t w = ((b - plan_.lead[1]) % sw + sw) % sw, column = (w + plan_.lead[1]) / sw;
        const int64_t run = std::min(across - column, (width - w + sw - 1) / sw);
        if (height <= 0 || run <= 0) continue;
        T* to = x_ + (a * sw + b) * strip_.plane(plan_) + row * across + column;
        for (int64_t c = 0; c < channels_; ++c)
          for (int64_t s = 0; s < count; ++s)
            k.copy({rows[s] + c * image + h * width + w, sh * width, sw,
                    to + c * strip_.channel(plan_) + s * strip_.sample_plane(plan_), across, 1, height, run});
      }
    }
  }

  const Plan& plan_;
  const int64_t channels_;
  Strip strip_;
  bool ready_ = false;
  bool whole_ = false;
  int64_t above_ = 0, top_ = 0, bottom_ = 0;
  Scratch scratch_;
  T* x_ = nullptr;
  std::vector<int64_t> place_, shifted_;
};

}  // namespace rtl_kernels
