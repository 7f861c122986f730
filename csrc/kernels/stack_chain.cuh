// The chain of gradients of one tile of pixels on chip: from the gradient of the colours down to that at the sums of
// layer 0, each layer's written once. The machinery is the forward's, run over the layers from last to first: what the
// registers hold is the gradient at a layer's sums, what comes through the ring are the transposed weights.
#pragma once

#include "epilogue/stack_chain_tail.cuh"
#include "tile/stack_consumer.cuh"

namespace cips {

/// Grid as stack_fwd_kernel. p: the chain's layers, see make_chain_plan; input_map: unused.
template <typename T>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStackThreads, 1)
    stack_chain_kernel(const __grid_constant__ StackParams p, const __grid_constant__ TensorMap input_map,
                       const __grid_constant__ StackGrads grads)
{
    extern __shared__ __align__(1024) char memory[];
    run_stack<StackConsumer<StackChainTail<T>>>(p, input_map, memory, grads);
}

}  // namespace cips
