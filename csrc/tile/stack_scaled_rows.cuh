// Blends: rows of the streamed input times each pixel's style, s_p = sum_k beta_pk s_k, in packed arithmetic as the
// scaling of every other layer (StackBlendTail::scale).
#pragma once

#include "tile/packed_pairs.cuh"
#include "tile/stack_made.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct ScaledRows {
    static constexpr bool kMakes = true;
    static constexpr uint32_t kBuffers = 1;

    /// A warp takes a row at a time, a lane four channels of 128.
    template <bool kFirst>
    __device__ __forceinline__ static void make(const StackParams& p, uint32_t shared)
    {
        constexpr uint32_t kWarps = kFirst ? kStackThreads / 32 : kMakers;
        constexpr int kAhead = kFirst ? kRegisterInputs / 128 : 1;  // of a lane's channels, under way at once
#pragma unroll 1
        for (uint32_t row = first_made_row<ScaledRows, kFirst>(shared) + maker<kFirst>();
             ;) {  // until the next would be another block's
            const int2 unit = made_unit<kFirst>(p, shared);
            const uint64_t image = static_cast<uint32_t>(unit.x);
            const uint64_t pixel = made_pixel(p, unit.y, row);
            const float2 weights =
                __ldg(reinterpret_cast<const float2*>(p.blend + image * p.blend_batch_stride) + pixel);
            const char* source = p.made.source + image * p.made.source_stride + pixel * p.made.row_stride;
            const char* styles = p.made.styles + image * (kMaxBlend * p.made.row_bytes);
            const uint32_t pair0 = pack_pair(weights.x, weights.x, T()), pair1 = pack_pair(weights.y, weights.y, T());
            // whole addresses, not the parts that they were made of
            asm volatile("" : "+l"(source), "+l"(styles));
#pragma unroll kAhead
            for (uint32_t at = maker_thread() % 32 * 8; at < p.made.row_bytes; at += 32 * 8) {
                const uint2 first = load(styles + at), second = load(styles + p.made.row_bytes + at);
                const uint2 x = load_once(source + at);
                const auto scaled = [&](uint32_t v, uint32_t a, uint32_t b) {
                    return mul_pair<T>(v, fma_pair<T>(b, pair1, mul_pair<T>(a, pair0)));
                };
                // past L1: the copy engine reads it from L2
                __stcg(reinterpret_cast<uint2*>(made_byte(p, row, at)),
                       make_uint2(scaled(x.x, first.x, second.x), scaled(x.y, first.y, second.y)));
            }
            row += kWarps;
            if (row % kBlockPixels < kWarps) break;
        }
    }

private:
    /// What L2 need not keep: weights are read again and again.
    __device__ __forceinline__ static uint2 load_once(const char* from)
    {
        uint2 v;
        asm("ld.global.cs.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
        return v;
    }

    __device__ __forceinline__ static uint2 load(const char* from)
    {
        return __ldg(reinterpret_cast<const uint2*>(from));
    }
};

}  // namespace cips
