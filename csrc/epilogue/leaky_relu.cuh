// Activation and rounding of two accumulators to one pair of 16-bit values.
#pragma once

#include "tile/packed_pairs.cuh"

namespace cips {

/// relu(x) + c x = lrelu_s(x) / (1 - s) with c = s / (1 - s), in packed arithmetic: rounded, then two operations. The
/// factor 1 - s goes into the next layer's weights. `c` is a pair of the type, exact for s = 0.2: c = 1/4.
template <typename T>
__device__ __forceinline__ uint32_t leaky_relu_pair(float low, float high, uint32_t c);

template <>
__device__ __forceinline__ uint32_t leaky_relu_pair<__nv_bfloat16>(float low, float high, uint32_t c)
{
    uint32_t x, y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x3f803f80u), "r"(0u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(c), "r"(y));
    return y;
}

template <>
__device__ __forceinline__ uint32_t leaky_relu_pair<__half>(float low, float high, uint32_t c)
{
    uint32_t x, y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x3c003c00u), "r"(0u));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(c), "r"(y));
    return y;
}

}  // namespace cips
