#include "plan.h"

#include <algorithm>

namespace rtl_kernels {

Plan make_plan(bool scatter, int64_t groups, int64_t rows, int64_t channels, const Geometry& geometry,
               const int64_t (&in)[2], const int64_t (&out)[2]) {
  Plan plan{};
  plan.scatter = scatter;
  // A plane of a pointwise operator is one row of pixels: fewer, longer runs.
  if (geometry.kernel[0] * geometry.kernel[1] == 1 && geometry.stride[0] * geometry.stride[1] == 1 &&
      geometry.padding[0] == 0 && geometry.padding[1] == 0 && in[0] == out[0] && in[1] == out[1] && in[0] != 1) {
    const int64_t row[2] = {1, in[0] * in[1]};
    return make_plan(scatter, groups, rows, channels, geometry, row, row);
  }
  plan.groups = groups;
  plan.rows = rows;
  plan.channels = channels;
  plan.taps = geometry.kernel[0] * geometry.kernel[1];
  int64_t phases[2];
  for (int d = 0; d < 2; ++d) {
    plan.kernel[d] = geometry.kernel[d];
    plan.stride[d] = geometry.stride[d];
    plan.dilation[d] = geometry.dilation[d];
    plan.in[d] = in[d];
    plan.out[d] = out[d];
    // A lone output reads one residue only at dilation 1 and kernel 1, where the others are never needed.
    const int64_t last = (geometry.kernel[d] - 1) * geometry.dilation[d];
    plan.reach[d] = last / geometry.stride[d];
    plan.plane_stride[d] = scatter ? 1 : geometry.stride[d];
    plan.lead[d] = scatter ? plan.reach[d] : geometry.padding[d];
    phases[d] = scatter ? geometry.stride[d] : 1;
    plan.places[d] = scatter ? 0 : out[d];
  }
  for (int64_t a = 0; a < phases[0]; ++a) {
    for (int64_t b = 0; b < phases[1]; ++b) {
      Phase phase{};
      const int64_t residue[2] = {a, b};
      for (int d = 0; d < 2; ++d) {
        const int64_t s = geometry.stride[d], p = geometry.padding[d];
        phase.step[d] = scatter ? s : 1;
        phase.shift[d] = scatter ? residue[d] - p : 0;
        phase.begin[d] = scatter ? std::max<int64_t>(0, p - residue[d] + s - 1) / s : 0;
        phase.end[d] = scatter ? (out[d] - 1 + p - residue[d] + s) / s : out[d];  // > 0: out + p > residue - s
        phase.end[d] = std::max(phase.begin[d], phase.end[d]);
        plan.places[d] = std::max(plan.places[d], phase.end[d]);
      }
      for (int64_t kh = 0; kh < geometry.kernel[0]; ++kh) {
        for (int64_t kw = 0; kw < geometry.kernel[1]; ++kw) {
          const int64_t at[2] = {kh * geometry.dilation[0], kw * geometry.dilation[1]};
          const int64_t far[2] = {at[0] / geometry.stride[0], at[1] / geometry.stride[1]};
          const int64_t rest[2] = {at[0] % geometry.stride[0], at[1] % geometry.stride[1]};
          if (scatter && (rest[0] != a || rest[1] != b)) continue;
          phase.taps.push_back(kh * geometry.kernel[1] + kw);
          phase.plane.push_back(scatter ? 0 : rest[0] * geometry.stride[1] + rest[1]);
          phase.down.push_back(scatter ? plan.reach[0] - far[0] : far[0]);
          phase.right.push_back(scatter ? plan.reach[1] - far[1] : far[1]);
        }
      }
      plan.phases.push_back(std::move(phase));
    }
  }
  return plan;
}

}  // namespace rtl_kernels
