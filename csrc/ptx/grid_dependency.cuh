// Grids one behind the other that overlap: the second is put on multiprocessors while the first still runs, and waits
// itself for what the first writes. In a kernel launched in the ordinary way all of this does nothing.
#pragma once

#include <cstdint>

namespace cips {

/// Until the grid before has ended and all that it wrote can be seen. Nothing that a grid before writes may be read,
/// and nothing that one reads be written, in front of it; prefetches to L2, which copies nothing that could be stale,
/// may be.
__device__ __forceinline__ void grid_dependency_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// The grid behind may come as soon as every block of this one has said so, or has ended.
__device__ __forceinline__ void grid_dependents_come()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

constexpr int kPrefetchBytes = 128;  // a line

/// Brings bytes to L2, thread `thread` of `threads` its share.
__device__ __forceinline__ void prefetch_lines(const void* from, int64_t bytes, int64_t thread, int64_t threads)
{
    for (int64_t at = thread * kPrefetchBytes; at < bytes; at += threads * kPrefetchBytes) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
    }
}

}  // namespace cips
