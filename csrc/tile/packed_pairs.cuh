// Arithmetic on pairs of 16-bit values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cips {

/// a b + c in packed arithmetic.
template <typename T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t fma_pair<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <>
__device__ __forceinline__ uint32_t fma_pair<__half>(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/// a b in packed arithmetic.
template <typename T>
__device__ __forceinline__ uint32_t mul_pair(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t mul_pair<__nv_bfloat16>(uint32_t a, uint32_t b)
{
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

template <>
__device__ __forceinline__ uint32_t mul_pair<__half>(uint32_t a, uint32_t b)
{
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

/// Both numbers of a pair.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair)
{
    float2 v;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(pair));
    return v;
}

/// All bits of a half where its number is positive.
template <typename T>
__device__ __forceinline__ uint32_t positive_pair(uint32_t x);

template <>
__device__ __forceinline__ uint32_t positive_pair<__nv_bfloat16>(uint32_t x)
{
    uint32_t mask;
    asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(0u));
    return mask;
}

template <>
__device__ __forceinline__ uint32_t positive_pair<__half>(uint32_t x)
{
    uint32_t mask;
    asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(x), "r"(0u));
    return mask;
}

}  // namespace cips
