// Loads and stores that tell L2 what to give up first.
#pragma once

#include <cuda_runtime.h>

namespace cips {

/// Past L1, and last to leave L2: what the copy engine is to read from there.
__device__ __forceinline__ void store_evicted_last(uint2* to, uint2 v)
{
    asm volatile(
        "{\n"
        ".reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
        "st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, policy;\n"
        "}" ::"l"(to),
        "r"(v.x), "r"(v.y)
        : "memory");
}

/// Of memory that the kernel does not write; first to leave L2.
__device__ __forceinline__ float4 load_evicted_first(const float4* from)
{
    float4 v;
    asm("{\n"
        ".reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "ld.global.nc.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], policy;\n"
        "}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "l"(from));
    return v;
}

}  // namespace cips
