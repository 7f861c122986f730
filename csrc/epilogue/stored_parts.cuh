// What a consumer warpgroup of the stacks for training has: every chunk's results leave for memory by the copy engine,
// from the parking area, where all but the last wait anyway. See tile/stack_train.h for how they lie.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/proxy_fence.cuh"
#include "tile/stack_train.h"

namespace cips {

/// Base: StackParts, or what is made of it. A warp parks a chunk as the box that leaves, its rows of kChunk channels.
template <typename Base>
struct StoredParts : Base {
    using Base::a;
    using Base::Base;
    using Base::lane;
    using Base::p;
    using typename Base::Shape;

    /// Where the warp's rows of a chunk wait.
    __device__ __forceinline__ uint32_t parked_box(int place) const
    {
        return this->shared + threadIdx.x / 32 * (Shape::kParkBytes / 4) + place * kBoxBytes;
    }

    /// Where this thread's part of row g of a chunk's first 32 channels waits.
    __device__ __forceinline__ uint32_t parked_row() const
    {
        return parked_box(0) + lane / 4 * kRowBytes + lane % 4 * 16;
    }

    /// Before anything is parked: what was at its place has left.
    __device__ __forceinline__ void wait_until_stored() const
    {
        if (lane == 0) bulk_store_wait_read();
        __syncwarp();
    }

    __device__ __forceinline__ void settle() const { wait_until_stored(); }

    /// v: eight registers, A fragments of 32 channels.
    __device__ __forceinline__ void park_rows(int place, int group, const uint32_t* v) const
    {
        const uint32_t at = parked_row() + place * kBoxBytes + group * 64;
        this->store_shared(at, v[0], v[2], v[4], v[6]);
        this->store_shared(at + 8 * kRowBytes, v[1], v[3], v[5], v[7]);
    }

    /// Registers of a position, from the place `from` in the parking area.
    __device__ __forceinline__ void reload(int position, int from)
    {
        const uint32_t at = parked_row() + from / 2 * kBoxBytes + from % 2 * 128;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = 16 * position + 8 * (k / 2) + k % 2;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[i]), "=r"(a[i + 2]), "=r"(a[i + 4]), "=r"(a[i + 6])
                         : "r"(at + k / 2 * 64 + k % 2 * 8 * kRowBytes)
                         : "memory");
        }
    }

    /// The parked rows of a chunk to a layer's map. Behind it all of the warp may read them.
    __device__ __forceinline__ void store_rows(const TensorMap& map, int place, int chunk) const
    {
        proxy_fence_shared();
        __syncwarp();
        if (lane == 0) {
            const int2 unit = this->unit();
            const int row = unit.y * kGroupPixels + static_cast<int>(cluster_rank()) * kBlockPixels +
                            static_cast<int>(this->thread_of_block()) / 32 * kWarpPixels;
            tensor_store(&map, parked_box(place), chunk * kChunk, row, unit.x);
            bulk_store_commit();
        }
    }

    /// The place of this thread's signs of chunk 0 of a unit's first layer.
    __device__ __forceinline__ int64_t signs_place(int image_chunks) const
    {
        const int2 unit = this->unit();
        const int64_t tile =
            (int64_t{unit.x} * p.groups + unit.y) * (kCluster * kConsumers) + cluster_rank() * kConsumers;
        const uint32_t thread = this->thread_of_block();
        return (tile + thread / 128) * image_chunks * 128 + thread % 128;
    }

private:
    static constexpr int kRowBytes = 2 * kChunk, kBoxBytes = kWarpPixels * kRowBytes;
};

}  // namespace cips
