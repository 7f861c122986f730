// The first layer's inputs that live in registers, as A fragments: Fourier features of the pixel's coordinates, or the
// first channels of x.
//
// A slab's 64 channels are taken in another order along K, so that a thread's 16 are neighbours: thread t of a quad
// holds channels 16 t + 4 s + 2 h + e of step s, half h, element e. The weights are packed in the same order.
#pragma once

#include "tile/stack_params.h"
#include "tile/vector.cuh"

namespace cips {

using StackInput = uint32_t[16 * kRegisterSlabs];  // 16 registers a slab

/// sin(f.x x + f.y y + f.z). The hardware's sine takes the fraction of a turn; its error, and that of the float32
/// angle, are small beside a rounding to 16 bits up to thousands of radians.
__device__ __forceinline__ float fourier_feature(float4 f, float2 point)
{
    return __sinf(fmaf(f.y, point.y, fmaf(f.x, point.x, f.z)));
}

/// Slabs that no input fills meet zero weights, and must be finite.
__device__ __forceinline__ void clear_slab(StackInput& a, int slab)
{
#pragma unroll
    for (int i = 0; i < 16; ++i) a[16 * slab + i] = 0;
}

/// Fourier features of the rows g and g + 8, for thread t of its quad.
template <typename T>
__device__ __forceinline__ void encode_input(StackInput& a, const StackParams& p, int t, float2 row0, float2 row1)
{
#pragma unroll
    for (int slab = 0; slab < kRegisterSlabs; ++slab) {
        if (slab >= p.register_slabs) {
            clear_slab(a, slab);
            continue;
        }
        const float4* f = p.fourier + 64 * slab + 16 * t;
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            const float4 f0 = __ldg(f + 2 * pair), f1 = __ldg(f + 2 * pair + 1);
            const int i = 16 * slab + 4 * (pair / 2) + 2 * (pair % 2);
            a[i] = pack_pair(fourier_feature(f0, row0), fourier_feature(f1, row0), T());
            a[i + 1] = pack_pair(fourier_feature(f0, row1), fourier_feature(f1, row1), T());
        }
    }
}

/// The first channels of x at the pixels `pixel` and `pixel + 8`, for thread t of its quad; pixels beyond the last
/// are zero.
__device__ __forceinline__ void load_input(StackInput& a, const StackParams& p, int t, int image, int64_t pixel)
{
    const char* first = p.x + image * p.x_batch_stride + 32 * t;
#pragma unroll
    for (int slab = 0; slab < kRegisterSlabs; ++slab) {
        if (slab >= p.register_slabs) {
            clear_slab(a, slab);
            continue;
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int64_t at_pixel = pixel + 8 * row;
            uint4 v[2] = {};
            if (at_pixel < p.places.pixels) {
                const auto* source = reinterpret_cast<const uint4*>(first + at_pixel * p.x_row_stride + 128 * slab);
                v[0] = __ldg(source);
                v[1] = __ldg(source + 1);
            }
            const uint32_t words[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
            for (int pair = 0; pair < 8; ++pair) {
                a[16 * slab + 4 * (pair / 2) + 2 * (pair % 2) + row] = words[pair];
            }
        }
    }
}

}  // namespace cips
