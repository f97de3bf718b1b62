// Depthwise layers of unit stride whose planes keep their size: pixel p reads the input at p + at, one distance for every
// tap, so that planes are taken as they lie, nothing is packed, and what a tap reads beside the plane is left out by bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace rtl_kernels {

// Where the taps of such a layer read.
class Reads {
 public:
  Reads(const Plan& plan, int64_t lanes) {
    const Phase& phase = plan.phases[0];
    const int64_t height = plan.in[0], width = plan.in[1];
    vectors_ = (height * width + lanes - 1) / lanes;
    inside_.assign(phase.taps.size() * vectors_, 0);
    for (size_t t = 0; t < phase.taps.size(); ++t) {
      const int64_t down = phase.down[t] - plan.lead[0] - phase.shift[0];
      const int64_t right = phase.right[t] - plan.lead[1] - phase.shift[1];
      at_.push_back(down * width + right);
      uint32_t* inside = inside_.data() + t * vectors_;
      for (int64_t row = std::max<int64_t>(0, -down); row < std::min(height, height - down); ++row) {
        const int64_t last = row * width + std::min(width, width - right);
        for (int64_t p = row * width + std::max<int64_t>(0, -right); p < last;) {
          const int64_t vector = p / lanes, end = std::min(last, (vector + 1) * lanes);
          inside[vector] |= ((1u << (end - p)) - 1) << (p - vector * lanes);
          p = end;
        }
      }
    }
  }

  // Whether a plan is such a layer, of planes of half a vector to `most` pixels: in larger ones the bits cost more than
  // zeros around a copy.
  template <class T>
  static bool suit(const Plan& plan, const Kernels<T>& kernels, int64_t most) {
    const int64_t pixels = plan.in[0] * plan.in[1];
    return kernels.flat && plan.rows == 1 && plan.channels == 1 && plan.phases.size() == 1 && plan.planes() == 1 &&
           plan.in[0] == plan.out[0] && plan.in[1] == plan.out[1] && pixels * 2 >= kernels.lanes && pixels <= most;
  }

  int64_t at(int64_t tap) const { return at_[tap]; }
  const uint32_t* inside(int64_t tap) const { return inside_.data() + tap * vectors_; }

 private:
  int64_t vectors_;
  std::vector<int64_t> at_;
  std::vector<uint32_t> inside_;
};

// body(t, tap) for each of phase 0's taps t that a mask's words, or null, keep of a depthwise layer's channel.
template <class Body>
void each_kept_tap(const Plan& plan, const uint32_t* words, int64_t row_words, int64_t channel, const Body& body) {
  const std::vector<int64_t>& taps = plan.phases[0].taps;
  for (size_t t = 0; t < taps.size(); ++t)
    if (!words || words[channel * row_words + taps[t] / 32] >> (taps[t] % 32) & 1) body(t, taps[t]);
}

// What every channel keeps of its filter.
template <class T>
struct FlatTaps {
  std::vector<FlatTap<T>> taps;
  std::vector<int64_t> first;

  // `words` of a mask, or null; weights are taken from `weight`, or null, times `scale`, or null.
  void keep(const Plan& plan, const Reads& reads, const uint32_t* words, int64_t row_words, const T* weight, const T* scale) {
    taps.clear();
    first.assign(1, 0);
    for (int64_t g = 0; g < plan.groups; ++g) {
      each_kept_tap(plan, words, row_words, g, [&](size_t t, int64_t tap) {
        const T value = weight ? weight[g * plan.group_weights() + tap] * (scale ? scale[g] : T(1)) : T(0);
        taps.push_back({reads.inside(t), reads.at(t), tap, value});
      });
      first.push_back(int64_t(taps.size()));
    }
  }
};

}  // namespace rtl_kernels
