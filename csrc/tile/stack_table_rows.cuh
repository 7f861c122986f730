// Rows of the streamed input from a table of float32 vectors, interpolated at each pixel's coordinates: what
// table_lookup_kernel makes, in the registers that producers have.
#pragma once

#include "ptx/cache_hint.cuh"
#include "tile/pixel_coordinates.cuh"
#include "tile/stack_made.cuh"
#include "tile/table_interpolation.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T>
struct TableRows {
    static constexpr bool kMakes = true;
    static constexpr uint32_t kBuffers = 1;

    /// A warp takes 32 rows side by side; of an image larger than its table they come in runs between the same entries.
    /// Each lane finds the place of one row; then it takes four channels of all. It holds what it made of a run's left
    /// and right column of the table, one interpolation away from any row of the run; the next run mostly begins with
    /// the column that this one ends with. Places kept in memory cost 300 cycles a row.
    ///
    /// No lane leaves a loop before the others, and the compiler can tell: a shuffle then is one instruction, not
    /// three.
    template <bool kFirst>
    __device__ __forceinline__ static void make(const StackParams& p, uint32_t shared)
    {
        constexpr uint32_t kSplit = kMadeSplit<kFirst>;
        bool second = false;  // group
#pragma unroll 1
        do {
            const Place mine = place_of<kFirst>(p, shared, second);
            // by the length of the table's rows, which is twice the others': row_bytes would be kept for it
#pragma unroll 1
            for (uint32_t begin = maker<kFirst>() % kSplit * kMadeWarpBytes; 2 * begin < p.made.row_stride;
                 begin += kSplit * kMadeWarpBytes) {
                const uint32_t byte = lane_byte(p, begin);
                char* to = made_byte(p, group_row<TableRows, kFirst>(shared, second), byte);
                asm volatile("" : "+l"(to));  // a whole address, not the parts that it was made of
                float left[kMadeLaneChannels], right[kMadeLaneChannels] = {};
                uint32_t row = 0;
#pragma unroll 1
                do {
                    const int entry = __shfl_sync(~0u, mine.entry, row);
                    const float y = __shfl_sync(~0u, mine.y, row);
                    if (!is_marked(y)) load_column(right, p, to, entry >> 1, y);
#pragma unroll
                    for (int c = 0; c < kMadeLaneChannels; ++c) left[c] = right[c];
                    load_column(right, p, to, (entry + 1) >> 1, y);
                    float x;
#pragma unroll 1
                    do {
                        x = __shfl_sync(~0u, mine.x, row);
                        store(bytes_beyond(to, row, p.made.row_bytes), left, right, x);
                        ++row;
                    } while (!is_marked(x));
                } while (row < 32);
            }
            second = !second;
        } while (second && !kFirst);
    }

private:
    /// Where a row lies in the table. Weights are of the second of two entries; their signs are marks.
    struct Place {
        int entry;  // twice its number less that of the group's first row, and 1 if the entry right of it is read
        float x;    // marked: the next row begins a run
        float y;    // marked: this row's left column is the right one of the row before
    };

    __device__ __forceinline__ static bool is_marked(float weight) { return __float_as_int(weight) < 0; }

    /// By its bits: the sign of a NaN is one as well.
    __device__ __forceinline__ static float marked(float weight, bool mark)
    {
        return __uint_as_float((__float_as_uint(weight) & 0x7fffffff) | uint32_t{mark} << 31);
    }

    /// Of the group's row of this lane's number.
    template <bool kFirst>
    __device__ __forceinline__ static Place place_of(const StackParams& p, uint32_t shared, bool second)
    {
        const uint32_t row = group_row<TableRows, kFirst>(shared, second);
        const int2 unit = made_unit<kFirst>(p, shared);
        const uint32_t pixel = made_pixel(p, unit.y, row + maker_thread() % 32);
        Place place{-2 * static_cast<int>(row), 0.0f, 0.0f};
#pragma unroll
        for (int axis = 0; axis < 2; ++axis) {
            int count = axis ? p.made.rows : p.made.columns;
            asm volatile("" : "+r"(count));  // else what is made of it is kept for the next rows
            const Neighbours n = neighbours(small_pixel_coordinate(p.places, unit.x, pixel, axis), count, p.made.exact);
            place.entry += 2 * (axis ? n.first * p.made.columns : n.first);
            // with a weight of 0 the second is not read, and the first stands for it
            if (!axis && n.weight != 0.0f && n.second > n.first) ++place.entry;
            (axis ? place.y : place.x) = n.weight;
        }
        const int entry = __shfl_up_sync(~0u, place.entry, 1);
        const uint32_t y = __shfl_up_sync(~0u, __float_as_uint(place.y), 1);
        const bool level = maker_thread() % 32 != 0 && y == __float_as_uint(place.y);
        const uint32_t starts = __ballot_sync(~0u, !level || entry != place.entry);
        place.x = marked(place.x, __funnelshift_r(starts, starts, maker_thread() + 1) & 1);
        place.y = marked(place.y, level && entry + 2 == (place.entry | 1));
        return place;
    }

    /// Of a column: an entry, of the number that Place has, and that below it, interpolated. The channels at a made
    /// byte's address lie at twice that of the table.
    __device__ __forceinline__ static void load_column(float (&v)[kMadeLaneChannels], const StackParams& p, char* byte,
                                                       int entry, float y)
    {
        const uint64_t upper =
            p.made.table + 2 * reinterpret_cast<uint64_t>(bytes_beyond(byte, entry, p.made.row_bytes));
        const uint64_t lower = upper + (y != 0.0f ? p.made.source_stride : 0);
        const float4 a = load_evicted_first(reinterpret_cast<const float4*>(upper));
        const float4 b = load_evicted_first(reinterpret_cast<const float4*>(lower));
        v[0] = interpolate(a.x, b.x, fabsf(y));
        v[1] = interpolate(a.y, b.y, fabsf(y));
        v[2] = interpolate(a.z, b.z, fabsf(y));
        v[3] = interpolate(a.w, b.w, fabsf(y));
    }

    __device__ __forceinline__ static void store(char* to, const float (&left)[kMadeLaneChannels],
                                                 const float (&right)[kMadeLaneChannels], float x)
    {
        float v[kMadeLaneChannels];
#pragma unroll
        for (int c = 0; c < kMadeLaneChannels; ++c) v[c] = interpolate(left[c], right[c], fabsf(x));
        store_evicted_last(reinterpret_cast<uint2*>(to),
                           make_uint2(pack_pair(v[0], v[1], T()), pack_pair(v[2], v[3], T())));
    }
};

}  // namespace cips
