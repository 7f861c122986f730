// Sums over the lanes of a warp, in an order that never changes.
#pragma once

namespace cips {

/// Sum over the 32 lanes, bitwise the same in every lane: each step adds a pair, and a + b == b + a.
__device__ __forceinline__ float warp_sum(float value)
{
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

}  // namespace cips
