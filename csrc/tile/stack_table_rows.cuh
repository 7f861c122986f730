// Rows of the streamed input from a table of float32 vectors, interpolated at each pixel's coordinates: what
// table_lookup_kernel makes, in the registers that producers have.
#pragma once

#include "tile/pixel_coordinates.cuh"
#include "tile/stack_made.cuh"
#include "tile/table_interpolation.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct TableRows {
    static constexpr bool kMakes = true;
    static constexpr uint32_t kBuffers = 2;

    /// A warp takes 32 rows side by side, whose entries are often the same. Each lane finds the place of one; then it
    /// takes two channels of all, with the corners that it holds. Places kept in memory cost 300 cycles a row. Of a
    /// multiple of 64 channels, so that no lane leaves the loop before the others.
    template <bool kFirst>
    __device__ __forceinline__ static void make(const StackParams& p, uint32_t shared)
    {
        constexpr uint32_t kGroups = kBlockPixels / 32;
        constexpr uint32_t kSplit = kFirst ? kStackThreads / 32 / kGroups : 1;  // warps that share a group's channels
        constexpr int kAhead = kFirst ? 4 : 1;                                  // rows under way at once
        uint32_t row = first_made_row<TableRows, kFirst>(shared) + 32 * (maker<kFirst>() / kSplit);
#pragma unroll 1
        for (;;) {
            Place mine = place_of(p, made_unit<kFirst>(p, shared), row + maker_thread() % 32);
            // the sign bit: these corners are not those of the row before
            const uint32_t before = __shfl_up_sync(~0u, mine.entry, 1);
            if (mine.entry != before || maker_thread() % 32 == 0) {
                mine.x = __uint_as_float(__float_as_uint(mine.x) | 0x80000000);
            }
#pragma unroll 1
            for (uint32_t byte = maker_thread() % 32 * 4 + maker<kFirst>() % kSplit * 128; byte < p.made.row_bytes;
                 byte += 128 * kSplit) {
                float2 corner[4] = {};
#pragma unroll kAhead
                do {
                    const float marked = __shfl_sync(~0u, mine.x, row);  // of lane row % 32
                    if (__float_as_int(marked) < 0) {
                        load_corners(corner, p, __shfl_sync(~0u, mine.entry, row), byte);
                    }
                    const float x = fabsf(marked), y = __shfl_sync(~0u, mine.y, row);
                    const float2 v =
                        interpolate(interpolate(corner[0], corner[1], x), interpolate(corner[2], corner[3], x), y);
                    // past L1: the copy engine reads it from L2
                    __stcg(reinterpret_cast<unsigned int*>(made_byte(p, row, byte)), pack_pair(v.x, v.y, T()));
                    ++row;
                    asm volatile("" : "+r"(row));  // else the one before is kept as well
                } while (row % 32 != 0);
                row -= 32;
            }
            row += 32 * kMakers;
            if (kFirst || row % kBlockPixels < 32 * kMakers) break;  // the next are another block's
        }
    }

private:
    // of an entry: its number, and whether the one right of it and the one below it are read
    static constexpr uint32_t kEntry = (1u << 30) - 1, kRight = 1u << 30, kBelow = 1u << 31;

    struct Place {
        uint32_t entry;
        float x, y;  // weights of the second
    };

    __device__ __forceinline__ static Place place_of(const StackParams& p, int2 unit, uint32_t row)
    {
        const uint32_t pixel = made_pixel(p, unit.y, row);
        Place place{};
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            int count = second ? p.made.rows : p.made.columns;
            asm volatile("" : "+r"(count));  // else what is made of it is kept for the next rows
            const Neighbours n =
                neighbours(small_pixel_coordinate(p.places, unit.x, pixel, second), count, p.made.exact);
            // with a weight of 0 the second is not read, and stands for the first
            const bool reads = n.weight != 0.0f && n.second > n.first;
            place.entry += (second ? n.first * p.made.columns : n.first) | (reads ? second ? kBelow : kRight : 0);
            (second ? place.y : place.x) = n.weight;
        }
        return place;
    }

    /// byte: of the row that is made, where the table has two.
    __device__ __forceinline__ static void load_corners(float2 (&corner)[4], const StackParams& p, uint32_t entry,
                                                        uint32_t byte)
    {
        asm volatile("" : "+r"(byte));  // else its double is kept
        const char* first = p.made.source + uint64_t{entry & kEntry} * p.made.row_stride + 2 * byte;
        const char* below = entry & kBelow ? first + p.made.source_stride : first;
        const uint32_t right = entry & kRight ? p.made.row_stride : 0;
        corner[0] = load(first);
        corner[1] = load(first + right);
        corner[2] = load(below);
        corner[3] = load(below + right);
    }

    __device__ __forceinline__ static float2 load(const char* from)
    {
        return __ldg(reinterpret_cast<const float2*>(from));
    }

    /// Of two channels.
    __device__ __forceinline__ static float2 interpolate(float2 a, float2 b, float weight)
    {
        return make_float2(cips::interpolate(a.x, b.x, weight), cips::interpolate(a.y, b.y, weight));
    }
};

}  // namespace cips
