// Copies by the copy engine (PTX cp.async.bulk): linear, multicast to a cluster, and by tensor map. Sizes and
// addresses are multiples of 16 bytes; the bytes that land are counted by the barrier. Stores go in groups.
#pragma once

#include <cstdint>

namespace cips {

__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

/// The same bytes to the same address in every block of `blocks`; each block's barrier at that address counts.
__device__ __forceinline__ void bulk_copy_multicast(uint32_t shared, const void* global, uint32_t bytes,
                                                    uint32_t barrier, uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier), "h"(blocks)
        : "memory");
}

/// A box of a 3-D tensor map at (column, row, plane), innermost first; what lies outside the tensor is zero.
__device__ __forceinline__ void tensor_copy(uint32_t shared, const void* map, int column, int row, int plane,
                                            uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier)
        : "memory");
}

/// The same to the same address in every block of `blocks`; each block's barrier at that address counts.
__device__ __forceinline__ void tensor_copy_multicast(uint32_t shared, const void* map, int column, int row, int plane,
                                                      uint32_t barrier, uint16_t blocks)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "h"(blocks)
        : "memory");
}

/// A box from shared memory to a 3-D tensor map at (column, row, plane); what lies outside the tensor is left out. The
/// box was ordered before by proxy_fence_shared.
__device__ __forceinline__ void tensor_store(const void* map, uint32_t shared, int column, int row, int plane)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
                 "r"(column), "r"(row), "r"(plane), "r"(shared)
                 : "memory");
}

/// Ends the thread's group of stores.
__device__ __forceinline__ void bulk_store_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until what the thread's stores read may be overwritten.
__device__ __forceinline__ void bulk_store_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace cips
