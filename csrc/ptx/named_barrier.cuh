// Named barriers of a block (PTX bar): some warps arrive, others wait. Barrier 0 is __syncthreads'.
#pragma once

namespace cips {

/// Arrive without waiting; `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_wait(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace cips
