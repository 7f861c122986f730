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

/// sin(weight_x x + weight_y y + bias). The hardware's sine takes the fraction of a turn; its error, and that of the
/// float32 angle, are small beside a rounding to 16 bits up to thousands of radians.
__device__ __forceinline__ float fourier_feature(float weight_x, float weight_y, float bias, float2 point)
{
    return __sinf(fmaf(weight_y, point.y, fmaf(weight_x, point.x, bias)));
}

/// One slab of Fourier features of the rows g and g + 8, for thread t of its quad.
template <typename T>
__device__ __forceinline__ void encode_slab(uint32_t (&v)[16], int slab, const StackParams& p, int t, float2 row0,
                                            float2 row1)
{
    const float4* f = p.fourier + kFourierSlab * slab + t;  // of a quad's threads side by side
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const float4 x = __ldg(f + 12 * step), y = __ldg(f + 12 * step + 4), bias = __ldg(f + 12 * step + 8);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float2 at = row == 0 ? row0 : row1;
            v[4 * step + row] =
                pack_pair(fourier_feature(x.x, y.x, bias.x, at), fourier_feature(x.y, y.y, bias.y, at), T());
            v[4 * step + 2 + row] =
                pack_pair(fourier_feature(x.z, y.z, bias.z, at), fourier_feature(x.w, y.w, bias.w, at), T());
        }
    }
}

/// One slab of x at the pixels `pixel` and `pixel + 8`, for thread t of its quad; pixels beyond the last are zero.
__device__ __forceinline__ void load_slab(uint32_t (&v)[16], int slab, const StackParams& p, int t, int image,
                                          int64_t pixel)
{
    const char* first = p.x + image * p.x_batch_stride + 128 * slab + 32 * t;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int64_t at_pixel = pixel + 8 * row;
        uint4 quads[2] = {};
        if (at_pixel < p.places.pixels) {
            const auto* source = reinterpret_cast<const uint4*>(first + at_pixel * p.x_row_stride);
            quads[0] = __ldg(source);
            quads[1] = __ldg(source + 1);
        }
        const uint32_t words[8] = {quads[0].x, quads[0].y, quads[0].z, quads[0].w,
                                   quads[1].x, quads[1].y, quads[1].z, quads[1].w};
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) v[4 * (pair / 2) + 2 * (pair % 2) + row] = words[pair];
    }
}

}  // namespace cips
