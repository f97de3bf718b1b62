// dw = Σ over samples of m ⊙ (dy ⊗ x) of linear layers.
//
// A mask goes one of two ways, by its size and density. Dense tiles: outer products of 12 outputs × 32 inputs in
// registers, the mask's bits applied as they are added to dw. Dots: one dot product along the samples, as lanes, for
// every kept weight. Both are laid out first for all masks, and each tile of dw then meets one mask after another while it
// lies in L1: threads divide the rows of dw among them, so that sums do not depend on their number.
#include "grad_weight.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "pack.h"
#include "structure.h"

namespace rtl_kernels {
namespace {

template <class T>
class LinearGradient {
 public:
  LinearGradient(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
                 const Parallel& parallel)
      : plan_(plan), batch_(batch), masks_(masks), call_(call), parallel_(parallel), k_(kernels<T>()) {}

  void run() {
    std::vector<Group> groups;
    for (int64_t g = 0; g <= batch_.masks; ++g) {
      const int64_t start = batch_.offsets[g] * batch_.inner, stop = batch_.offsets[g + 1] * batch_.inner;
      if (stop > start)
        groups.push_back({g - 1, start, stop, by_dots(g - 1, stop - start), nullptr});
      else if (call_.weight_stride && g > 0)
        std::fill_n(gradient(g - 1, 0), plan_.groups * plan_.group_weights(), T(0));
    }
    each_mask(parallel_, int64_t(groups.size()), masks_.mask_words, [&](int64_t begin, int64_t end) {
      for (Group* g = groups.data() + begin; g != groups.data() + end; ++g)
        if (g->apart) g->lists = structure_of(plan_, words(g->mask), masks_.row_words, Kind::kLists);
    });
    std::vector<Piece> dense, sparse;
    for (const Group& g : groups) {
      const int64_t most = g.apart ? kDots : kOuter;
      for (int64_t at = g.start; at < g.stop; at += most)
        (g.apart ? sparse : dense)
            .push_back({g.mask, at, std::min(most, g.stop - at), call_.weight_stride && at == g.start, g.lists});
    }
    if (!call_.weight_stride && !(dense.empty() && sparse.empty())) (dense.empty() ? sparse : dense)[0].first = true;
    for (int64_t group = 0; group < plan_.groups; ++group) {
      in_batches(dense, [&](const Piece* pieces, int64_t count) { outer(group, pieces, count); });
      in_batches(sparse, [&](const Piece* pieces, int64_t count) { dots(group, pieces, count); });
    }
  }

 private:
  struct Group {
    int64_t mask, start, stop;  // rows of the batch, times `inner`
    bool apart;                 // goes by dots
    std::shared_ptr<const Structure> lists;
  };
  struct Piece {
    int64_t mask, start, count;  // rows of the batch, times `inner`
    bool first;                  // to reach its dw
    std::shared_ptr<const Structure> lists;
  };
  // Samples of a piece, and of the pieces laid out at once: a strip of x for 256 samples fits into L1.
  static constexpr int64_t kOuter = 256, kDots = 64, kBatch = 256, kAhead = 4;

  const uint32_t* words(int64_t mask) const { return masks_.words + mask * masks_.mask_words; }

  // In cycles. A dense tile's weight costs half a one a vector of samples, and where vectors are short nearly one to apply
  // the bits; a kept weight's dot product .85 a vector, and 2.9 for every piece to add up its lanes and put the sum into
  // its place.
  bool by_dots(int64_t mask, int64_t count) const {
    if (mask < 0 || plan_.channels > 65536 || plan_.group_weights() > INT64_C(0xffffffff)) return false;
    const double vectors = double((count + k_.lanes - 1) / k_.lanes), pieces = double((count + kDots - 1) / kDots);
    return density(words(mask), plan_.groups * plan_.rows * masks_.row_words, plan_.channels) *
               (0.85 * vectors + 2.9 * pieces) < 0.52 * vectors + (k_.block_rows == 2 ? 0.9 : 0);
  }

  template <class Body>
  void in_batches(const std::vector<Piece>& pieces, const Body& body) {
    for (size_t first = 0; first < pieces.size();) {
      size_t last = first;
      for (int64_t samples = 0; last < pieces.size() && (last == first || samples + pieces[last].count <= kBatch); ++last)
        samples += pieces[last].count;
      body(pieces.data() + first, int64_t(last - first));
      first = last;
    }
  }

  const T* input(int64_t row) const { return row_of(call_.input, call_.input_samples, row, plan_.channels); }
  const T* output(int64_t row) const { return row_of(call_.output, call_.output_samples, row, plan_.rows); }

  const T* row_of(const T* data, int64_t samples, int64_t row, int64_t width) const {
    const int64_t r = row / batch_.inner, rest = row % batch_.inner;
    const int64_t sample = batch_.order ? batch_.order[r] : r % samples;
    return data + (sample * batch_.inner + rest) * plan_.groups * width;
  }

  T* gradient(int64_t mask, int64_t group) const {
    return call_.dw + std::max<int64_t>(0, mask) * call_.weight_stride + group * plan_.group_weights();
  }

  void outer(int64_t group, const Piece* pieces, int64_t count) {
    const int64_t inputs = plan_.channels, width = k_.outer_columns, height = k_.outer_rows;
    const int64_t strips = (inputs + width - 1) / width;
    std::vector<const T*> x_rows, dy_rows;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t s = 0; s < pieces[p].count; ++s) {
        x_rows.push_back(input(pieces[p].start + s) + group * inputs);
        dy_rows.push_back(output(pieces[p].start + s) + group * plan_.rows);
      }
    const int64_t samples = int64_t(x_rows.size());
    // (strip, sample, column) and (tile, sample, row): rows of x itself, a power of two apart as often as not, would fall
    // on the same few lines of the caches.
    const int64_t tiles = (plan_.rows + height - 1) / height, third = height / 3;
    const int64_t last = (plan_.rows - (tiles - 1) * height + third - 1) / third * third;  // the last tile's height
    T* x = x_.template take<T>(strips * samples * width);
    T* dy = dy_.template take<T>(tiles * samples * height);
    parallel_(samples, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        if (s + kAhead < end) {
          fetch(x_rows[s + kAhead], inputs);
          fetch(dy_rows[s + kAhead], plan_.rows);
        }
        k_.lay_out({x_rows[s], inputs, x + s * width, samples * width, dy_rows[s], plan_.rows, dy + s * height,
                    samples * height, dy + (tiles - 1) * samples * height + s * last});
      }
    });
    const std::vector<uint32_t> ones((inputs + 31) / 32, ~uint32_t(0));  // a row's words where there is no mask
    parallel_(tiles, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile * height, tall = tile + 1 == tiles ? last : height;
        for (int64_t strip = 0; strip < strips; ++strip) {
          Outer<T> m{};
          m.x = x + strip * samples * width;
          m.dy = dy + tile * samples * height;
          m.height = tall;
          m.rows = std::min(height, plan_.rows - row);
          m.columns = std::min(width, inputs - strip * width);
          m.column = strip * width;
          m.g_row = inputs;
          for (int64_t p = 0; p < count; ++p) {
            const Piece& piece = pieces[p];
            m.words_row = piece.mask < 0 ? 0 : masks_.row_words;
            m.words = piece.mask < 0 ? ones.data() : words(piece.mask) + (group * plan_.rows + row) * masks_.row_words;
            m.samples = piece.count;
            m.first = piece.first;
            m.g = gradient(piece.mask, group) + row * inputs + strip * width;
            k_.outer(m);
            m.x += piece.count * width;
            m.dy += piece.count * tall;
          }
        }
      }
    });
  }

  // Rows lie anywhere in the batch, which the processor does not foresee.
  static void fetch(const T* row, int64_t length) {
    for (int64_t i = 0; i < std::min<int64_t>(length, 512); i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i);
  }

  // Samples as lanes: (element, sample), samples rounded up to whole vectors.
  void to_lanes(const Piece& piece, int64_t length, bool of_x, int64_t group, T* to) const {
    const int64_t L = k_.lanes, columns = rounded(piece.count);
    const auto row = [&](int64_t sample) {
      return (of_x ? input(piece.start + sample) : output(piece.start + sample)) + group * length;
    };
    for (int64_t lane = 0; lane < piece.count; lane += L) {
      const int64_t here = std::min(L, piece.count - lane);
      T* from[64];
      for (int64_t s = 0; s < here; ++s) from[s] = const_cast<T*>(row(lane + s));
      for (int64_t s = lane + L; s < std::min(lane + 2 * L, piece.count); ++s) fetch(row(s), length);
      k_.to_lanes({from, here, length, to + lane, nullptr, columns});
    }
  }

  int64_t rounded(int64_t count) const { return (count + k_.lanes - 1) / k_.lanes * k_.lanes; }

  void dots(int64_t group, const Piece* pieces, int64_t count) {
    const int64_t inputs = plan_.channels;
    std::vector<int64_t> before(count + 1, 0);  // columns
    for (int64_t p = 0; p < count; ++p) before[p + 1] = before[p] + rounded(pieces[p].count);
    T* x = x_.template take<T>(before[count] * inputs);
    T* dy = dy_.template take<T>(before[count] * plan_.rows);
    parallel_(count * 2, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t p = at / 2;
        if (at % 2)
          to_lanes(pieces[p], inputs, true, group, x + before[p] * inputs);
        else
          to_lanes(pieces[p], plan_.rows, false, group, dy + before[p] * plan_.rows);
      }
    });
    // A tile of the inputs, x of 64 samples and dw of so many rows, stays in L2 while all masks pass.
    const int64_t tile = pieces[0].lists->tile_inputs, tiles = pieces[0].lists->lists(group).tiles;
    const int64_t rows = std::max<int64_t>(32, (int64_t(128) << 10) / (tile * int64_t(sizeof(T))));
    parallel_((plan_.rows + rows - 1) / rows, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * rows;
        for (int64_t t = 0; t < tiles; ++t) {
          for (int64_t p = 0; p < count; ++p) {
            const Lists lists = pieces[p].lists->lists(group);
            Dots<T> m{};
            m.columns = rounded(pieces[p].count);
            m.x = x + before[p] * inputs;
            m.dy = dy + before[p] * plan_.rows + row * m.columns;
            m.starts = lists.starts + t * plan_.rows + row;
            m.index = lists.index;
            m.rows = std::min(rows, plan_.rows - row);
            m.g = gradient(pieces[p].mask, group) + row * inputs;
            m.g_row = inputs;
            if (pieces[p].first) {
              const int64_t from = t * tile, to = std::min(inputs, from + tile);
              for (int64_t r = 0; r < m.rows; ++r) std::fill(m.g + r * inputs + from, m.g + r * inputs + to, T(0));
            }
            k_.dots(m);
          }
        }
      }
    });
  }

  const Plan& plan_;
  const Batch& batch_;
  const Masks& masks_;
  const GradWeight<T>& call_;
  const Parallel& parallel_;
  const Kernels<T>& k_;
  Scratch x_, dy_;
};

}  // namespace

template <class T>
void grad_weight_linear(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
                        const Parallel& parallel) {
  LinearGradient<T>(plan, batch, masks, call, parallel).run();
}

template void grad_weight_linear(const Plan&, const Batch&, const Masks&, const GradWeight<float>&, const Parallel&);
template void grad_weight_linear(const Plan&, const Batch&, const Masks&, const GradWeight<double>&, const Parallel&);

}  // namespace rtl_kernels
