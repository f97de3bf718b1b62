// Which instruction set's kernels run (kernels.h: level()), and which others could.
#pragma once

#include <string>
#include <vector>

namespace rtl_kernels {

// Names of the levels that this CPU can run, best first.
std::vector<std::string> available_levels();

}  // namespace rtl_kernels
