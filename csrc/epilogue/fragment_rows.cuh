// A warpgroup's results as rows in memory, see tile/stack_train.h.
#pragma once

#include "ptx/cluster.cuh"
#include "tile/stack_params.h"

namespace cips {

/// Where this thread's 16 bytes of the first 32 channels of a chunk go, of rows g and g + 8.
struct FragmentRows {
    char* first;
    int32_t eight_rows;  // bytes
    int32_t channels;    // from the chunk's first on
    int32_t pixels;      // from row g on

    /// pixel: of row g, of `all`. row: its number among all of the tensor's. t: thread of the quad.
    __device__ __forceinline__ FragmentRows(char* base, int64_t row, int64_t pixel, int64_t all, int width, int chunk,
                                            int t)
        : first(base + (row * width + kChunk * chunk + 8 * t) * 2),
          eight_rows(16 * width),
          channels(width - kChunk * chunk),
          pixels(static_cast<int32_t>(all - pixel))
    {
    }

    /// v: the group's eight registers, A fragments of 32 channels.
    __device__ __forceinline__ void store(int group, const uint32_t* v) const
    {
        if (32 * group >= channels) return;
        char* line = first + 64 * group;
        if (pixels > 0) *reinterpret_cast<uint4*>(line) = make_uint4(v[0], v[2], v[4], v[6]);
        if (pixels > 8) *reinterpret_cast<uint4*>(line + eight_rows) = make_uint4(v[1], v[3], v[5], v[7]);
    }
};

/// The place of this thread's signs of chunk 0 of a unit's first layer.
template <typename Pixels>
__device__ __forceinline__ int64_t signs_place(const Pixels& at, int image_chunks)
{
    const int2 unit = at.unit();
    const int64_t tile =
        (int64_t{unit.x} * at.p.groups + unit.y) * (kCluster * kConsumers) + cluster_rank() * kConsumers;
    const uint32_t thread = at.thread_of_block();
    return (tile + thread / 128) * image_chunks * 128 + thread % 128;
}

}  // namespace cips
