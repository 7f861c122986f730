// What a consumer warpgroup of stack_fwd_kernel does between products: how a chunk starts, ends, waits and leaves.
#pragma once

#include "epilogue/leaky_relu.cuh"
#include "epilogue/stack_parts.cuh"
#include "tile/stack_table_rows.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct StackTail : StackParts<T, StackShape<1>> {
    using Parts = StackParts<T, StackShape<1>>;
    using Parts::a;
    using Parts::acc;
    using Parts::add_colours;
    using Parts::end_chunk;
    using Parts::image;
    using Parts::lane;
    using Parts::noise_strength;
    using Parts::of_record;
    using Parts::p;
    using Parts::park;
    using Parts::pixel;
    using Parts::thread;
    using Parts::wait_for_record;
    using Parts::warpgroup;
    using typename Parts::Shape;
    using Rows = TableRows<T>;

    static constexpr bool kInput = true;  // layer 0 has products
    static constexpr bool kSkips = true;  // serves residual blocks

    float rgb[4];  // rows g and g + 8, colours 2 t and 2 t + 1

    __device__ __forceinline__ StackTail(const StackParams& params, uint32_t base) : Parts(params, base) {}

    __device__ __forceinline__ void find_blend() {}
    __device__ __forceinline__ static float keep_noise(float drawn) { return drawn; }

    __device__ __forceinline__ void make_input() { Parts::make_input({}); }

    /// Accumulators start as bias + strength * noise.
    __device__ __forceinline__ void start_chunk(const StackLayer&, int, float noise0, float noise1)
    {
        wait_for_record();
        const float strength = noise_strength();
        noise0 *= strength;
        noise1 *= strength;
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            const float4 v = of_record(Shape::kBias + 16 * (lane % 4) + 64 * q);
            acc[8 * q + 0] = v.x + noise0;
            acc[8 * q + 1] = v.y + noise0;
            acc[8 * q + 2] = v.x + noise1;
            acc[8 * q + 3] = v.y + noise1;
            acc[8 * q + 4] = v.z + noise0;
            acc[8 * q + 5] = v.w + noise0;
            acc[8 * q + 6] = v.z + noise1;
            acc[8 * q + 7] = v.w + noise1;
        }
    }

    /// Activation, skip, ToRGB, and the result to where it waits: the last chunk to the last two positions, another
    /// parked.
    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool keep, int)
    {
        uint32_t local[32];
        uint32_t* q = kLast ? a + 16 * (kRegisterSlabs - 2) : local;
#pragma unroll
        for (int j = 0; j < 32; ++j) q[j] = leaky_relu_pair<T>(acc[2 * j], acc[2 * j + 1], p.slope_pair);
        if (l.adds_skip != kNoSkip) {
            const uint32_t factor = l.adds_skip == kHalved ? p.half_pair : pack_pair(1.0f, 1.0f, T());
#pragma unroll
            for (int s = 0; s < 8; ++s) {
                const uint4 v = *kept((kLast ? 4 * (kRegisterSlabs - 2) : 8 * chunk) + s);
                q[4 * s + 0] = fma_pair<T>(v.x, factor, q[4 * s + 0]);
                q[4 * s + 1] = fma_pair<T>(v.y, factor, q[4 * s + 1]);
                q[4 * s + 2] = fma_pair<T>(v.z, factor, q[4 * s + 2]);
                q[4 * s + 3] = fma_pair<T>(v.w, factor, q[4 * s + 3]);
            }
        }
        if (!kLast && keep) {
#pragma unroll
            for (int s = 0; s < 8; ++s) park(8 * chunk + s, q + 4 * s);
        }
        if (l.rgb) add_colours(rgb, q);
        end_chunk();
    }

    /// Where four registers of a residual block's skip wait in memory, step 4 i + k for position i: each thread writes
    /// and reads its own, so that nobody waits for another.
    __device__ __forceinline__ uint4* kept(int step) const
    {
        char* mine = p.kept + (int64_t{blockIdx.x} * kConsumers + warpgroup) * kKeptBytes + thread * 16;
        return reinterpret_cast<uint4*>(mine + step * 2048);
    }

    __device__ __forceinline__ void keep_input() const
    {
#pragma unroll
        for (int s = 0; s < 4 * kRegisterSlabs; ++s) {
            *kept(s) = make_uint4(a[4 * s], a[4 * s + 1], a[4 * s + 2], a[4 * s + 3]);
        }
    }

    /// A chunk of the skip's product: the chunk of the block's output that it will be added to.
    __device__ __forceinline__ void keep_chunk(int chunk, int chunks)
    {
        const int first = chunk + 1 < chunks ? 8 * chunk : 4 * (kRegisterSlabs - 2);
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            *kept(first + s) = make_uint4(
                pack_pair(acc[8 * s + 0], acc[8 * s + 1], T()), pack_pair(acc[8 * s + 2], acc[8 * s + 3], T()),
                pack_pair(acc[8 * s + 4], acc[8 * s + 5], T()), pack_pair(acc[8 * s + 6], acc[8 * s + 7], T()));
        }
        end_chunk();
    }

    __device__ __forceinline__ void start_colours()
    {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int c = 2 * (lane % 4) + j % 2;
            rgb[j] = c < p.channels ? __ldg(p.rgb_bias + c) : 0.0f;
        }
    }

    __device__ __forceinline__ void store() const
    {
        const int t = lane % 4;
        float* out = p.rgb + image() * p.rgb_batch_stride + 2 * t * p.rgb_channel_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t at_pixel = pixel() + 8 * (j / 2);
            if (2 * t + j % 2 < p.channels && at_pixel < p.places.pixels) {
                out[at_pixel * p.rgb_pixel_stride + j % 2 * p.rgb_channel_stride] = rgb[j];
            }
        }
    }
};

}  // namespace cips
