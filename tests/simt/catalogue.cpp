// Prints every kernel of csrc/cuda: name, threads of a block, bytes of shared memory, the function's name in C++.
#include <cstdio>
#include <cstring>
#include <string>

#include "kernels.cuh"

template <auto kKernel>
std::string spelled() {
  const std::string text = __PRETTY_FUNCTION__;
  const size_t first = text.find("kKernel = ") + 10;
  return text.substr(first, text.rfind("; std::string") - first);
}

int main() {
#define RTL_PRINT(name, threads, shared, ...) \
  std::printf("%s\t%d\t%d\t%s\n", name, int(threads), int(shared), spelled<&__VA_ARGS__>().c_str());
  RTL_KERNELS(RTL_PRINT)
  return 0;
}
