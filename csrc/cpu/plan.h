// What an operator does to one sample, for every kind of operator alike.
//
// Two plans cover linear layers, convolutions, transposed convolutions and their derivatives. With padded position
// q = i + padding, tap (kh, kw) connects input and output where q = h · stride + kh · dilation:
//
//   gather   y[h] = Σ w · x[q]       a convolution's forward; a transposed convolution's dx
//   scatter  y[q] = Σ w · x[h]       a convolution's dx; a transposed convolution's forward
//
// Both are brought to unit stride: x is laid, zero-padded, into planes (for a gather with stride, one plane for each
// residue of q), y is computed in phases (for a scatter with stride, one for each residue of q, with its own taps), and
// then every kept weight reads x at one fixed distance from the output's own place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rtl_kernels {

struct Geometry {
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];  // top, left; what lies below and right follows from the sizes
  int64_t dilation[2];
  int64_t groups;
};

// The outputs whose position leaves one residue, and the taps that reach them.
struct Phase {
  std::vector<int64_t> taps;
  std::vector<int64_t> plane, down, right;  // of each tap: which plane of x, and how far from the output's place
  int64_t begin[2], end[2];                 // output places t (rows, columns)
  int64_t step[2], shift[2];                // place t is output t · step + shift
};

struct Plan {
  bool scatter;
  int64_t groups, rows, channels, taps;  // rows (outputs) and channels (inputs) of one group
  int64_t kernel[2], stride[2], dilation[2];
  int64_t in[2], out[2];  // height, width of a sample's planes
  int64_t plane_stride[2];  // padded position q of x lies in plane (q mod this), at q / this
  int64_t lead[2];          // zeros before the sample (top, left)
  int64_t reach[2];         // the farthest `down` and `right`
  int64_t places[2];        // output places over all phases
  std::vector<Phase> phases;

  int64_t planes() const { return plane_stride[0] * plane_stride[1]; }
  // What outputs read, and all of x: then a row of x needs no care where it ends.
  int64_t plane_width() const {
    return std::max(places[1] + reach[1], (lead[1] + in[1] - 1) / plane_stride[1] + 1);
  }
  bool pointwise() const { return taps == 1 && planes() == 1 && phases.size() == 1 && !lead[0] && !lead[1] &&
                                  in[0] == out[0] && in[1] == out[1]; }
  bool linear() const { return pointwise() && in[0] * in[1] == 1; }

  // Where weights lie. A gather's rows are the weight's leading dimension, a scatter's its second.
  int64_t group_weights() const { return rows * channels * taps; }
  int64_t row_stride() const { return scatter ? taps : channels * taps; }
  int64_t channel_stride() const { return scatter ? rows * taps : taps; }
};

// A linear layer is a pointwise gather on planes of one pixel.
Plan make_plan(bool scatter, int64_t groups, int64_t rows, int64_t channels, const Geometry& geometry,
               const int64_t (&in)[2], const int64_t (&out)[2]);

}  // namespace rtl_kernels
