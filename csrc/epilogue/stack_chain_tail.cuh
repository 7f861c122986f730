// What a consumer warpgroup of stack_chain_kernel does between products. With h = dL/dx' of a layer, from above and
// from the ToRGB that reads x', and u = g v the gradient at the layer's sums:
//
//     v = h (1 where x' > 0, else s),   db = g sum_p v,   sum_i u_pi = g sum_i v_pi,   h of the layer below = v (g M)
#pragma once

#include "epilogue/stack_parts.cuh"
#include "epilogue/stored_parts.cuh"
#include "ptx/reduce_add.cuh"
#include "tile/packed_pairs.cuh"
#include "tile/stack_made.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct StackChainTail : StoredParts<StackParts<T, ChainShape>> {
    using Parts = StoredParts<StackParts<T, ChainShape>>;
    using Parts::a;
    using Parts::acc;
    using Parts::lane;
    using Parts::p;

    using Rows = NoRows;
    static constexpr bool kInput = false;
    static constexpr bool kSkips = false;

    const StackGrads& grads;
    uint32_t drgb[2];  // of rows g and g + 8, as an A fragment of eight columns
    uint2 signs;       // of the chunk in hand
    float rows[2];     // sums of v over the channels so far, of rows g and g + 8

    __device__ __forceinline__ StackChainTail(const StackParams& params, uint32_t base, const StackGrads& more)
        : Parts(params, base), grads(more)
    {
    }

    __device__ __forceinline__ void find_place() {}
    __device__ __forceinline__ void find_blend() {}
    __device__ __forceinline__ static float draw(int) { return 0.0f; }
    __device__ __forceinline__ void make_input() {}  // the first layer's gradient is the colours' alone
    __device__ __forceinline__ void store() const {}
    __device__ __forceinline__ static float keep_noise(float drawn) { return drawn; }

    /// The gradient of colour `column` % 3 at a pixel: rounded in columns 0 to 2, what the rounding left in 3 to 5.
    __device__ __forceinline__ float drgb_column(int column, int64_t pixel) const
    {
        const int c = column < kMaxRgbChannels ? column : column - kMaxRgbChannels;
        if (column >= 2 * kMaxRgbChannels || c >= p.channels || pixel >= p.places.pixels) return 0.0f;
        const float value = __ldg(grads.drgb + (this->image() * p.places.pixels + pixel) * p.channels + c);
        return column < kMaxRgbChannels ? value : value - round_to<T>(value);
    }

    __device__ __forceinline__ void start_colours()
    {
        const int column = 2 * (this->thread_of_block() % 4);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int64_t pixel = this->pixel() + 8 * row;
            drgb[row] = pack_pair(drgb_column(column, pixel), drgb_column(column + 1, pixel), T());
            if (grads.colours != nullptr) {
                const int64_t padded = int64_t{p.groups} * kGroupPixels;
                grads.colours[(this->image() * padded + pixel) * 4 + column / 2] = drgb[row];
            }
        }
    }

    /// Accumulators start as dRGB R.
    __device__ __forceinline__ void start_chunk(const StackLayer& l, int chunk, float, float)
    {
        if (chunk == 0) rows[0] = rows[1] = 0.0f;
        const int64_t number = l.first_record + chunk;
        signs = __ldg(grads.signs + this->signs_place(grads.image_chunks) + number * 128);
#pragma unroll
        for (int i = 0; i < 64; ++i) acc[i] = 0.0f;
        if (l.rgb) {
            this->wait_for_record();
            wgmma_fence();
            wgmma_registers<T>(acc, drgb[0], drgb[1], 0, 0, rows_descriptor(this->record()));
            wgmma_commit();
            wgmma_wait<0>();
            this->end_chunk();
        }
    }

    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool, int)
    {
        uint32_t local[32];
        uint32_t* q = kLast ? a + 16 * (kRegisterSlabs - 2) : local;
        const int place = kLast ? 0 : chunk;  // free once the layer's input is in registers
        this->wait_until_stored();
#pragma unroll
        for (int group = 0; group < 4; ++group) {
#pragma unroll
            for (int i = 8 * group; i < 8 * group + 8; ++i) {
                float v[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const uint32_t bit = (e ? 0x80000000u : 0x8000u) >> i % 16;
                    const float h = acc[2 * i + e];
                    v[e] = (i < 16 ? signs.x : signs.y) & bit ? h : grads.negative_slope * h;
                }
                q[i] = pack_pair(v[0], v[1], T());
                rows[i % 2] += v[0] + v[1];
            }
            this->park_rows(place, group, q + 8 * group);
        }
        this->store_rows(grads.gradients[l.number], place, chunk);
        if (grads.bias_parts != nullptr) sum_columns(place, l.first_record + chunk);
        if (kLast && grads.noise_rows != nullptr) sum_rows(l);
    }

    /// Adds the sums over the warp's rows, from where they are parked, to those of the chunk `number`; four channels a
    /// lane. By shuffles of what registers hold they took twice as long.
    __device__ __forceinline__ void sum_columns(int place, int64_t number) const
    {
        uint2 v[kWarpPixels];
#pragma unroll
        for (int row = 0; row < kWarpPixels; ++row) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                         : "=r"(v[row].x), "=r"(v[row].y)
                         : "r"(this->parked_box(place) + 2 * kChunk * row + 8 * lane)
                         : "memory");
        }
        float4 sum = {};
#pragma unroll
        for (int row = 0; row < kWarpPixels; ++row) {
            const float2 low = unpack_pair<T>(v[row].x), high = unpack_pair<T>(v[row].y);
            sum = add4(sum, make_float4(low.x, low.y, high.x, high.y));
        }
        const uint32_t thread = this->thread_of_block();
        const int warp = blockIdx.x * (4 * kConsumers) + thread / 32;
        float* part = grads.bias_parts + int64_t{warp} * grads.part_stride + number * kChunk;
        reduce_add(part + 4 * (thread % 32), sum.x, sum.y, sum.z, sum.w);
    }

    __device__ __forceinline__ void sum_rows(const StackLayer& l)
    {
        const int64_t pixel = this->pixel(), row = this->image() * p.places.pixels + pixel;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rows[r] += __shfl_xor_sync(~0u, rows[r], 1);
            rows[r] += __shfl_xor_sync(~0u, rows[r], 2);
            if (lane % 4 == 0 && pixel + 8 * r < p.places.pixels) {
                grads.noise_rows[l.number * grads.noise_stride + row + 8 * r] = grads.gain * rows[r];
            }
        }
    }
};

}  // namespace cips
