// Four consecutive columns of a row at once: guarded loads and stores, arithmetic, the 16-byte pack of
// outputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cips {

/// row[column .. column + 3], zero from `columns` on. kVector promises that `row` starts on 16 bytes and that
/// `columns` is a multiple of four; without it every element is guarded, which serves any alignment and any
/// width.
template <bool kVector>
__device__ __forceinline__ float4 load4(const float* __restrict__ row, int column, int columns)
{
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if constexpr (kVector) {
        if (column < columns) value = __ldg(reinterpret_cast<const float4*>(row + column));
    } else {
        if (column + 0 < columns) value.x = __ldg(row + column);
        if (column + 1 < columns) value.y = __ldg(row + column + 1);
        if (column + 2 < columns) value.z = __ldg(row + column + 2);
        if (column + 3 < columns) value.w = __ldg(row + column + 3);
    }
    return value;
}

/// The reverse of load4: writes only columns below `columns`.
template <bool kVector>
__device__ __forceinline__ void store4(float* __restrict__ row, int column, int columns, float4 value)
{
    if constexpr (kVector) {
        if (column < columns) *reinterpret_cast<float4*>(row + column) = value;
    } else {
        if (column + 0 < columns) row[column] = value.x;
        if (column + 1 < columns) row[column + 1] = value.y;
        if (column + 2 < columns) row[column + 2] = value.z;
        if (column + 3 < columns) row[column + 3] = value.w;
    }
}

/// `value` with the columns from `columns` on replaced by zero, whatever they held (NaN too).
__device__ __forceinline__ float4 keep_below(float4 value, int column, int columns)
{
    if (column + 4 > columns) {
        value.x = column + 0 < columns ? value.x : 0.0f;
        value.y = column + 1 < columns ? value.y : 0.0f;
        value.z = column + 2 < columns ? value.z : 0.0f;
        value.w = column + 3 < columns ? value.w : 0.0f;
    }
    return value;
}

__device__ __forceinline__ float4 mul4(float4 a, float4 b)
{
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ __forceinline__ float4 mul4(float4 a, float b)
{
    return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}

__device__ __forceinline__ float4 add4(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/// a * b + c
__device__ __forceinline__ float4 fma4(float4 a, float4 b, float4 c)
{
    return make_float4(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y), fmaf(a.z, b.z, c.z), fmaf(a.w, b.w, c.w));
}

/// a * b + c with one factor for all four
__device__ __forceinline__ float4 fma4(float4 a, float b, float4 c)
{
    return make_float4(fmaf(a.x, b, c.x), fmaf(a.y, b, c.y), fmaf(a.z, b, c.z), fmaf(a.w, b, c.w));
}

/// sum + a . b
__device__ __forceinline__ float dot4(float4 a, float4 b, float sum)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/// 16 bytes of outputs of type T: four floats, or eight halves rounded to nearest even.
template <typename T>
__device__ __forceinline__ uint4 pack16(const float4 (&quads)[4 / sizeof(T)]);

template <>
__device__ __forceinline__ uint4 pack16<float>(const float4 (&quads)[1])
{
    return make_uint4(__float_as_uint(quads[0].x), __float_as_uint(quads[0].y), __float_as_uint(quads[0].z),
                      __float_as_uint(quads[0].w));
}

__host__ __device__ __forceinline__ uint32_t pack_pair(float low, float high, __half)
{
    const __half2_raw pair = __floats2half2_rn(low, high);
    return static_cast<uint32_t>(pair.y) << 16 | pair.x;
}

__host__ __device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16)
{
    const __nv_bfloat162_raw pair = __floats2bfloat162_rn(low, high);
    return static_cast<uint32_t>(pair.y) << 16 | pair.x;
}

/// Rounded to T and back.
template <typename T>
__device__ __forceinline__ float round_to(float v)
{
    return static_cast<float>(static_cast<T>(v));
}

template <typename T>
__device__ __forceinline__ uint4 pack16(const float4 (&quads)[4 / sizeof(T)])
{
    return make_uint4(pack_pair(quads[0].x, quads[0].y, T()), pack_pair(quads[0].z, quads[0].w, T()),
                      pack_pair(quads[1].x, quads[1].y, T()), pack_pair(quads[1].z, quads[1].w, T()));
}

}  // namespace cips
