// Adding to memory without reading it (PTX red).
#pragma once

namespace cips {

/// Adds four numbers to four that start on 16 bytes. Where one thread alone ever adds to an address, sums come out in
/// its own order, the same from run to run.
__device__ __forceinline__ void reduce_add(float* to, float a, float b, float c, float d)
{
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

}  // namespace cips
