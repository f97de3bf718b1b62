#include "structure.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace rtl_kernels {
namespace {

int64_t block_rows() { return kernels<float>().block_rows; }

// Inputs a tile, at most. Long buckets keep the 15 loops of a block predictable, short tiles keep the inputs in L1: the
// sparser the mask the longer, since a block then touches each input less often.
//
//   one tap        four rows   320 where the mask keeps 35 % or more, else 512
//                  two rows    128                                         192: half as many rows share a load
//                              256, 512 over up to 4, 2 vectors of columns
//   several taps   four rows   288: neighbouring taps read the same columns, of 32 channels where there are 9
//                  two rows    192
//                  one row     144: it holds 16 vectors of columns, where four rows hold 6
int64_t tile_inputs(const Plan& plan, int64_t kept, bool single, int64_t vectors) {
  const int64_t inputs = std::max<int64_t>(1, plan.channels * plan.taps);
  const int64_t weights = plan.groups * plan.rows * inputs;
  const bool dense = kept * 100 >= weights * 35;
  int64_t most = dense ? 320 : 512;
  if (plan.taps > 1)
    most = single ? 144 : block_rows() == 4 ? 288 : 192;
  else if (block_rows() == 2)
    most = vectors <= 2 ? 512 : vectors <= 4 ? 256 : dense ? 128 : 192;
  const int64_t tiles = (inputs + most - 1) / most;
  return (inputs + tiles - 1) / tiles;
}

constexpr int64_t kListsPadding = 64;

int64_t weight_rows(const Plan& plan) { return plan.groups * (plan.scatter ? plan.channels : plan.rows); }

// Without an instruction for it, which not every x86-64 has, the compiler would call a function for each word.
uint32_t bits_of(uint32_t word) {
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  return (((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}

int64_t count_bits(const Plan& plan, const uint32_t* words, int64_t words_row) {
  if (!words) return plan.groups * plan.group_weights();
  int64_t bits = 0;
  for (int64_t i = 0; i < weight_rows(plan) * words_row; ++i) bits += bits_of(words[i]);
  return bits;
}

Structure compile(const Plan& plan, const uint32_t* words, int64_t words_row, Kind kind, int64_t vectors) {
  Structure s;
  s.kept = count_bits(plan, words, words_row);
  // One row at a time reads an input for every multiply-add, but has a long loop where 15 have two or three inputs each.
  const bool single = kind != Kind::kBlocks && plan.taps > 1 && s.kept * 100 < plan.groups * plan.group_weights() * 15;
  s.tile_inputs = tile_inputs(plan, s.kept, single, vectors);
  // Fewer than 6 inputs a row on average (and phase): see kernels.h.
  s.block_rows = single || s.kept < 6 * plan.groups * plan.rows * int64_t(plan.phases.size()) ? 1 : block_rows();
  const int64_t patterns = int64_t(1) << s.block_rows;
  const int64_t blocks = (plan.rows + s.block_rows - 1) / s.block_rows;
  std::vector<uint8_t> pattern(s.tile_inputs);
  for (int64_t group = 0; group < plan.groups; ++group) {
    for (const Phase& phase : plan.phases) {
      const int64_t slots = phase.taps.size(), inputs = plan.channels * slots;
      const int64_t tiles = std::max<int64_t>(1, (inputs + s.tile_inputs - 1) / s.tile_inputs);
      const Structure::Part part{int64_t(s.counts.size()), int64_t(s.index.size()), tiles};
      s.parts.push_back(part);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * s.tile_inputs, count = std::min(s.tile_inputs, inputs - first);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t row = block * s.block_rows, height = std::min(s.block_rows, plan.rows - row);
          uint32_t counts[16] = {};
          int64_t channel = count > 0 ? first / slots : 0, slot = count > 0 ? first % slots : 0;
          for (int64_t j = 0; j < count; ++j) {
            unsigned bits = 0;
            for (int64_t r = 0; r < height; ++r) {
              bool keep = true;
              if (words) {
                const int64_t lead = group * (plan.scatter ? plan.channels : plan.rows) +
                                     (plan.scatter ? channel : row + r);
                const int64_t at = (plan.scatter ? row + r : channel) * plan.taps + phase.taps[slot];
                keep = words[lead * words_row + at / 32] >> (at % 32) & 1;
              }
              bits |= unsigned(keep) << r;
            }
            pattern[j] = bits;
            ++counts[bits];
            if (++slot == slots) slot = 0, ++channel;
          }
          const int64_t start = int64_t(s.index.size()) - part.index;
          if (start > INT64_C(0xffffffff)) throw std::length_error("a mask keeps more than 2^32 inputs of a group");
          uint32_t next[16];
          uint32_t total = 0;
          for (int64_t p = 1; p < patterns; ++p) next[p] = total, total += counts[p];
          counts[0] = uint32_t(start);
          s.counts.insert(s.counts.end(), counts, counts + patterns);
          s.index.resize(s.index.size() + total);
          uint16_t* index = s.index.data() + part.index + start;
          for (int64_t j = 0; j < count; ++j)
            if (pattern[j]) index[next[pattern[j]]++] = uint16_t(j);
        }
      }
    }
  }
  s.index.shrink_to_fit();
  s.counts.shrink_to_fit();
  return s;
}

// See Lists. Rows and inputs change places in a scatter.
Structure compile_lists(const Plan& plan, const uint32_t* words, int64_t words_row) {
  Structure s;
  // Longer than buckets' tiles: a row's list is short, and is entered once a tile.
  const int64_t pieces = std::max<int64_t>(1, (plan.channels + 511) / 512);
  s.tile_inputs = std::max<int64_t>(1, (plan.channels + pieces - 1) / pieces);
  s.block_rows = 0;
  s.kept = count_bits(plan, words, words_row);
  const int64_t tiles = std::max<int64_t>(1, (plan.channels + s.tile_inputs - 1) / s.tile_inputs);
  const int64_t leads = plan.scatter ? plan.channels : plan.rows, rest = (plan.scatter ? plan.rows : plan.channels) % 32;
  const uint32_t last = rest ? (uint32_t(1) << rest) - 1 : ~uint32_t(0);  // bits behind a row's end name no input
  s.index.reserve(s.kept + kListsPadding);
  for (int64_t group = 0; group < plan.groups; ++group) {
    s.parts.push_back({int64_t(s.counts.size()), int64_t(s.index.size()), tiles});
    const auto each = [&](auto&& body) {
      for (int64_t lead = 0; lead < leads; ++lead) {
        for (int64_t word = 0; word < words_row; ++word) {
          const uint32_t own = word + 1 == words_row ? last : ~uint32_t(0);
          for (uint32_t bits = words[(group * leads + lead) * words_row + word] & own; bits; bits &= bits - 1) {
            const int64_t other = word * 32 + __builtin_ctz(bits);
            plan.scatter ? body(other, lead) : body(lead, other);
          }
        }
      }
    };
    std::vector<uint32_t> starts(plan.rows * tiles + 1, 0);
    each([&](int64_t row, int64_t input) { ++starts[input / s.tile_inputs * plan.rows + row + 1]; });
    if (plan.rows * plan.channels > INT64_C(0xffffffff))
      throw std::length_error("a list for more than 2^32 weights of a group");
    for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    std::vector<uint32_t> next(starts);
    s.index.resize(s.index.size() + starts.back());
    uint16_t* index = s.index.data() + s.parts.back().index;
    each([&](int64_t row, int64_t input) { index[next[input / s.tile_inputs * plan.rows + row]++] = uint16_t(input); });
    s.counts.insert(s.counts.end(), starts.begin(), starts.end());
  }
  s.index.resize(s.index.size() + kListsPadding, 0);
  s.counts.shrink_to_fit();
  return s;
}

using Key = std::vector<int64_t>;

struct Compiled {
  std::vector<uint32_t> words;
  Structure structure;
};

struct Entry {
  std::shared_ptr<const Compiled> compiled;
  int64_t bytes;
  std::list<Key>::iterator used;
};

struct Cache {
  std::mutex mutex;
  std::map<Key, Entry> entries;
  std::list<Key> order;  // least recently used first
  int64_t bytes = 0;
  const int64_t limit = cache_limit();

  void drop(std::map<Key, Entry>::iterator at) {
    bytes -= at->second.bytes;
    order.erase(at->second.used);
    entries.erase(at);
  }
};

Cache& cache() {
  static Cache* const instance = new Cache;  // never destroyed: threads may outlive static destructors
  return *instance;
}

}  // namespace

std::shared_ptr<const Structure> structure_of(const Plan& plan, const uint32_t* words, int64_t words_row, Kind kind,
                                              int64_t vectors) {
  const int64_t length = words ? weight_rows(plan) * words_row : 0;
  const int64_t width = block_rows() == 2 ? (std::min(vectors, kManyVectors) + 1) / 2 : 0;
  Key key = {int64_t(reinterpret_cast<intptr_t>(words)), length, plan.scatter, plan.groups, plan.rows, plan.channels,
             plan.kernel[0], plan.kernel[1], int64_t(kind), width};
  if (plan.scatter && plan.taps > 1)  // only then do the taps fall into phases
    key.insert(key.end(), {plan.stride[0], plan.stride[1], plan.dilation[0], plan.dilation[1]});
  else if (plan.scatter)
    key.insert(key.end(), {plan.stride[0], plan.stride[1]});
  const auto structure = [](const std::shared_ptr<const Compiled>& compiled) {
    return std::shared_ptr<const Structure>(compiled, &compiled->structure);
  };
  // Bits are compared and compiled without the lock, so that threads do so side by side.
  Cache& c = cache();
  std::unique_lock<std::mutex> lock(c.mutex);
  if (const auto found = c.entries.find(key); found != c.entries.end()) {
    c.order.splice(c.order.end(), c.order, found->second.used);
    const auto known = found->second.compiled;
    lock.unlock();
    if (length == 0 || std::memcmp(known->words.data(), words, length * sizeof(uint32_t)) == 0) return structure(known);
    lock.lock();
    if (const auto still = c.entries.find(key); still != c.entries.end() && still->second.compiled == known) c.drop(still);
  }
  lock.unlock();
  auto compiled = std::make_shared<Compiled>();
  compiled->words.assign(words, words + length);  // compiled from the copy: a writer meanwhile is its own problem
  const uint32_t* const copy = words ? compiled->words.data() : nullptr;
  compiled->structure =
      kind == Kind::kLists ? compile_lists(plan, copy, words_row) : compile(plan, copy, words_row, kind, vectors);
  const Structure& s = compiled->structure;
  const int64_t bytes = int64_t(length * 4 + s.counts.size() * 4 + s.index.size() * 2 +
                                s.parts.size() * sizeof(Structure::Part) + 256);
  lock.lock();
  if (bytes > c.limit || c.entries.count(key)) return structure(compiled);
  while (c.bytes + bytes > c.limit && !c.order.empty()) c.drop(c.entries.find(c.order.front()));
  c.order.push_back(key);
  c.entries.emplace(key, Entry{compiled, bytes, std::prev(c.order.end())});
  c.bytes += bytes;
  return structure(compiled);
}

double density(const uint32_t* words, int64_t length, int64_t bits) {
  const int64_t row_bits = (bits + 31) / 32 * 32, step = length / 128 | 1;
  int64_t kept = 0, words_read = 0;
  for (int64_t i = 0; i < length; i += step) kept += bits_of(words[i]), ++words_read;
  return words_read && bits ? double(kept) / 32 / words_read * row_bits / bits : 0;
}

int64_t cache_limit() {
  const char* const given = std::getenv("RTL_KERNELS_CACHE_MB");
  if (!given || !*given) return int64_t(1024) << 20;
  char* end = nullptr;
  const long long megabytes = std::strtoll(given, &end, 10);
  if (*end || megabytes < 0 || megabytes > (1 << 30))
    throw std::invalid_argument("RTL_KERNELS_CACHE_MB is '" + std::string(given) + "', expected whole megabytes, 0 or more");
  return int64_t(megabytes) << 20;
}

int64_t cached_bytes() {
  std::unique_lock<std::mutex> lock(cache().mutex);
  return cache().bytes;
}

}  // namespace rtl_kernels
