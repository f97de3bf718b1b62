// Compiled with avx2 flags (setup.py); reached only where dispatch.cpp finds the CPU able to.
#if defined(__x86_64__)
#define RTL_LEVEL avx2
#define RTL_VECTOR_BYTES 32
#define RTL_REGISTERS 16
#include "kernels_impl.h"

namespace rtl_kernels {
const Level kLevelAvx2 = {"avx2", avx2::table<float>(), avx2::table<double>()};
}
#endif
