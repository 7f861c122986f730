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
