// stack_fwd_kernel for a style a pixel, a blend of up to kStyles of its image.
#pragma once

#include "epilogue/stack_blend_tail.cuh"
#include "tile/stack_halves.cuh"

namespace cips {

/// Grid and input_map as stack_fwd_kernel's. One image's weights serve all: they are not modulated.
template <typename T, int kStyles>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStackThreads, 1)
    stack_blend_fwd_kernel(const __grid_constant__ StackParams p, const __grid_constant__ TensorMap input_map)
{
    extern __shared__ __align__(1024) char memory[];
    run_stack<StackHalves<StackBlendTail<T, kStyles>>>(p, input_map, memory);
}

}  // namespace cips
