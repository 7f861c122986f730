// A warp's rows of a matrix of up to 512 float32 columns, times vectors.
#pragma once

#include <cstdint>

namespace cips {

constexpr int kRowColumns = 512;

__device__ __forceinline__ float dot(float4 a, float4 b, float sum)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/// Sums four values over the warp's lanes; the lane gets the sum of value (lane / 8).
__device__ __forceinline__ float sum_rows(const float (&v)[4])
{
    const int lane = threadIdx.x % 32;
    const bool high = lane & 16, odd = lane & 8;
    float a = (high ? v[2] : v[0]) + __shfl_xor_sync(~0u, high ? v[0] : v[2], 16);
    float b = (high ? v[3] : v[1]) + __shfl_xor_sync(~0u, high ? v[1] : v[3], 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
#pragma unroll
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

/// Two values; the lane gets the sum of value (lane / 16).
__device__ __forceinline__ float sum_rows(const float (&v)[2])
{
    const bool high = threadIdx.x & 16;
    float sum = (high ? v[1] : v[0]) + __shfl_xor_sync(~0u, high ? v[0] : v[1], 16);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

/// Lane holds columns 128 j + 4 lane + 0..3.
template <int kRows>
struct MatrixRows {
    static constexpr int kLanes = 32 / kRows;  // that end up with one row

    float4 rows[kRows][4];
    float bias;  // of row lane / kLanes

    /// Where the lane's first column of a row lies. matrix: [rows][dim], on 16 bytes, dim a multiple of 32.
    __device__ __forceinline__ static const float* place(const float* matrix, int row, int dim)
    {
        return matrix + static_cast<int64_t>(row) * dim + 4 * (threadIdx.x % 32);
    }

    /// Rows from the one at `first`, a place, on; those beyond the last of `left` are that again. biases: from the same
    /// row on.
    __device__ __forceinline__ void load(const float* first, const float* biases, int left, int dim)
    {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float* row = first + min(r, left - 1) * dim;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (128 * j + 4 * lane < dim) rows[r][j] = __ldg(reinterpret_cast<const float4*>(row + 128 * j));
            }
        }
        bias = __ldg(biases + min(lane / kLanes, left - 1));
    }

    /// Of row lane / kLanes: its product with a vector, and its bias. The vector may be a kernel's before that this one
    /// overlaps with, so it is read by ordinary loads.
    __device__ __forceinline__ float dot(const float* vector, int dim) const
    {
        const int lane = threadIdx.x % 32;
        float sums[kRows] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int column = 128 * j + 4 * lane;
            if (column >= dim) continue;
            const float4 v = *reinterpret_cast<const float4*>(vector + column);
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[r] = cips::dot(rows[r][j], v, sums[r]);
        }
        return sum_rows(sums) + bias;
    }
};

}  // namespace cips
