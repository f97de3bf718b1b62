// What the runner runs. counts[0] are the rows without a mask, counts[g] those of mask g − 1; kinds gives each mask's
// filling: 0 nothing, 1 everything, h half, s a tenth, b a half of some 32 × 32 blocks and nothing of the others.
#pragma once

#include <string>
#include <vector>

#include "launch.h"

struct LinearCase {
  std::string name;
  rtl::Type type;
  int64_t masks;
  std::vector<int64_t> counts;
  int64_t in, out;
  std::string kinds = "h";
  int64_t inner = 1;
  bool ordered = false;
  int64_t repeat = 1;
  bool untied = false, bias = false, summarised = false;
  int shift = 0;         // elements by which x, dy and weight miss 16-byte alignment
  int64_t x_stride = 0;  // of x and dy, if not dense
};

struct DepthwiseCase {
  std::string name;
  rtl::Type type;
  int64_t masks;
  std::vector<int64_t> counts;
  int64_t channels, in_h, in_w;
  int64_t kernel_h = 3, kernel_w = 3, stride_h = 1, stride_w = 1, pad = 1, dilation = 1, multiplier = 1;
  std::string kinds = "h";
  bool channel_major = false, ordered = false;
  int64_t repeat = 1;
  bool untied = false, bias = false, transposed = false;
  int64_t sample_stride = 0;
};

constexpr rtl::Type kTypes[] = {rtl::Type::kF32, rtl::Type::kTF32, rtl::Type::kF16, rtl::Type::kBF16};

inline std::string type_name(rtl::Type type) {
  const char* names[] = {"f32", "tf32", "f16", "bf16"};
  return names[int(type)];
}

// tiny: for sanitizers in a hurry and for planted bugs; quick: ≤ 128³; full: ≤ 256³; huge: strides past 2³¹ elements.
inline std::vector<LinearCase> linear_cases(const std::string& size) {
  std::vector<LinearCase> cases;
  for (rtl::Type type : kTypes) {
    const std::string t = type_name(type) + " ";
    const bool first = type == rtl::Type::kF32;
    LinearCase c{t, type, 1, {0, 1}, 8, 8};
    const auto add = [&](const std::string& name, auto change) {
      LinearCase each = c;
      each.name += name;
      change(each);
      cases.push_back(each);
    };
    if (size == "huge") {
      // Rows 8 and up lie beyond 2³¹ elements.
      if (type == rtl::Type::kF32 || type == rtl::Type::kF16)
        add("strided", [](auto& k) { k.masks = 2, k.counts = {0, 12, 20}, k.in = 32, k.out = 32, k.x_stride = int64_t(1) << 28, k.bias = true; });
      continue;
    }
    // Groups for both kernels, a mask of each kind, rows without a mask, samples in disorder.
    add("mixed", [](auto& k) {
      k.masks = 5, k.counts = {20, 3, 0, 70, 16, 17}, k.in = 64, k.out = 96, k.kinds = "h0b1s";
      k.ordered = k.bias = k.summarised = true;
    });
    // At least four steps in either direction, so that every stage of the pipeline is used again.
    add("deep", [](auto& k) { k.masks = 2, k.counts = {0, 33, 5}, k.in = 136, k.out = 136, k.kinds = "hb", k.summarised = true; });
    if (size == "tiny") {
      add("ragged", [](auto& k) { k.masks = 2, k.counts = {2, 19, 9}, k.in = 99, k.out = 37, k.bias = true; });
      if (!first) continue;
    }
    add("every", [](auto& k) { k.masks = 3, k.counts = {0, 21, 21, 21}, k.repeat = 3, k.in = 40, k.out = 72, k.kinds = "hs"; });
    add("untied", [](auto& k) {
      k.masks = 3, k.counts = {0, 40, 2, 18}, k.in = 64, k.out = 40, k.untied = k.bias = k.ordered = true;
    });
    if (size == "tiny") continue;
    add("ragged", [](auto& k) { k.masks = 3, k.counts = {5, 37, 9, 66}, k.in = 45, k.out = 67, k.bias = k.ordered = true; });
    add("one", [](auto& k) { k.masks = 1, k.counts = {0, 1}, k.in = 1, k.out = 1, k.kinds = "1", k.bias = true; });
    add("narrow", [](auto& k) { k.masks = 2, k.counts = {1, 30, 1}, k.in = 3, k.out = 130, k.summarised = true; });
    add("nothing kept", [](auto& k) { k.masks = 2, k.counts = {0, 20, 6}, k.in = 64, k.out = 64, k.kinds = "0", k.summarised = k.bias = true; });
    add("empty batch", [](auto& k) { k.masks = 2, k.counts = {0, 0, 0}, k.in = 32, k.out = 32; });
    add("only dense", [](auto& k) { k.masks = 2, k.counts = {50, 0, 0}, k.in = 64, k.out = 64, k.summarised = true; });
    add("inner", [](auto& k) { k.masks = 2, k.counts = {1, 2, 5}, k.inner = 7, k.in = 48, k.out = 24, k.ordered = k.bias = true; });
    add("misplaced", [](auto& k) { k.masks = 2, k.counts = {0, 5, 25}, k.in = 64, k.out = 64, k.shift = 1; });
    add("every untied", [](auto& k) { k.masks = 3, k.counts = {0, 6, 6, 6}, k.repeat = 3, k.inner = 3, k.in = 32, k.out = 32, k.untied = k.bias = true; });
    add("untied without mask", [](auto& k) { k.masks = 2, k.counts = {18, 3, 2}, k.in = 32, k.out = 32, k.untied = k.bias = true; });
    add("many masks", [](auto& k) {
      k.masks = 70, k.counts.assign(71, 2), k.counts[40] = 18, k.counts[66] = 0, k.in = 32, k.out = 32, k.ordered = true;
    });
    add("large", [](auto& k) { k.masks = 1, k.counts = {0, 128}, k.in = 96, k.out = 128, k.kinds = "b", k.summarised = k.ordered = true; });
    add("large down", [](auto& k) { k.masks = 1, k.counts = {0, 130}, k.in = 128, k.out = 64, k.bias = true; });
    if (size == "quick") continue;
    add("256", [](auto& k) {
      k.masks = 4, k.counts = {0, 130, 100, 20, 6}, k.in = 256, k.out = 256, k.kinds = "hbs1", k.ordered = k.summarised = k.bias = true;
    });
    add("256 ragged", [](auto& k) { k.masks = 2, k.counts = {31, 225, 0}, k.in = 255, k.out = 253, k.kinds = "sh", k.summarised = true; });
    add("256 one mask", [](auto& k) { k.masks = 1, k.counts = {0, 256}, k.in = 256, k.out = 256, k.summarised = true; });
    add("256 untied", [](auto& k) { k.masks = 2, k.counts = {0, 129, 127}, k.in = 256, k.out = 256, k.untied = k.bias = true; });
    add("wide", [](auto& k) { k.masks = 2, k.counts = {0, 14, 20}, k.in = 1100, k.out = 72, k.kinds = "sb", k.summarised = true; });
  }
  return cases;
}

inline std::vector<DepthwiseCase> depthwise_cases(const std::string& size) {
  std::vector<DepthwiseCase> cases;
  for (rtl::Type type : kTypes) {
    if (type == rtl::Type::kTF32) continue;
    const std::string t = type_name(type) + " depthwise ";
    DepthwiseCase c{t, type, 2, {0, 1, 1}, 4, 5, 5};
    const auto add = [&](const std::string& name, auto change) {
      DepthwiseCase each = c;
      each.name += name;
      change(each);
      cases.push_back(each);
    };
    if (size == "huge") {
      add("strided", [](auto& k) { k.counts = {0, 5, 7}, k.sample_stride = int64_t(1) << 28; });
      continue;
    }
    add("mixed", [](auto& k) {
      k.masks = 4, k.counts = {2, 3, 0, 4, 1}, k.channels = 7, k.in_h = 9, k.in_w = 8, k.kinds = "hs01", k.ordered = k.bias = true;
    });
    add("channel-major", [](auto& k) {
      k.masks = 3, k.counts = {1, 35, 0, 9}, k.channels = 3, k.in_h = 4, k.in_w = 5, k.channel_major = true;
    });
    add("every", [](auto& k) { k.masks = 3, k.counts = {0, 4, 4, 4}, k.repeat = 3, k.channels = 5, k.in_h = 6, k.in_w = 6; });
    add("5x5", [](auto& k) {
      k.counts = {0, 2, 3}, k.channels = 3, k.in_h = 9, k.in_w = 11, k.kernel_h = k.kernel_w = 5, k.pad = 2, k.stride_h = k.stride_w = 2;
    });
    add("transposed every", [](auto& k) {
      k.masks = 3, k.counts = {0, 2, 2, 2}, k.repeat = 3, k.channels = 2, k.multiplier = 3, k.in_h = 7, k.in_w = 6, k.stride_h = 2, k.stride_w = 3;
      k.transposed = k.bias = true;
    });
    if (size == "tiny") continue;
    add("transposed", [](auto& k) {
      k.counts = {2, 3, 1}, k.channels = 5, k.in_h = 9, k.in_w = 8, k.kernel_h = 2, k.pad = 1, k.dilation = 2, k.transposed = k.bias = k.ordered = true;
    });
    add("transposed untied", [](auto& k) {
      k.counts = {0, 3, 1}, k.channels = 3, k.multiplier = 2, k.in_h = 9, k.in_w = 8, k.transposed = k.bias = k.untied = k.channel_major = true;
    });
    // More filters to a channel than are staged at a time.
    add("wide multiplier", [](auto& k) { k.counts = {0, 1, 2}, k.channels = 2, k.multiplier = 130, k.in_h = 4, k.in_w = 5, k.kernel_h = k.kernel_w = 4, k.pad = 2; });
    add("wide multiplier every", [](auto& k) { k.counts = {0, 1, 1}, k.repeat = 2, k.channels = 1, k.multiplier = 229, k.in_h = 3, k.in_w = 3; });
    add("stride", [](auto& k) { k.counts = {1, 2, 2}, k.channels = 4, k.in_h = 10, k.in_w = 13, k.stride_h = 1, k.stride_w = 2, k.pad = 0, k.bias = true; });
    add("multiplier", [](auto& k) { k.counts = {1, 2, 2}, k.channels = 3, k.multiplier = 3, k.in_h = 6, k.in_w = 7, k.dilation = 2, k.pad = 2, k.ordered = true; });
    add("untied", [](auto& k) { k.counts = {0, 2, 3}, k.channels = 6, k.in_h = 7, k.in_w = 7, k.untied = k.bias = true; });
    add("7x7", [](auto& k) { k.counts = {0, 2, 1}, k.channels = 2, k.in_h = 8, k.in_w = 9, k.kernel_h = k.kernel_w = 7, k.pad = 3, k.bias = true; });
    add("1x1", [](auto& k) { k.masks = 1, k.counts = {0, 3}, k.channels = 33, k.in_h = k.in_w = 1, k.kernel_h = k.kernel_w = 1, k.pad = 0; });
    add("plane", [](auto& k) { k.masks = 1, k.counts = {0, 1}, k.channels = 1, k.in_h = 70, k.in_w = 66; });
    add("empty batch", [](auto& k) { k.counts = {0, 0, 0}; });
    add("every channel-major", [](auto& k) {
      k.masks = 2, k.counts = {0, 34, 34}, k.repeat = 2, k.channels = 2, k.in_h = 3, k.in_w = 4, k.channel_major = true, k.untied = true;
    });
    if (size == "quick") continue;
    add("72", [](auto& k) {
      k.masks = 10, k.counts = {0, 3, 3, 3, 0, 3, 3, 3, 3, 3, 3}, k.channels = 72, k.in_h = k.in_w = 16, k.kinds = "sh", k.ordered = true;
    });
    add("72 channel-major", [](auto& k) {
      k.masks = 4, k.counts = {0, 16, 48, 3, 40}, k.channels = 40, k.in_h = k.in_w = 8, k.channel_major = true, k.ordered = true, k.bias = true;
    });
  }
  return cases;
}

// No order, no repeats, no strides: groups stand one behind the other.
inline std::vector<LinearCase> invariance_cases() {
  std::vector<LinearCase> cases;
  for (rtl::Type type : kTypes) {
    for (const bool untied : {false, true}) {
      LinearCase c{type_name(type) + (untied ? " untied" : " shared"), type, 4, {untied ? 0 : 21, 5, 140, 16, 33}, 72, 136};
      c.kinds = "hb1s";
      c.bias = c.summarised = true;
      c.untied = untied;
      cases.push_back(c);
    }
  }
  return cases;
}
