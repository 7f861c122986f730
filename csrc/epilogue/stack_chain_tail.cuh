// What a consumer warpgroup of stack_chain_kernel does between products. With h = dL/dx' of a layer, from above and
// from the ToRGB that reads x', and u = g v the gradient at the layer's sums:
//
//     v = h (1 where x' > 0, else s),   db = g sum_p v,   sum_i u_pi = g sum_i v_pi,   h of the layer below = v (g M)
#pragma once

#include "epilogue/fragment_rows.cuh"
#include "epilogue/stack_parts.cuh"
#include "ptx/reduce_add.cuh"
#include "tile/stack_made.cuh"
#include "tile/stack_train.h"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct StackChainTail : StackParts<T, ChainShape> {
    using Parts = StackParts<T, ChainShape>;
    using Parts::a;
    using Parts::acc;
    using Parts::lane;
    using Parts::p;

    using Rows = NoRows;
    static constexpr bool kInput = false;
    static constexpr bool kSkips = false;
    static constexpr bool kTight = true;

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
        signs = __ldg(grads.signs + signs_place(*this, grads.image_chunks) + number * 128);
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

    /// The sum of c[i] over a column of lanes, rows 0 to 7 of a warp: i is nb, e, as three bits that the lane's row
    /// tells. Each step halves the numbers and the rows.
    __device__ __forceinline__ float sum_column(float (&c)[8]) const
    {
#pragma unroll
        for (int half = 4; half > 0; half /= 2) {
            const bool upper = lane & 4 * half;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const float mine = upper ? c[half + i] : c[i], other = upper ? c[i] : c[half + i];
                c[i] = mine + __shfl_xor_sync(~0u, other, 4 * half);
            }
        }
        return c[0];
    }

    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool keep, int)
    {
        uint32_t local[32];
        uint32_t* q = kLast ? a + 16 * (kRegisterSlabs - 2) : local;
        char* base = l.number == 0 ? grads.first : grads.u + 2 * grads.rows * l.bias_offset;
        const FragmentRows out(base, this->image() * p.places.pixels + this->pixel(), this->pixel(), p.places.pixels,
                               l.out_features, chunk, lane % 4);
        float columns[4];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            float c[8];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                float v[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int pair = 8 * group + 2 * n + r / 2;
                    const uint32_t bit = (r % 2 ? 0x80000000u : 0x8000u) >> pair % 16;
                    const float h = acc[16 * group + 4 * n + r];
                    v[r] = (pair < 16 ? signs.x : signs.y) & bit ? h : grads.negative_slope * h;
                }
                q[8 * group + 2 * n] = pack_pair(v[0], v[1], T());
                q[8 * group + 2 * n + 1] = pack_pair(v[2], v[3], T());
                rows[0] += v[0] + v[1];
                rows[1] += v[2] + v[3];
                c[2 * n] = v[0] + v[2];
                c[2 * n + 1] = v[1] + v[3];
            }
            out.store(group, q + 8 * group);
            if (!kLast && keep) {
                this->park(8 * chunk + 2 * group, q + 8 * group);
                this->park(8 * chunk + 2 * group + 1, q + 8 * group + 4);
            }
            columns[group] = sum_column(c);
        }
        if (grads.bias_parts != nullptr) {
            const uint32_t thread = this->thread_of_block();
            const int warp = blockIdx.x * (4 * kConsumers) + thread / 32;
            float* part = grads.bias_parts + int64_t{warp} * grads.part_stride + (l.first_record + chunk) * kChunk;
            reduce_add(part + 4 * (thread % 32), columns[0], columns[1], columns[2], columns[3]);
        }
        if (kLast && grads.noise_rows != nullptr) store_rows(l);
    }

    __device__ __forceinline__ void store_rows(const StackLayer& l)
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
