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

    /// A warp takes 32 rows side by side: each lane finds the weights of one, then takes four channels of all, whose
    /// styles it holds.
    template <bool kFirst>
    __device__ __forceinline__ static void make(const StackParams& p, uint32_t shared)
    {
        constexpr uint32_t kSplit = kMadeSplit<kFirst>;
        constexpr int kAhead = kFirst ? 8 : 1;  // rows under way at once
        bool second = false;                    // group
#pragma unroll 1
        do {
            const uint32_t mine = weights_of<kFirst>(p, shared, second);
#pragma unroll 1
            for (uint32_t begin = maker<kFirst>() % kSplit * kMadeWarpBytes; begin < p.made.row_bytes;
                 begin += kSplit * kMadeWarpBytes) {
                const uint32_t byte = lane_byte(p, begin);
                const int2 unit = made_unit<kFirst>(p, shared);
                const uint64_t image = static_cast<uint32_t>(unit.x);
                const char* styles = p.made.styles + image * (kMaxBlend * p.made.row_bytes) + byte;
                const uint2 style0 = load(styles), style1 = load(styles + p.made.row_bytes);
                const char* source = p.made.source + image * p.made.source_stride + byte;
                uint32_t first = group_row<ScaledRows, kFirst>(shared, second);
                char* to = made_byte(p, first, byte);
                first = unclamped_pixel(unit.y, first);
                asm volatile("" : "+l"(source), "+l"(to), "+r"(first));  // not the parts that they were made of
#pragma unroll kAhead
                for (uint32_t row = 0; row < 32; ++row) {
                    const uint32_t pixel = min(first + row, p.made.last_pixel);
                    const uint2 x = load_once(bytes_beyond(source, pixel, p.made.row_stride));
                    const uint32_t pair = __shfl_sync(~0u, mine, row);
                    const uint32_t weight0 = __byte_perm(pair, 0, 0x1010), weight1 = __byte_perm(pair, 0, 0x3232);
                    const auto scaled = [&](uint32_t v, uint32_t a, uint32_t b) {
                        return mul_pair<T>(v, fma_pair<T>(b, weight1, mul_pair<T>(a, weight0)));
                    };
                    // past L1: the copy engine reads it from L2
                    __stcg(reinterpret_cast<uint2*>(bytes_beyond(to, row, p.made.row_bytes)),
                           make_uint2(scaled(x.x, style0.x, style1.x), scaled(x.y, style0.y, style1.y)));
                }
            }
            second = !second;
        } while (second && !kFirst);
    }

private:
    /// Both weights of the group's row of this lane's number.
    template <bool kFirst>
    __device__ __forceinline__ static uint32_t weights_of(const StackParams& p, uint32_t shared, bool second)
    {
        const int2 unit = made_unit<kFirst>(p, shared);
        const uint32_t row = group_row<ScaledRows, kFirst>(shared, second) + maker_thread() % 32;
        const float* weights = p.blend + static_cast<uint32_t>(unit.x) * p.blend_batch_stride;
        const float2 w = __ldg(reinterpret_cast<const float2*>(weights) + made_pixel(p, unit.y, row));
        return pack_pair(w.x, w.y, T());
    }

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
