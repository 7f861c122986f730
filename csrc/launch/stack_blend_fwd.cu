// Compiles stack_blend_fwd_kernel.

#include "kernels/stack_blend_fwd.cuh"
#include "launch/stack_kernels.h"

namespace cips {

StackForwardKernel stack_blend_kernel(bool bfloat16)
{
    return bfloat16 ? stack_blend_fwd_kernel<__nv_bfloat16, kMaxBlend> : stack_blend_fwd_kernel<__half, kMaxBlend>;
}

}  // namespace cips
