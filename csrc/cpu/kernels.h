// The inner loops, compiled once for every instruction set (level_*.cpp) and reached through a table of pointers.
//
// Nothing from std or torch is included here or in kernels_impl.h: an inline function of theirs, compiled with AVX-512
// flags in one file, could be the copy the linker keeps for all of them (one definition rule), and crash elsewhere.
#pragma once

#include <stdint.h>

namespace rtl_kernels {

// Output rows are taken in blocks of four, or of two where there are 16 registers (Kernels::block_rows); an input is filed
// under the pattern of the rows that keep it, a bit for each. Where a row keeps few inputs its blocks are of one row: 15
// buckets of one or two inputs each would cost more to enter than to do.

// Where one (channel, tap) lies: x from the column's address, w from the row's first weight; in elements.
struct Offset {
  int64_t x;
  int64_t w;
};

// One mask over `rows` outputs and all their inputs, in tiles of `tile_inputs` inputs: for every tile and block of rows
// the inputs it keeps, bucketed by pattern (1 .. 2^block_rows - 1), ascending inside.
struct Kept {
  const uint32_t* counts;  // (tiles, blocks, 2^block_rows): inputs of pattern p at [p], at [0] where indices start
  const uint16_t* index;   // inputs, relative to their tile
  int64_t tiles;
  int64_t tile_inputs;
  int64_t blocks;
  int64_t block_rows;  // 4, 2 or 1; 0: `blocks` rows with a list each (structure.h: Lists)
  int64_t first_tile;  // of Multiply: tiles before it have been added to y already

  void skip_rows(int64_t rows) { counts += block_rows ? (rows / block_rows) << block_rows : rows; }
};

// y[r][c] = act(s[r] · Σ_{kept (r, j)} w[r, j] · x[j][c] + b[r]) for columns 0..columns; s, b and act are applied with the
// last tile.
template <class T>
struct Multiply {
  Kept kept;
  const T* x;           // first column of the first input
  int64_t x_stride;     // input j lies at x + j · x_stride and its weight at j · w_stride
  int64_t w_stride;
  const T* w;
  int64_t w_row;        // elements between the weights of one row and the next
  const T* scale;       // of every row, or null: 1
  const T* bias;        // of every row, or null: 0
  bool relu;            // act; else none
  int64_t rows;
  T* y;
  int64_t y_row;
  int64_t columns;      // a multiple of the granule
  bool stream;          // y goes past the caches: all of it is aligned to whole cache lines, and there is one tile
  // What is needed next: the first `ahead_lines` cache lines from each of some addresses are fetched, a few with every
  // block of rows, from line `ahead_from` to `ahead_to`, counted address by address. Null: nothing is.
  const T* const* ahead;
  int64_t ahead_lines, ahead_from, ahead_to;
};

// A mask and the weights it keeps, for one layout of x, in the order the kernel reads them: for every tile and block of
// rows, and every pattern from 1 on, its inputs ascending, each as its distance from the column's address (an int64_t, in
// elements) and the weights of the rows that keep it.
template <class T>
struct Program {
  const uint32_t* counts;  // (tiles, blocks, patterns): inputs of pattern p at [p - 1]
  const T* entries;
  int64_t tiles;
  int64_t block_rows;      // 4, 2 or 1
};

// y[r][c] = act(s[r] · Σ_{kept (r, j)} w[r, j] · x[at(j) + c] + b[r]), on `lines` lines of `vectors` whole vectors of
// columns, x_line apart; y's follow one another.
template <class T>
struct Convolve {
  Program<T> program;
  const T* x;
  int64_t x_line;
  int64_t lines;        // 1; 2 only of single rows
  int64_t vectors;      // at most `vectors` of Kernels, `pair` of single rows
  const T* scale;       // of every row, or null: 1
  const T* bias;        // of every row, or null: 0
  bool relu;
  int64_t rows;
  T* y;
  int64_t y_row;
};

// g[r, j] += Σ_c dy[r][c] · x[j][c] over kept (r, j).
template <class T>
struct Correlate {
  Kept kept;
  const T* x;
  int64_t x_stride;
  const Offset* table;  // only .x is read: a gradient lies as the rows of the weight do
  const T* dy;
  int64_t dy_row;
  int64_t first_block;  // blocks [first_block, end_block) of rows
  int64_t end_block;
  T* g;
  int64_t g_row;
  int64_t columns;      // a multiple of the lanes
  int64_t segments;     // runs of columns, x_segment and dy_segment apart
  int64_t x_segment;
  int64_t dy_segment;
};

// g[r][i] (+)= Σ_s dy[s][r] · x[s][i] where the mask keeps (r, i), zero elsewhere, for a tile of at most outer_rows × outer_columns.
template <class T>
struct Outer {
  const T* x;      // (samples, outer_columns)
  const T* dy;     // (samples, height)
  int64_t height;  // a third, two thirds or all of outer_rows
  int64_t samples;
  int64_t rows;    // of g; not more than the height
  int64_t columns;
  const uint32_t* words;  // of the first row
  int64_t words_row;
  int64_t column;  // the first one's place among a row's bits
  bool first;      // g holds nothing yet
  T* g;
  int64_t g_row;
};

// One sample for Outer: x in strips of outer_columns, x_step apart, zero past its end, and dy in tiles of outer_rows,
// dy_step apart, the last one padded with zeros to whole thirds of that.
template <class T>
struct LayOut {
  const T* x;
  int64_t inputs;
  T* x_to;
  int64_t x_step;
  const T* dy;
  int64_t rows;
  T* dy_to;
  int64_t dy_step;
  T* dy_last;  // where the last tile goes
};

// g[r][j] += Σ_c dy[r][c] · x[j][c] for the inputs j of row r's list.
template <class T>
struct Dots {
  const T* x;   // (inputs, columns)
  const T* dy;  // (rows, columns)
  int64_t columns;  // a multiple of the lanes
  const uint32_t* starts;  // of one tile of structure.h's Lists
  const uint16_t* index;
  int64_t rows;
  T* g;
  int64_t g_row;
};

// y[s][o] = act(t[o] · Σ_i m[o, i] w[o][i] · x[s][i] + b[o]) of a few samples: the mask's words applied to whole vectors of
// weights.
template <class T>
struct Few {
  const T* const* x;
  T* const* y;
  int64_t samples;
  int64_t inputs;
  int64_t rows;
  const uint32_t* words;  // or null
  int64_t words_row;
  const T* w;
  int64_t w_row;
  const T* scale;  // or null
  const T* bias;   // or null
  bool relu;
};

// Samples as lanes: `count` <= lanes rows of `length` elements <-> one vector of lanes for every element, at
// `place[e]` elements from `lanes_at`, or at e · step where place is null (lanes past `count` are written as zeros, and not
// read). `planes` times, the rows `row_step` further and the lanes `lanes_step` each time.
template <class T>
struct Lanes {
  T* const* rows;
  int64_t count;
  int64_t length;
  T* lanes_at;
  const int64_t* place;
  int64_t step = 0;
  bool stream = false;  // rows written go past the caches: they are whole cache lines
  int64_t planes = 1;
  int64_t row_step = 0;
  int64_t lanes_step = 0;
};

// to[r][w · to_step] = from[r][w · from_step] for `rows` rows of `width` elements, the rows to_row and from_row apart.
template <class T>
struct Copy {
  const T* from;
  int64_t from_row, from_step;
  T* to;
  int64_t to_row, to_step;
  int64_t rows, width;
  bool stream = false;  // past the caches, if rows of a vector and more follow one another in `to`, and so do their elements
};

// Planes of a quarter of a vector, four samples at once, so that both sides move whole vectors: plane c of sample s lies at
// rows[s] + c · quarter, and at planes + c · step + s · quarter. Samples and planes (`count`) are multiples of four.
template <class T>
struct Quarters {
  T* const* rows;
  int64_t samples;
  int64_t count;
  T* planes;
  int64_t step;
};

// even[r][w / 2] = from[r][w] for the even w below `width`, odd[r][w / 2] for the odd ones.
template <class T>
struct Split {
  const T* from;
  int64_t from_row;
  T* even;
  T* odd;
  int64_t to_row;
  int64_t rows, width;
};

// Rows of `width` elements, `row` apart, of one channel's planes; or with `columns` of several channels', where every
// column has its own coefficients and sums.
template <class T>
struct Norm {
  const T* x;
  const T* dy;
  T* y;
  int64_t row, rows, width;
  bool columns;
  const T* a;
  const T* b;
  const T* c;
  double* first;
  double* second;
};

// One channel of one sample against its own filter: y[h][w] = act(bias + Σ_taps w[t] · x[h · x_row + at[t] + w]).
template <class T>
struct Filter {
  const T* x;
  int64_t x_row;
  const T* weights;  // kept taps only
  const int64_t* at;
  int64_t taps;
  T bias;
  bool relu;
  T* y;
  int64_t y_row;
  int64_t height;
  int64_t width;  // x is readable up to a whole vector past it
  bool stream;    // y goes past the caches: its rows are whole cache lines
};

// A tap that a channel's filter keeps: pixel p of a plane reads pixel p + at of the input, where bit p mod lanes of
// inside[p / lanes] is set, and nothing elsewhere.
template <class T>
struct FlatTap {
  const uint32_t* inside;
  int64_t at;
  int64_t tap;
  T weight;
};

// Channels against a filter each, at unit stride, planes as large as the input's: y[p] = act(bias + Σ_taps w · x[p + at]).
// Channel c is at c · pixels of every sample.
template <class T>
struct Flat {
  const T* const* x;
  T* const* y;
  int64_t samples;
  int64_t channels;
  int64_t pixels;  // of at most eight vectors
  const FlatTap<T>* taps;  // kept ones alone: a channel's from first[channel] to first[channel + 1]
  const int64_t* first;
  const T* bias;  // or null
  bool relu;
  bool stream;  // y goes past the caches: planes are whole cache lines
};

// g[tap] += Σ_samples Σ_p dy[p] · x[p + at] of one channel, for `count` taps.
template <class T>
struct FlatDots {
  const T* const* x;
  const T* const* dy;
  int64_t samples;
  int64_t plane;  // where the channel's lies in a sample
  int64_t pixels;
  const FlatTap<T>* taps;
  int64_t count;
  T* g;
};

// y[r][w] = act(y[r][w] + x[r][w]) for `rows` rows of `width` elements.
template <class T>
struct Add {
  const T* x;
  int64_t x_row;
  T* y;
  int64_t y_row;
  int64_t rows, width;
  bool relu;
};

template <class T>
struct Kernels {
  int lanes;
  int granule;        // of Multiply's columns: the lanes, or half of them
  int block_rows;     // of Multiply, Convolve and Correlate: 4 or 2
  int block_columns, list_columns;  // columns held in registers at once, of blocks of rows and of lists
  int pair;           // vectors of columns of a single row held at once, on each of two lines
  int outer_rows, outer_columns;
  void (*multiply)(const Multiply<T>&);
  void (*convolve)(const Convolve<T>&);
  void (*correlate)(const Correlate<T>&);
  void (*outer)(const Outer<T>&);
  void (*lay_out)(const LayOut<T>&);
  void (*dots)(const Dots<T>&);
  void (*few)(const Few<T>&);
  void (*fence)();  // after the last of a thread's results that went past the caches
  void (*to_lanes)(const Lanes<T>&);
  void (*from_lanes)(const Lanes<T>&);
  void (*copy)(const Copy<T>&);
  void (*gather_quarters)(const Quarters<T>&);   // to planes; these two: null where no quarter is worth it
  void (*scatter_quarters)(const Quarters<T>&);  // to rows
  void (*split)(const Split<T>&);
  void (*filter)(const Filter<T>&);
  void (*flat)(const Flat<T>&);           // these two: null where there are no loads of a part of a vector
  void (*flat_dots)(const FlatDots<T>&);
  void (*add)(const Add<T>&);
  void (*norm_sum)(const Norm<T>&);       // first += Σ x
  void (*norm_squares)(const Norm<T>&);   // first += Σ (x − a)²
  void (*norm_scale)(const Norm<T>&);     // y = x · a + b
  void (*norm_products)(const Norm<T>&);  // first += Σ dy, second += Σ dy · (x − a)
  void (*norm_grad)(const Norm<T>&);      // y = dy · a + x · b + c
};

struct Level {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

extern const Level kLevelBaseline;
#if defined(__x86_64__)
extern const Level kLevelAvx2;
extern const Level kLevelAvx512;
#endif

const Level& level();  // the one this process uses: dispatch.cpp

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return level().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return level().f64;
}

}  // namespace rtl_kernels
