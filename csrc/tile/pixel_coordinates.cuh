// Coordinates of the pixels of a call.
#pragma once

#include "tile/pixel_places.h"

namespace cips {

constexpr int kSmallSide = 1 << 23;

/// n / d rounded once, of integers of at most kSmallSide: what __fdiv_rn does where neither is extreme, without the
/// call and the registers of where they are.
__device__ __forceinline__ float quotient_of_integers(float n, float d)
{
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(d));
    inverse = fmaf(inverse, fmaf(-d, inverse, 1.0f), inverse);
    const float q = __fmul_rn(n, inverse);
    return fmaf(inverse, fmaf(-d, q, n), q);
}

/// grid_coordinate of a side of at most kSmallSide. Numerator and denominator are exact in float32, so is the rounding
/// of the quotient; float64's is rounded twice, which at its precision is the same.
__device__ __forceinline__ float small_grid_coordinate(int position, int count)
{
    if (count == 1) return 0.0f;
    return quotient_of_integers(static_cast<float>(2 * position - (count - 1)), static_cast<float>(count - 1));
}

/// float32 coordinate t(i; n) = (2 i - (n - 1)) / (n - 1), the quotient of integers rounded once, as
/// cips_kernels/encoding.py does, so that the bits agree.
__device__ __forceinline__ float grid_coordinate(int64_t position, int64_t count)
{
    if (count <= kSmallSide) return small_grid_coordinate(static_cast<int>(position), static_cast<int>(count));
    const int64_t numerator = 2 * position - (count - 1);
    asm volatile(""
                 : "+l"(count));  // else its float64, of a path seldom taken, holds registers of a kernel's main loop
    return static_cast<float>(static_cast<double>(numerator) / static_cast<double>(count - 1));
}

/// y (second) or x of a pixel of this call; pixels beyond the last repeat it.
__device__ __forceinline__ float pixel_coordinate(const PixelPlaces& p, int image, int64_t pixel, bool second)
{
    pixel = pixel < p.pixels ? pixel : p.pixels - 1;
    if (p.coords != nullptr) return __ldg(p.coords + image * p.coords_batch_stride + 2 * pixel + second);
    const int64_t index = p.first_pixel + pixel;
    // 64-bit division is dear, and seldom needed
    const int64_t row = (index | p.grid_columns) >> 32 == 0
                            ? static_cast<uint32_t>(index) / static_cast<uint32_t>(p.grid_columns)
                            : index / p.grid_columns;
    return second ? grid_coordinate(row, p.grid_rows) : grid_coordinate(index - row * p.grid_columns, p.grid_columns);
}

/// The same of places with sides of at most kSmallSide and numbers below 2^31, in few registers.
__device__ __forceinline__ float small_pixel_coordinate(const PixelPlaces& p, int image, int pixel, bool second)
{
    if (p.coords != nullptr) return __ldg(p.coords + image * p.coords_batch_stride + 2 * int64_t{pixel} + second);
    const auto index = static_cast<uint32_t>(p.first_pixel) + static_cast<uint32_t>(pixel);
    auto columns = static_cast<uint32_t>(p.grid_columns), rows = static_cast<uint32_t>(p.grid_rows);
    asm volatile("" : "+r"(columns), "+r"(rows));  // else what is made of them is kept for the next pixel
    const uint32_t row = index / columns;
    return second ? small_grid_coordinate(row, rows) : small_grid_coordinate(index - row * columns, columns);
}

/// (x, y) of a pixel of this call.
__device__ __forceinline__ float2 pixel_coordinates(const PixelPlaces& p, int image, int64_t pixel)
{
    return make_float2(pixel_coordinate(p, image, pixel, false), pixel_coordinate(p, image, pixel, true));
}

}  // namespace cips
