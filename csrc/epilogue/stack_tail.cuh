// What a consumer warpgroup of stack_fwd_kernel does between products: the registers and how a chunk starts, ends,
// waits and leaves.
#pragma once

#include "epilogue/leaky_relu.cuh"
#include "epilogue/stack_pixels.cuh"
#include "ptx/wgmma.cuh"
#include "tile/stack_input.cuh"
#include "tile/stack_ring.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct StackTail : StackPixels {
    const StackBarriers bars;
    uint32_t chunks = 0;  // worked off so far, over all tiles: the number of the record in hand
    StackInput a;         // the layer's input, 16 registers a position
    float acc[64];
    float rgb[4];  // rows g and g + 8, colours 2 t and 2 t + 1

    __device__ __forceinline__ StackTail(const StackParams& params, uint32_t base)
        : StackPixels(params, base), bars(base)
    {
    }

    __device__ __forceinline__ uint32_t parked(int step) const
    {
        return shared + warpgroup * kParkBytes + thread * 16 + step * 2048;
    }

    __device__ __forceinline__ uint32_t record() const { return shared + kRecordOffset + (chunks & 1) * kRecordBytes; }

    /// Accumulators start as bias + strength * noise.
    __device__ __forceinline__ void start_chunk(float noise0, float noise1)
    {
        mbarrier_wait(bars.record_full + 8 * (chunks & 1), chunks >> 1 & 1);
        const uint32_t bias = record() + kRecordBias + 16 * (lane % 4);
        float strength;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(strength) : "r"(record() + kRecordStrength) : "memory");
        noise0 *= strength;
        noise1 *= strength;
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            float4 v;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                         : "r"(bias + 64 * q)
                         : "memory");
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

    __device__ __forceinline__ void end_chunk()
    {
        if (lane == 0) mbarrier_arrive(bars.record_empty + 8 * (chunks & 1));
        ++chunks;
    }

    __device__ __forceinline__ void park(int step, const uint32_t* v) const
    {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(parked(step)), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                     "r"(v[3])
                     : "memory");
    }

    /// Registers of a position, from the place `from` in the parking area.
    __device__ __forceinline__ void reload(int position, int from)
    {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = 16 * position + 4 * k;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[i]), "=r"(a[i + 1]), "=r"(a[i + 2]), "=r"(a[i + 3])
                         : "r"(parked(4 * from + k))
                         : "memory");
        }
    }

    /// Slabs of the input of layer 0, into the parking area. A loop cannot number registers; unrolled, the instructions
    /// that a tile needs once would have to come from L2 each time, and took 16,000 cycles.
    __device__ __forceinline__ void park_input(int first, int end)
    {
#pragma unroll 1
        for (int slab = first; slab < end; ++slab) {
            uint32_t v[16];
            if (p.fourier != nullptr) {
                encode_slab<T>(v, slab, p, lane % 4, place_of(0), place_of(1));
            } else {
                load_slab(v, slab, p, lane % 4, image(), pixel());
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) park(4 * (slab - first) + k, v + 4 * k);
        }
    }

    /// The input of layer 0 that registers hold.
    __device__ __forceinline__ void make_input()
    {
        constexpr int kParked = 2 * kParkedChunks;  // slabs that the parking area holds
        park_input(0, min(kParked, p.register_slabs));
#pragma unroll
        for (int i = 0; i < kParked; ++i) reload(i, i);
        park_input(kParked, p.register_slabs);
#pragma unroll
        for (int i = kParked; i < kRegisterSlabs; ++i) reload(i, i - kParked);
    }

    /// Activation, skip, ToRGB, and the result to where it waits: the last chunk to the last two positions, another
    /// parked.
    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool keep)
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
        if (l.rgb) add_rgb(q);
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

    /// Adds R x' of a chunk's 128 channels, whose A fragments are `q`. By ordinary arithmetic, 350 instructions, it
    /// made the tail longer than the other warpgroup's products.
    __device__ __forceinline__ void add_rgb(const uint32_t* q)
    {
        const uint32_t weights = descriptor_start(record() + kRecordRgb, kRgbStep);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            const uint32_t* f = q + 4 * s;
            wgmma_narrow<T>(rgb, f[0], f[1], f[2], f[3], narrow_descriptor(weights + s * (2 * kRgbStep >> 4)));
        }
        wgmma_commit();
        wgmma_wait<0>();
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
