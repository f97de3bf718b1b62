// Compiled with avx512 flags (setup.py); reached only where dispatch.cpp finds the CPU able to.
#if defined(__x86_64__)
#define RTL_LEVEL avx512
#define RTL_VECTOR_BYTES 64
#define RTL_REGISTERS 32
#include "kernels_impl.h"

namespace rtl_kernels {
const Level kLevelAvx512 = {"avx512", avx512::table<float>(), avx512::table<double>()};
}
#endif
