// Counter-based normal noise: Philox4x32-10, the words of cips_kernels/noise.py.
#pragma once

#include <cstdint>

namespace cips {

/// One value from key (low, high bits of the seed) and counter (c0, c1, image, layer), by Box and Muller's transform
/// of the first two words.
__device__ __forceinline__ float normal_noise(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t image,
                                              uint32_t layer)
{
    uint32_t c2 = image, c3 = layer;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * c0;
        const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    const float u = (static_cast<float>(c0 >> 8) + 0.5f) * 0x1p-24f;
    const float turns = static_cast<float>(c1 >> 8) * 0x1p-24f;
    float radius;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(radius) : "f"(-2.0f * logf(u)));  // to the last bit but one, at half the time
    return radius * __cosf(6.283185307f * turns);
}

}  // namespace cips
