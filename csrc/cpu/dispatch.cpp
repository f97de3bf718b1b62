// Which instruction set's kernels this process uses: the best one the CPU has, or a lower one that
// RTL_KERNELS_CPU_LEVEL names (avx512, avx2, baseline; neon on aarch64).
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace rtl_kernels {
namespace {

const Level* const kLevels[] = {
#if defined(__x86_64__)
    &kLevelAvx512, &kLevelAvx2,
#endif
    &kLevelBaseline};

bool available([[maybe_unused]] const Level& candidate) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // checks what the operating system saves too
  if (&candidate == &kLevelAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&candidate == &kLevelAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const Level* choose() {
  const char* wanted = std::getenv("RTL_KERNELS_CPU_LEVEL");
  for (const Level* candidate : kLevels)
    if (available(*candidate) && (!wanted || !*wanted || std::string(wanted) == candidate->name)) return candidate;
  std::string names;
  for (const std::string& name : available_levels()) names += (names.empty() ? "" : ", ") + name;
  throw std::runtime_error("RTL_KERNELS_CPU_LEVEL is '" + std::string(wanted) + "', expected one of " + names);
}

}  // namespace

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level* candidate : kLevels)
    if (available(*candidate)) names.push_back(candidate->name);
  return names;
}

const Level& level() {
  static const Level* const chosen = choose();
  return *chosen;
}

}  // namespace rtl_kernels
