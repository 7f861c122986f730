// Compiles stack_chain_kernel.

#include "kernels/stack_chain.cuh"
#include "launch/stack_kernels.h"

namespace cips {

StackChainKernel stack_chain_kernel_of(bool bfloat16)
{
    return bfloat16 ? stack_chain_kernel<__nv_bfloat16> : stack_chain_kernel<__half>;
}

}  // namespace cips
