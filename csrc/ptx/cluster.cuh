// Thread block clusters: rank and barrier.
#pragma once

#include <cstdint>

namespace cips {

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Number of this cluster in a one-dimensional grid.
__device__ __forceinline__ int cluster_index()
{
    int index;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}

/// blockIdx.x, asked for anew: what is made of it takes no register in between.
__device__ __forceinline__ uint32_t block_index()
{
    uint32_t index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

/// gridDim.x, likewise.
__device__ __forceinline__ uint32_t block_count()
{
    uint32_t count;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(count));
    return count;
}

/// How many clusters the grid has.
__device__ __forceinline__ int cluster_count()
{
    int count;
    asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return count;
}

__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/// Store at the same shared address of block `rank` of the cluster; seen there after cluster_sync.
__device__ __forceinline__ void store_cluster(uint32_t shared, uint32_t rank, float value)
{
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.f32 [remote], %2;\n"
        "}" ::"r"(shared),
        "r"(rank), "f"(value)
        : "memory");
}

}  // namespace cips
