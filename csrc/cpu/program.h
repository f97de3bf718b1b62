// A mask's structure and the weights it keeps, brought together in the order the kernel reads them (kernels.h, Program).
//
// A kernel that gathers weights reads most cache lines of a shared weight to use one or two numbers of each, for every
// few columns anew; this is done once for all of a mask's samples.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "pack.h"
#include "structure.h"

namespace rtl_kernels {

template <class T>
class Programs {
 public:
  // All groups and phases of `plan`: tables[phase] says where input j lies, and its weight.
  void build(const Plan& plan, const Structure& structure, const std::vector<std::vector<Offset>>& tables, const T* weight) {
    block_rows_ = structure.block_rows;
    phases_ = int64_t(plan.phases.size());
    parts_.clear();
    int64_t counts = 0, entries = 0;
    for (int64_t g = 0; g < plan.groups; ++g)
      for (int64_t p = 0; p < phases_; ++p) {
        const Kept kept = structure.at(plan, g, p);
        parts_.push_back({counts, entries, kept.tiles});
        for (int64_t b = 0; b < kept.tiles * kept.blocks; ++b)
          for (int64_t pattern = 1; pattern <= patterns(); ++pattern)
            entries += kept.counts[b * (patterns() + 1) + pattern] * size(pattern);
        counts += kept.tiles * kept.blocks * patterns();
      }
    counts_.resize(counts);
    T* entry = entries_.template take<T>(entries);
    uint32_t* count = counts_.data();
    for (int64_t g = 0; g < plan.groups; ++g)
      for (int64_t p = 0; p < phases_; ++p)
        part(structure.at(plan, g, p), plan.row_stride(), tables[p].data(), weight + g * plan.group_weights(), count, entry);
  }

  Program<T> at(int64_t group, int64_t phase) {
    const Part& part = parts_[group * phases_ + phase];
    return {counts_.data() + part.counts, entries_.template take<T>(0) + part.entries, part.tiles, block_rows_};
  }

 private:
  static constexpr int64_t kHead = sizeof(int64_t) / sizeof(T);

  int64_t patterns() const { return (int64_t(1) << block_rows_) - 1; }
  static int64_t size(int64_t pattern) { return kHead + __builtin_popcount(unsigned(pattern)); }

  void part(const Kept& kept, int64_t w_row, const Offset* table, const T* weight, uint32_t*& count, T*& entry) const {
    for (int64_t tile = 0; tile < kept.tiles; ++tile, table += kept.tile_inputs)
      for (int64_t block = 0; block < kept.blocks; ++block) {
        const uint32_t* counts = kept.counts + (tile * kept.blocks + block) * (patterns() + 1);
        const uint16_t* index = kept.index + counts[0];
        const T* rows = weight + block * kept.block_rows * w_row;
        for (unsigned pattern = 1; pattern <= patterns(); ++pattern) {
          *count++ = counts[pattern];
          for (const uint16_t* end = index + counts[pattern]; index != end; ++index) {
            const Offset& offset = table[*index];
            std::memcpy(entry, &offset.x, sizeof(int64_t));
            entry += kHead;
            for (unsigned bits = pattern; bits; bits &= bits - 1)
              *entry++ = rows[__builtin_ctz(bits) * w_row + offset.w];
          }
        }
      }
  }

  struct Part {  // of one group and phase
    int64_t counts, entries, tiles;
  };
  int64_t block_rows_ = 1, phases_ = 1;
  std::vector<Part> parts_;
  std::vector<uint32_t> counts_;
  Scratch entries_;
};

}  // namespace rtl_kernels
