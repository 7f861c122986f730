// Sums over the lanes of a warp, in an order that never changes.
#pragma once

namespace cips {

/// Sum over each kLanes neighbouring lanes of the 32, bitwise the same in all of them: each step adds a pair, and
/// a + b == b + a.
template <int kLanes = 32>
__device__ __forceinline__ float warp_sum(float value)
{
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

}  // namespace cips
