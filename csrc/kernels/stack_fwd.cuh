// The whole stack of one tile of pixels on chip: input from coordinates or memory, every modulated layer with bias,
// noise and leaky ReLU, the ToRGB sums out. Activations never leave the multiprocessor.
#pragma once

#include "epilogue/stack_tail.cuh"
#include "tile/stack_consumer.cuh"

namespace cips {

/// Grid: clusters of kCluster blocks of kStackThreads threads, as many as fit; each takes units in turn.
/// input_map: of the streamed inputs, [B or 1][P][streamed channels]; unused without them.
template <typename T>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStackThreads, 1)
    stack_fwd_kernel(const __grid_constant__ StackParams p, const __grid_constant__ TensorMap input_map)
{
    extern __shared__ __align__(1024) char memory[];
    run_stack<StackConsumer<StackTail<T>>>(p, input_map, memory);
}

}  // namespace cips
