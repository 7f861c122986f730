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

/// The blend's weights of a row.
template <int kStyles>
struct RowBlend {
    float of[kStyles];
};

/// One slab of Fourier features of the rows g and g + 8, for thread t of its quad. Blends: times the layer's style,
/// which then is a pixel's own.
template <typename T, int kStyles>
__device__ __forceinline__ void encode_slab(uint32_t (&v)[16], int slab, const StackParams& p, int image, int t,
                                            float2 row0, float2 row1, const RowBlend<kStyles> (&blend)[2])
{
    using Shape = StackShape<kStyles>;
    constexpr int kParts = 4 * Shape::kFourierParts;
    const float4* f = p.fourier + Shape::kFourierSlab * slab + t;  // of a quad's threads side by side
    if (Shape::kBlends) f += image * p.fourier_stride;
#pragma unroll
    for (int step = 0; step < 4; ++step, f += kParts) {
        const float4 x = __ldg(f), y = __ldg(f + 4), bias = __ldg(f + 8);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float2 at = row == 0 ? row0 : row1;
            float4 value = make_float4(fourier_feature(x.x, y.x, bias.x, at), fourier_feature(x.y, y.y, bias.y, at),
                                       fourier_feature(x.z, y.z, bias.z, at), fourier_feature(x.w, y.w, bias.w, at));
            if constexpr (Shape::kBlends) {
                float4 style = mul4(__ldg(f + 12), blend[row].of[0]);
#pragma unroll
                for (int k = 1; k < kStyles; ++k) style = fma4(__ldg(f + 12 + 4 * k), blend[row].of[k], style);
                value = mul4(value, style);
            }
            v[4 * step + row] = pack_pair(value.x, value.y, T());
            v[4 * step + 2 + row] = pack_pair(value.z, value.w, T());
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
