// The on-chip stack's forward kernels, each compiled in a file of its own: they take longest, and compile side by side.
#pragma once

#include "tile/stack_params.h"

namespace cips {

using StackForwardKernel = void (*)(StackParams, TensorMap);

/// stack_fwd_kernel of bfloat16, otherwise of float16.
StackForwardKernel stack_kernel(bool bfloat16);

/// stack_blend_fwd_kernel for kMaxBlend styles of either.
StackForwardKernel stack_blend_kernel(bool bfloat16);

}  // namespace cips
