// The on-chip stacks' kernels, each compiled in a file of its own: they take longest, and compile side by side.
#pragma once

#include "tile/stack_params.h"
#include "tile/stack_train.h"

namespace cips {

using StackForwardKernel = void (*)(StackParams, TensorMap);
using StackTrainKernel = void (*)(StackParams, TensorMap, StackSaved);
using StackChainKernel = void (*)(StackParams, TensorMap, StackGrads);

/// stack_fwd_kernel of bfloat16, otherwise of float16.
StackForwardKernel stack_kernel(bool bfloat16);

/// stack_blend_fwd_kernel for kMaxBlend styles of either.
StackForwardKernel stack_blend_kernel(bool bfloat16);

/// stack_train_fwd_kernel of either.
StackTrainKernel stack_train_kernel(bool bfloat16);

/// stack_chain_kernel of either.
StackChainKernel stack_chain_kernel_of(bool bfloat16);

}  // namespace cips
