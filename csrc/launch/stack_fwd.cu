// Compiles stack_fwd_kernel.

#include "kernels/stack_fwd.cuh"
#include "launch/stack_kernels.h"

namespace cips {

StackForwardKernel stack_kernel(bool bfloat16)
{
    return bfloat16 ? stack_fwd_kernel<__nv_bfloat16> : stack_fwd_kernel<__half>;
}

}  // namespace cips
