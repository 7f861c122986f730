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

/// Until every block of the cluster runs; orders nothing but the inits of barriers fenced before. (The release of
/// cluster_sync waits for whatever is under way to memory, a microsecond.)
__device__ __forceinline__ void cluster_meet()
{
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

/// The address in block `rank` of what this one has at a shared address.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, uint32_t rank)
{
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

/// Store at a cluster address, four bytes of what the barrier of that block waits for.
__device__ __forceinline__ void store_cluster(uint32_t remote, float value, uint32_t barrier)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(remote), "f"(value),
                 "r"(barrier)
                 : "memory");
}

}  // namespace cips
