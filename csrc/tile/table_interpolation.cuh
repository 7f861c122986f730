// Bilinear interpolation in a table of vectors, within its columns first. The arithmetic is that of
// cips_kernels/encoding.py, operation by operation, so that the bits agree.
#pragma once

#include <cuda_runtime.h>

namespace cips {

/// The two positions around a coordinate, and the weight of the second.
struct Neighbours {
    int first, second;
    float weight;
};

__device__ __forceinline__ Neighbours neighbours(float t, int count, bool exact)
{
    float position;
    if (exact) {
        position = __fmul_rn(__fadd_rn(t, 1.0f), 0.5f * static_cast<float>(count - 1));
        const float off = __fsub_rn(rintf(position), position);
        // what float32 cannot tell from a grid point is one
        if (fabsf(off) <= static_cast<float>(count) * 0x1p-22f) position = __fadd_rn(position, off);
    } else {
        position = __fmul_rn(0.5f, __fsub_rn(__fmul_rn(__fadd_rn(t, 1.0f), static_cast<float>(count)), 1.0f));
    }
    const float last = static_cast<float>(count - 1);
    position = position < 0.0f ? 0.0f : position > last ? last : position;  // NaN stays
    // a NaN coordinate reads entry 0 and stays NaN through its weight
    const float whole = fminf(isnan(position) ? 0.0f : floorf(position), static_cast<float>(count > 1 ? count - 2 : 0));
    const auto first = static_cast<int>(whole);
    return {first, first + 1 < count ? first + 1 : count - 1, __fsub_rn(position, whole)};
}

/// (1 - weight) a + weight b, exactly a at weight 0 and b at weight 1.
__device__ __forceinline__ float interpolate(float a, float b, float weight)
{
    return __fadd_rn(__fmul_rn(__fsub_rn(1.0f, weight), a), __fmul_rn(weight, b));
}

}  // namespace cips
