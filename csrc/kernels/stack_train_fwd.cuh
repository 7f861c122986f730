// The on-chip forward for training: stack_fwd_kernel, which also keeps every layer's output and its signs in memory.
#pragma once

#include "epilogue/stack_train_tail.cuh"
#include "tile/stack_consumer.cuh"

namespace cips {

/// Grid and input_map as stack_fwd_kernel.
template <typename T>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStackThreads, 1)
    stack_train_fwd_kernel(const __grid_constant__ StackParams p, const __grid_constant__ TensorMap input_map,
                           const __grid_constant__ StackSaved saved)
{
    extern __shared__ __align__(1024) char memory[];
    run_stack<StackConsumer<StackTrainTail<T>>>(p, input_map, memory, saved);
}

}  // namespace cips
