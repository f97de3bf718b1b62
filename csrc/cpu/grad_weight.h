// Weight gradients of linear layers, apart from those of convolutions (grad_weight.cpp chooses).
#pragma once

#include "operators.h"

namespace rtl_kernels {

// As `grad_weight`, of a linear plan: dw need hold nothing.
template <class T>
void grad_weight_linear(const Plan& plan, const Batch& batch, const Masks& masks, const GradWeight<T>& call,
                        const Parallel& parallel);

}  // namespace rtl_kernels
