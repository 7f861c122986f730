// Pairs of 16-bit values as floats: the reverse of pack_pair.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cips {

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, __half)
{
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(pair);
    raw.y = static_cast<unsigned short>(pair >> 16);
    return __half22float2(raw);
}

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, __nv_bfloat16)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

}  // namespace cips
