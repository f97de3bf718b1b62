// What every CPU of the architecture can run: SSE2 on x86-64, NEON on aarch64.
#define RTL_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RTL_LEVEL neon
#define RTL_REGISTERS 32
#else
#define RTL_LEVEL baseline
#define RTL_REGISTERS 16
#endif
#include "kernels_impl.h"

#define RTL_NAME_OF(level) #level
#define RTL_NAME(level) RTL_NAME_OF(level)

namespace rtl_kernels {
const Level kLevelBaseline = {RTL_NAME(RTL_LEVEL), RTL_LEVEL::table<float>(), RTL_LEVEL::table<double>()};
}
