// m64n128k16, m64n64k16 and m64n8k16 products of a warpgroup (PTX wgmma), float32 accumulation in registers.
// Accumulator: thread (g, t) of a warp, g = lane / 4, t = lane % 4, holds of the warp's 16 rows d[4 j + 0, 1] = [g][8 j
// + 2 t, + 1] and d[4 j + 2, 3] = the same columns of row g + 8. A in registers: a0 = [g][2 t, + 1], a1 = [g + 8][the
// same], a2, a3 = 8 columns on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cips {

/// The low word of a matrix descriptor. Bytes add bytes / 16: a step of 16 elements along K of a swizzled operand
/// adds 2. `stride`: bytes between neighbours along K of an operand that is not swizzled; otherwise 16.
__device__ __forceinline__ uint32_t descriptor_start(uint32_t shared, uint32_t stride = 16)
{
    return (shared & 0x3FFFF) >> 4 | (stride >> 4) << 16;
}

/// Of a K-major operand in 128-byte-swizzled atoms of 8 rows by 64 elements, atoms 1,024 bytes apart.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t start)
{
    return uint64_t{1u << 30 | 1024 >> 4} << 32 | start;
}

/// Of a K-major operand of 8 rows in matrices of 8 elements along K, rows 16 bytes apart, not swizzled.
__device__ __forceinline__ uint64_t narrow_descriptor(uint32_t start)
{
    return start;
}

/// Of a K-major operand [N, 8], rows 16 bytes apart, not swizzled, at a shared address: columns 8 to 15 of the product
/// are columns 0 to 7 again, for A to have zeros there.
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t shared)
{
    return uint64_t{128 >> 4} << 32 | descriptor_start(shared, 0);
}

/// Of a K-major operand [N, 16] in two halves of [N, 8] `step` bytes apart, rows 16 bytes apart, not swizzled.
__device__ __forceinline__ uint64_t halves_descriptor(uint32_t shared, uint32_t step)
{
    return uint64_t{128 >> 4} << 32 | descriptor_start(shared, step);
}

/// An accumulator's start that stays in front of the fence: an ordinary zero the compiler moves behind it.
__device__ __forceinline__ void start_from_zero(float& d)
{
    asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d));
}

/// Behind the wait for a product, where loops and branches follow: else readers of its sums are moved in front of the
/// wait, and products are sent one by one (C7514).
__device__ __forceinline__ void read_from_here(float& d)
{
    asm volatile("" : "+f"(d));
}

/// Before the first product, and after ordinary instructions wrote registers that a product reads.
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Wait until at most `kPending` groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// d += A B^T, A [64, 16] in registers, B [128, 16] in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint64_t b);

/// The same, B [64, 16].
template <typename T>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                uint64_t b);

/// d = A B^T, the same.
template <typename T>
__device__ __forceinline__ void wgmma_fresh(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint64_t b);

/// d += A B^T, both in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b);

/// The same, B [64, 16].
template <typename T>
__device__ __forceinline__ void wgmma_shared(float (&d)[32], uint64_t a, uint64_t b);

/// d += A B^T, A [64, 16] in registers, B [8, 16] in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_narrow(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint64_t b);

// One text for all: the operands are 64 (or 32) accumulators, then A and B.
#define CIPS_ACCUMULATORS                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define CIPS_OUTPUTS                                                                                            \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define CIPS_FEW_ACCUMULATORS                                                 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define CIPS_FEW_OUTPUTS(HOW)                                                                                       \
    HOW(d[0]), HOW(d[1]), HOW(d[2]), HOW(d[3]), HOW(d[4]), HOW(d[5]), HOW(d[6]), HOW(d[7]), HOW(d[8]), HOW(d[9]),   \
        HOW(d[10]), HOW(d[11]), HOW(d[12]), HOW(d[13]), HOW(d[14]), HOW(d[15]), HOW(d[16]), HOW(d[17]), HOW(d[18]), \
        HOW(d[19]), HOW(d[20]), HOW(d[21]), HOW(d[22]), HOW(d[23]), HOW(d[24]), HOW(d[25]), HOW(d[26]), HOW(d[27]), \
        HOW(d[28]), HOW(d[29]), HOW(d[30]), HOW(d[31])
#define CIPS_WGMMA(TYPE, NAME)                                                                                   \
    template <>                                                                                                  \
    __device__ __forceinline__ void wgmma_registers<TYPE>(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, \
                                                          uint32_t a3, uint64_t b)                               \
    {                                                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " CIPS_ACCUMULATORS          \
                     ", {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"                                                  \
                     : CIPS_OUTPUTS                                                                              \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                              \
    }                                                                                                            \
    template <>                                                                                                  \
    __device__ __forceinline__ void wgmma_registers<TYPE>(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, \
                                                          uint32_t a3, uint64_t b)                               \
    {                                                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " CIPS_FEW_ACCUMULATORS       \
                     ", {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                                  \
                     : CIPS_FEW_OUTPUTS("+f")                                                                    \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                              \
    }                                                                                                            \
    template <>                                                                                                  \
    __device__ __forceinline__ void wgmma_fresh<TYPE>(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                                      uint32_t a3, uint64_t b)                                   \
    {                                                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " CIPS_FEW_ACCUMULATORS       \
                     ", {%32, %33, %34, %35}, %36, 0, 1, 1, 0;"                                                  \
                     : CIPS_FEW_OUTPUTS("=f")                                                                    \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                              \
    }                                                                                                            \
    template <>                                                                                                  \
    __device__ __forceinline__ void wgmma_shared<TYPE>(float (&d)[64], uint64_t a, uint64_t b)                   \
    {                                                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " CIPS_ACCUMULATORS          \
                     ", %64, %65, 1, 1, 1, 0, 0;"                                                                \
                     : CIPS_OUTPUTS                                                                              \
                     : "l"(a), "l"(b));                                                                          \
    }                                                                                                            \
    template <>                                                                                                  \
    __device__ __forceinline__ void wgmma_shared<TYPE>(float (&d)[32], uint64_t a, uint64_t b)                   \
    {                                                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " CIPS_FEW_ACCUMULATORS       \
                     ", %32, %33, 1, 1, 1, 0, 0;"                                                                \
                     : CIPS_FEW_OUTPUTS("+f")                                                                    \
                     : "l"(a), "l"(b));                                                                          \
    }                                                                                                            \
    template <>                                                                                                  \
    __device__ __forceinline__ void wgmma_narrow<TYPE>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                                       uint32_t a3, uint64_t b)                                  \
    {                                                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32." NAME "." NAME                                  \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"                                      \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                              \
    }
CIPS_WGMMA(__nv_bfloat16, "bf16")
CIPS_WGMMA(__half, "f16")
#undef CIPS_WGMMA
#undef CIPS_FEW_OUTPUTS
#undef CIPS_FEW_ACCUMULATORS
#undef CIPS_OUTPUTS
#undef CIPS_ACCUMULATORS

}  // namespace cips
