// A mask compiled for one plan: for every block of output rows, which inputs it keeps, bucketed by pattern.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace rtl_kernels {

// Of one group, in tiles of `tile_inputs`: what each row keeps, ascending. Of row r and tile t from starts[t * rows + r] of
// `index` on, up to the next start, behind which at least a whole vector of valid inputs may be read.
struct Lists {
  const uint32_t* starts;
  const uint16_t* index;
  int64_t tiles;
};

// Buckets for blocks of rows: those of outputs are of single rows where a mask of several taps is sparse, a gradient's
// (kBlocks) are not. Or lists for single rows (of linear layers of up to 65,536 inputs).
enum class Kind { kBuckets, kBlocks, kLists };

struct Structure {
  int64_t tile_inputs;
  int64_t block_rows;  // 0: lists
  int64_t kept;  // weights
  struct Part {  // of one group and phase
    int64_t counts, index, tiles;
  };
  std::vector<Part> parts;  // (groups, phases)
  std::vector<uint32_t> counts;  // or a list's starts
  std::vector<uint16_t> index;

  Kept at(const Plan& plan, int64_t group, int64_t phase) const {
    const Part& part = parts[group * plan.phases.size() + phase];
    const int64_t blocks = block_rows ? (plan.rows + block_rows - 1) / block_rows : plan.rows;
    return {counts.data() + part.counts, index.data() + part.index, part.tiles, tile_inputs, blocks, block_rows, 0};
  }

  Lists lists(int64_t group) const {
    const Part& part = parts[group];
    return {counts.data() + part.counts, index.data() + part.index, part.tiles};
  }
};

constexpr int64_t kManyVectors = 6;  // of columns: as many as a kernel takes at once, or more

// The structure of one mask of `words` int32 words (rows of the weight's leading dimension, `words_row` each), or of all
// ones where `words` is null; for `vectors` vectors of columns. Kept from call to call: found by the words' address and
// CHECKED against a copy of the bits, so that a mask changed in place, by whatever means, or another one at a freed mask's
// address is compiled anew. The check reads 1/32 of the mask's weights' bytes. Bounded: RTL_KERNELS_CACHE_MB, 1024 if
// unset, of the least recently used go. A structure takes 2 bytes for each (block of rows, input) that keeps anything.
std::shared_ptr<const Structure> structure_of(const Plan& plan, const uint32_t* words, int64_t words_row,
                                              Kind kind = Kind::kBuckets, int64_t vectors = kManyVectors);

// body(begin, end) for `count` masks of `words` words each, by several threads where the check takes longer than to start
// them.
template <class Parallel, class Body>
void each_mask(const Parallel& parallel, int64_t count, int64_t words, const Body& body) {
  if (count > 1 && count * words >= (1 << 16))
    parallel(count, body);
  else
    body(0, count);
}

// Of `length` words, rows of which hold `bits` bits: the share that is kept, estimated from about 4,000 of them.
double density(const uint32_t* words, int64_t length, int64_t bits);

int64_t cached_bytes();
int64_t cache_limit();  // in bytes; throws where RTL_KERNELS_CACHE_MB holds no number

}  // namespace rtl_kernels
