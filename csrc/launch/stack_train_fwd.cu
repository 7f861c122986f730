// Compiles stack_train_fwd_kernel.

#include "kernels/stack_train_fwd.cuh"
#include "launch/stack_kernels.h"

namespace cips {

StackTrainKernel stack_train_kernel(bool bfloat16)
{
    return bfloat16 ? stack_train_fwd_kernel<__nv_bfloat16> : stack_train_fwd_kernel<__half>;
}

}  // namespace cips
