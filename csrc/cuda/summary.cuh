// The summary of a bank's words: one bit for every 32 × 32 weights of every mask that has any kept.
#pragma once

#include "common.cuh"

namespace rtl {

struct SummaryArgs {
  Route route;
  uint32_t* summary;
};

constexpr int kSummaryThreads = 128;

// A warp makes one word: lane j looks at mask word 32c + j of 32 rows.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) tile_summary_kernel(SummaryArgs args) {
  const Route& route = args.route;
  const int64_t blocks = divide_up(route.mask_rows, int64_t(32)), words = divide_up(route.words_per_row, int64_t(32));
  const int64_t index = block_index() * (kThreads / kWarp) + warp_index();
  if (index >= route.masks * blocks * words) return;
  const int64_t word = index % words * 32 + lane_index();
  const int64_t block = index / words % blocks, mask = index / (words * blocks);
  uint32_t any = 0;
  if (word < route.words_per_row)
    for (int64_t row = block * 32; row < smaller(block * 32 + 32, route.mask_rows); row++)
      any |= uint32_t(mask_row(route, mask + 1, row)[RTL_PLANT(7, word, word > 0 ? word - 1 : 0)]);
  uint32_t bits = 0;
  if (RTL_PLANT(4, true, word < route.words_per_row)) bits = ballot(any != 0);
  if (lane_index() == 0) args.summary[index] = bits;
}

}  // namespace rtl
