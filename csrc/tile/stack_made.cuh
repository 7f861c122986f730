// Rows of the first layer's streamed input that a block makes itself: those of its next unit, while it works on this
// one, by warps that would have nothing else to do. They lie in memory, 128 KB a block, which L2 holds; layer 0 reads
// them in the first tenth of a unit. A kernel of its own for them took 4% to 6% of the whole time.
//
// A Rows has make<kFirst>(params, shared), this warp's share of the rows of made_unit<kFirst>; and kBuffers: with one,
// rows are made once layer 0 of the unit before has read its own, with two a whole unit's time is there for them. Two
// are more than L2 holds: rows went to memory and came back, 3% of the time of a call.
#pragma once

#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/proxy_fence.cuh"
#include "tile/stack_ring.cuh"

namespace cips {

/// Of kernels whose streamed input always comes as it is.
struct NoRows {
    static constexpr bool kMakes = false;
    static constexpr uint32_t kBuffers = 1;
};

/// Of the buffers of Rows, each with a barrier for rows that are there and one for rows that were read.
template <typename Rows>
struct MadeBarriers {
    const uint32_t shared;

    __device__ __forceinline__ explicit MadeBarriers(uint32_t base) : shared(base) {}

    __device__ __forceinline__ uint32_t full(uint32_t unit) const
    {
        return shared + kMadeOffset + unit % Rows::kBuffers * 8;
    }
    __device__ __forceinline__ uint32_t empty(uint32_t unit) const { return full(unit) + kMadeBuffers * 8; }

    /// Until a unit's rows are there. Units are numbered by block.
    __device__ __forceinline__ void wait_full(uint32_t unit) const
    {
        mbarrier_wait_long(full(unit), unit / Rows::kBuffers & 1);
    }

    /// Until its buffer is free; from the start, for the first units.
    __device__ __forceinline__ void wait_empty(uint32_t unit) const
    {
        mbarrier_wait_long(empty(unit), unit / Rows::kBuffers & 1 ^ 1);
    }

    __device__ __forceinline__ void init() const
    {
        for (uint32_t i = 0; i < Rows::kBuffers; ++i) {
            mbarrier_init(full(i), kMakers);
            mbarrier_init(empty(i), 4 * kConsumers);
        }
        for (int i = 0; i < 4 * kConsumers; ++i) start_count(shared + kMadeRead + 4 * i);
        start_count(shared + kMadeFetched);
    }
};

/// threadIdx.x, asked for anew: what is made of it in a register is one too many.
__device__ __forceinline__ uint32_t maker_thread()
{
    uint32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

/// Image, group and number of the unit whose rows are made wait in shared memory for each maker: registers are scarce.
__device__ __forceinline__ uint32_t made_unit_address(uint32_t shared)
{
    return shared + kMadeUnits + maker_thread() / 32 % kMakers * 16;
}

/// kFirst: a block's first unit.
template <bool kFirst>
__device__ __forceinline__ int2 made_unit(const StackParams& p, uint32_t shared)
{
    if constexpr (kFirst) {
        const UnitCursor unit(p);
        return {unit.image, unit.group};
    }
    int2 unit;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(unit.x), "=r"(unit.y)
                 : "r"(made_unit_address(shared))
                 : "memory");
    return unit;
}

__device__ __forceinline__ uint32_t made_number(uint32_t shared)
{
    return counted(made_unit_address(shared) + 8);
}

__device__ __forceinline__ void keep_made_unit(uint32_t shared, const UnitCursor& unit, uint32_t number)
{
    __syncwarp();
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %3};" ::"r"(made_unit_address(shared)), "r"(unit.image),
                 "r"(unit.group), "r"(number)
                 : "memory");
    __syncwarp();
}

/// A warp's number among those that make a unit's rows.
template <bool kFirst>
__device__ __forceinline__ uint32_t maker()
{
    return maker_thread() / 32 % (kFirst ? kStackThreads / 32 : kMakers);
}

/// The rows of a block's first unit, by all of its warps, before they part.
template <typename Rows>
__device__ __forceinline__ void make_first_rows(const StackParams& p, uint32_t shared)
{
    if constexpr (Rows::kMakes) {
        if (p.made.made == nullptr) return;
        Rows::template make<true>(p, shared);
        proxy_fence_global();
    }
}

/// The rows of every other unit, each as soon as its buffer is free.
template <typename Rows>
__device__ __forceinline__ void make_next_rows(const StackParams& p, uint32_t shared)
{
    if constexpr (Rows::kMakes) {
        if (p.made.made == nullptr) return;
        const MadeBarriers<Rows> bars(shared);
        keep_made_unit(shared, UnitCursor(p), 0);
#pragma unroll 1
        for (;;) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) mbarrier_arrive(bars.full(made_number(shared)));
            const int2 before = made_unit<false>(p, shared);
            UnitCursor unit(p, before.x, before.y);
            unit.advance(p);
            if (unit.image >= p.images) break;
            keep_made_unit(shared, unit, made_number(shared) + 1);
            bars.wait_empty(made_number(shared));
            asm volatile("" : "+r"(shared));  // else what was made of it for the barrier is kept for the rows
            Rows::template make<false>(p, shared);
            proxy_fence_global();
        }
    }
}

/// Pixel of a row, for calls with fewer than 2^31 pixels.
__device__ __forceinline__ uint32_t unclamped_pixel(int group, uint32_t row)
{
    return group * kGroupPixels + cluster_rank() * kBlockPixels + row % kBlockPixels;
}

/// The same; rows beyond the last repeat it.
__device__ __forceinline__ uint32_t made_pixel(const StackParams& p, int group, uint32_t row)
{
    return min(unclamped_pixel(group, row), p.made.last_pixel);
}

/// Rows are numbered over all buffers and blocks: whatever a row's number is needed for, one register serves.
template <typename Rows, bool kFirst>
__device__ __forceinline__ uint32_t first_made_row(uint32_t shared)
{
    return made_row<Rows>(kFirst ? 0 : made_number(shared));
}

/// Where a byte of a row lies. Offsets of 32 bits: all rows are some 35 MB.
__device__ __forceinline__ char* made_byte(const StackParams& p, uint32_t row, uint32_t byte)
{
    return p.made.made + (row * p.made.row_bytes + byte);
}

/// The byte some strides, of less than 2^31 bytes, beyond one.
template <typename Byte>
__device__ __forceinline__ Byte* bytes_beyond(Byte* byte, int number, uint32_t stride)
{
    int step = static_cast<int>(stride);
    asm volatile("" : "+r"(step));  // else it is kept, in 64 bits
    return byte + int64_t{number} * step;
}

// A warp takes groups of 32 rows side by side: what each row needs for itself a lane finds, then a lane takes four
// channels of all, kMadeWarpBytes of a row at a time.
constexpr int kMadeLaneChannels = 4;
constexpr uint32_t kMadeLaneBytes = kMadeLaneChannels * 2, kMadeWarpBytes = 32 * kMadeLaneBytes;
constexpr uint32_t kMadeGroups = kBlockPixels / 32;
static_assert(kMadeGroups == 2 * kMakers, "a maker has a first and a second group of rows");

/// Warps that share a group's channels.
template <bool kFirst>
constexpr uint32_t kMadeSplit = kFirst ? kStackThreads / 32 / kMadeGroups : 1;

/// First row of this warp's group.
template <typename Rows, bool kFirst>
__device__ __forceinline__ uint32_t group_row(uint32_t shared, bool second)
{
    uint32_t row = first_made_row<Rows, kFirst>(shared) + 32 * (maker<kFirst>() / kMadeSplit<kFirst>);
    if (second) {
        row += 32 * kMakers;
        asm volatile("" : "+r"(row));  // else the difference is kept, and not one bit
    }
    return row;
}

/// Where this lane's channels begin in a row, of those from byte `begin` on; lanes beyond the last channels repeat
/// them.
__device__ __forceinline__ uint32_t lane_byte(const StackParams& p, uint32_t begin)
{
    return min(begin + maker_thread() % 32 * kMadeLaneBytes, p.made.row_bytes - kMadeLaneBytes);
}

}  // namespace cips
