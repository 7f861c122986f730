// Bilinear interpolation in a table of vectors at the coordinates of pixels: the embeddings that the on-chip stack
// reads beside its Fourier features. A warp takes eight pixels in turn, a lane eight channels of them at a time.
#pragma once

#include "tile/pixel_coordinates.cuh"
#include "tile/table_interpolation.cuh"
#include "tile/vector.cuh"

namespace cips {

constexpr int kLookupThreads = 256;
constexpr int kLookupPixels = 8;  // of a warp, one after the other

struct TableLookupParams {
    const void* table;  // [rows][columns][features]
    int64_t rows;
    int64_t columns;
    int32_t features;
    bool vectors;  // whether entries start on 16 bytes, eight channels at a time
    bool exact;    // -1 and +1 are the centres of the border entries; otherwise the outer edges
    PixelPlaces places;
    void* out;             // [images][P][row_stride]
    int64_t row_stride;    // elements, a multiple of 8
    int64_t batch_stride;  // elements
};

/// What a pixel's columns are made of: the entry above on the left, whether there is a right column, and the weight of
/// what is below.
struct Columns {
    int64_t row, column;
    bool right;
    float y;

    /// By bits, as a NaN.
    __device__ __forceinline__ bool operator==(const Columns& o) const
    {
        return row == o.row && column == o.column && right == o.right && __float_as_uint(y) == __float_as_uint(o.y);
    }
};

template <typename T>
__device__ __forceinline__ void load_entry(float (&v)[8], const T* entry, int channel, int features, bool vectors)
{
    if (vectors) {
        constexpr int kWords = sizeof(T) / 2;  // of 16 bytes
        uint4 words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const uint4*>(entry + channel) + i);
        const T* values = reinterpret_cast<const T*>(words);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = static_cast<float>(values[e]);
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = channel + e < features ? static_cast<float>(entry[channel + e]) : 0.0f;
    }
}

/// Value of another lane.
__device__ __forceinline__ Neighbours shuffle(const Neighbours& n, int lane)
{
    return {__shfl_sync(~0u, n.first, lane), __shfl_sync(~0u, n.second, lane), __shfl_sync(~0u, n.weight, lane)};
}

/// Grid: (blocks over pixels, images).
template <typename T, typename Out>
__global__ void __launch_bounds__(kLookupThreads) table_lookup_kernel(const __grid_constant__ TableLookupParams p)
{
    const int lane = threadIdx.x % 32;
    const int image = blockIdx.y;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (kLookupThreads / 32) + threadIdx.x / 32) * kLookupPixels;
    if (first >= p.places.pixels) return;
    // each lane finds the place of one of the warp's pixels: 64-bit divisions are dear
    const float2 point = pixel_coordinates(p.places, image, first + lane % kLookupPixels);
    const Neighbours my_x = neighbours(point.x, static_cast<int>(p.columns), p.exact);
    const Neighbours my_y = neighbours(point.y, static_cast<int>(p.rows), p.exact);
    const auto* table = static_cast<const T*>(p.table);
    const auto entry = [&](int64_t row, int64_t column) { return table + (row * p.columns + column) * p.features; };
    const auto count = static_cast<int>(min(p.places.pixels - first, int64_t{kLookupPixels}));
    auto* out = static_cast<Out*>(p.out) + image * p.batch_stride + first * p.row_stride;
    for (int base = 0; base < p.features; base += 8 * 32) {
        const int channel = base + 8 * lane;
        // neighbours in an image often lie between the same columns: read and interpolate them once
        float left[8], right[8];
        Columns held{-1, -1, false, 0.0f};
        for (int i = 0; i < kLookupPixels; ++i) {  // every lane takes part in the shuffles
            const Neighbours x = shuffle(my_x, i), y = shuffle(my_y, i);
            if (i >= count || channel >= p.features) continue;
            // a weight of 0 leaves the first as it is: the second needs no reading
            const Columns wanted{y.first, x.first, x.weight != 0.0f, y.weight};
            if (!(held == wanted)) {
                held = wanted;
                const int second = held.right ? x.second : x.first;
                load_entry(left, entry(y.first, x.first), channel, p.features, p.vectors);
                load_entry(right, entry(y.first, second), channel, p.features, p.vectors);
                if (y.weight != 0.0f) {
                    float lower[2][8];
                    load_entry(lower[0], entry(y.second, x.first), channel, p.features, p.vectors);
                    load_entry(lower[1], entry(y.second, second), channel, p.features, p.vectors);
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        left[e] = interpolate(left[e], lower[0][e], y.weight);
                        right[e] = interpolate(right[e], lower[1][e], y.weight);
                    }
                }
            }
            float v[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] = held.right ? interpolate(left[e], right[e], x.weight) : left[e];
            // past L1: the stack reads it from L2
            __stcg(reinterpret_cast<uint4*>(out + i * p.row_stride + channel),
                   make_uint4(pack_pair(v[0], v[1], Out()), pack_pair(v[2], v[3], Out()), pack_pair(v[4], v[5], Out()),
                              pack_pair(v[6], v[7], Out())));
        }
    }
}

}  // namespace cips
