// The pixels of a consumer warpgroup of stack_fwd_kernel: which they are, where they lie, and their noise.
#pragma once

#include "epilogue/noise.cuh"
#include "ptx/cluster.cuh"
#include "tile/pixel_coordinates.cuh"
#include "tile/stack_params.h"

namespace cips {

struct StackPixels {
    const StackParams& p;
    const uint32_t shared;
    const int thread, lane, warpgroup;
    uint32_t place;  // see find_place

    __device__ __forceinline__ StackPixels(const StackParams& params, uint32_t base)
        : p(params), shared(base), thread(threadIdx.x % 128), lane(threadIdx.x % 32), warpgroup(threadIdx.x / 128)
    {
    }

    /// threadIdx.x, asked for anew: an address kept in a register is one too many.
    __device__ __forceinline__ static uint32_t thread_of_block()
    {
        uint32_t index;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
        return index;
    }

    /// Once a block, before the warpgroups part.
    __device__ __forceinline__ static void keep_seed(const StackParams& p, uint32_t shared)
    {
        const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(__ldg(p.seed));
        asm volatile("st.shared.b64 [%0], %1;" ::"r"(shared + kSeedOffset), "l"(seed) : "memory");
    }

    /// Image and group of the unit in hand wait in shared memory: registers are scarcer.
    __device__ __forceinline__ int2 unit() const
    {
        int2 value;
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(value.x), "=r"(value.y)
                     : "r"(unit_address())
                     : "memory");
        return value;
    }

    /// The unit `steps` after that of group `group` of image `image`. Returns whether there is one.
    __device__ __forceinline__ bool set_unit(int image, int group, int steps) const
    {
        group += steps;
        while (group >= p.groups) {
            group -= p.groups;
            ++image;
        }
        __syncwarp();
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(unit_address()), "r"(image), "r"(group) : "memory");
        __syncwarp();
        return image < p.images;
    }

    __device__ __forceinline__ uint32_t unit_address() const { return shared + kUnitOffset + threadIdx.x / 32 * 8; }

    __device__ __forceinline__ int image() const { return unit().x; }

    /// Pixel of row g; row g + 8 is eight pixels on.
    __device__ __forceinline__ int64_t pixel() const
    {
        const int row = threadIdx.x / 32 * kWarpPixels + lane / 4;
        return int64_t{unit().y} * kGroupPixels + cluster_rank() * kBlockPixels + row;
    }

    /// A quad keeps the places of its two rows, half a place a thread: of row g + 8 (t % 2), x where t / 2 is 0,
    /// otherwise y, as bits; where there are no coordinates, the low or the high word of the pixel's number.
    __device__ __forceinline__ void find_place()
    {
        const int64_t mine = min(pixel() + 8 * (lane % 2), p.places.pixels - 1);
        const bool second = lane & 2;
        if (p.places.coords != nullptr || p.places.grid_columns > 0) {
            place = __float_as_uint(pixel_coordinate(p.places, image(), mine, second));
        } else {
            place = static_cast<uint32_t>((p.places.first_pixel + mine) >> (second ? 32 : 0));
        }
    }

    /// Half of the place of row g + 8 `row`.
    __device__ __forceinline__ uint32_t half_place(int row, int second) const
    {
        return __shfl_sync(~0u, place, lane - lane % 4 + row + 2 * second);
    }

    /// Coordinates of row g + 8 `row`.
    __device__ __forceinline__ float2 place_of(int row) const
    {
        return make_float2(__uint_as_float(half_place(row, 0)), __uint_as_float(half_place(row, 1)));
    }

    /// Noise of one layer at this thread's row g + 8 (t % 2). All that it needs is near at hand: two warpgroups wait
    /// for it at the start of every second layer.
    __device__ __forceinline__ float draw(int index) const
    {
        if (p.noise_mode == StackNoise::kNone) return 0.0f;
        if (p.noise_mode == StackNoise::kGiven) {
            const int64_t mine = min(pixel() + 8 * (lane % 2), p.places.pixels - 1);
            if (index >= p.depth) return 0.0f;
            return __ldg(p.noise + index * p.noise_layer_stride + image() * p.noise_batch_stride + mine);
        }
        uint32_t c0 = half_place(lane % 2, 0), c1 = half_place(lane % 2, 1);
        if (p.noise_mode == StackNoise::kCoords) {
            c0 = __float_as_uint(__uint_as_float(c0) + 0.0f);  // adding +0 turns -0 into +0: one point, one noise
            c1 = __float_as_uint(__uint_as_float(c1) + 0.0f);
        }
        uint32_t key0, key1;
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(key0), "=r"(key1)
                     : "r"(shared + kSeedOffset)
                     : "memory");
        return normal_noise(key0, key1, c0, c1, p.first_image + image(), p.first_layer + index);
    }
};

}  // namespace cips
