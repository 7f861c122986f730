// Order between ordinary accesses to memory and those of the copy engine (PTX fence.proxy.async).
#pragma once

namespace cips {

/// What this thread wrote to global memory is there for copies that are started behind a barrier after it.
__device__ __forceinline__ void proxy_fence_global()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/// The same of what it wrote to shared memory.
__device__ __forceinline__ void proxy_fence_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace cips
