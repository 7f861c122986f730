// M = d V, V = c s W, d_i = rsqrt(sum_j V_ij^2 + eps): the modulated weights of all matrices of a stack, one
// launch.
//
// A warp owns one row i (at most kTileColumns of its columns) and holds c W in registers for kForwardImages
// images, so per image it reads only the style, from L1, and writes the row, 16 bytes a lane. The write of M
// bounds it. Rows wider than kTileColumns are cut into several tiles, each of which sums the whole row again.
#pragma once

#include "tile/find_matrix.cuh"
#include "tile/reduce.cuh"
#include "tile/vector.cuh"

namespace cips {

/// sum_j (c s_j W_ij)^2 over the whole row, for rows that do not fit the registers of a warp.
template <bool kVector>
__device__ __forceinline__ float squares_of_row(const float* weight, const float* style, float scale, int columns,
                                                int lane)
{
    float sum = 0.0f;
#pragma unroll(kVector ? 4 : 1)
    for (int column = 4 * lane; column < columns; column += 128) {
        const float4 scaled = mul4(load4<kVector>(weight, column, columns), scale);
        const float4 v = mul4(load4<kVector>(style, column, columns), scaled);
        sum = dot4(v, v, sum);
    }
    return sum;
}

template <typename T, bool kVector>
__device__ __forceinline__ void modulate_row(const MatrixEntry& matrix, const float* __restrict__ weights,
                                             const float* __restrict__ styles, T* __restrict__ mods,
                                             int64_t style_stride, int batch, int first_image, int row,
                                             int first_column, float eps)
{
    constexpr int kQuads = 4 / sizeof(T);  // float4 a lane turns into 16 bytes of output
    constexpr int kChunk = 32 * 4 * kQuads;
    constexpr int kChunks = kTileColumns / kChunk;
    const int lane = threadIdx.x % 32;
    const int columns = matrix.in_features;
    const int lane_column = first_column + 4 * kQuads * lane;
    const float* weight = weights + matrix.weight_offset + static_cast<int64_t>(row) * columns;

    float4 scaled[kChunks][kQuads];  // c W
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
            const int column = lane_column + chunk * kChunk + 4 * quad;
            scaled[chunk][quad] = mul4(load4<kVector>(weight, column, columns), matrix.scale);
        }
    }

    const int last_image = min(first_image + kForwardImages, batch);
    for (int image = first_image; image < last_image; ++image) {
        const float* style = styles + image * style_stride + matrix.style_offset;
        float4 v[kChunks][kQuads];
        float sum = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
            for (int quad = 0; quad < kQuads; ++quad) {
                const int column = lane_column + chunk * kChunk + 4 * quad;
                v[chunk][quad] = mul4(load4<kVector>(style, column, columns), scaled[chunk][quad]);
                sum = dot4(v[chunk][quad], v[chunk][quad], sum);
            }
        }
        float demodulation = 1.0f;
        if (matrix.demodulate) {
            if (columns > kTileColumns) sum = squares_of_row<kVector>(weight, style, matrix.scale, columns, lane);
            demodulation = rsqrtf(warp_sum(sum) + eps);
        }
        const int64_t out_row = static_cast<int64_t>(image) * matrix.out_features + row;
        T* out = mods + matrix.mod_offset + out_row * matrix.row_stride;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int column = lane_column + chunk * kChunk;
            if (column >= matrix.row_stride) continue;
            float4 m[kQuads];
#pragma unroll
            for (int quad = 0; quad < kQuads; ++quad) {
                m[quad] = keep_below(mul4(v[chunk][quad], demodulation), column + 4 * quad, columns);
            }
            *reinterpret_cast<uint4*>(out + column) = pack16<T>(m);
        }
    }
}

/// Grid: one block a tile; the tiles of a matrix run over images first, then column blocks, then row blocks.
/// weights, styles: float32, flat and [B, style_stride]; aligned: both, and style_stride, allow 16-byte
/// loads. mods: 16-byte aligned; each matrix [B, O, row_stride], columns from I on become zero.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 3)
    modulate_fwd_kernel(const __grid_constant__ MatrixTable table, const float* weights, const float* styles, T* mods,
                        int64_t style_stride, int batch, float eps, bool aligned)
{
    const int tile = static_cast<int>(blockIdx.x);
    const int index = find_matrix(table, tile);
    const MatrixEntry& matrix = table.entries[index];
    const int groups = (batch + kForwardImages - 1) / kForwardImages;
    const int local = tile - table.first_tile[index];
    const int block = local / groups;
    const int first_image = local % groups * kForwardImages;
    const int first_column = block % matrix.column_blocks * kTileColumns;
    const int row = block / matrix.column_blocks * kTileRows + threadIdx.x / 32;
    if (row >= matrix.out_features) return;

    if (aligned && matrix.vectorizable) {
        modulate_row<T, true>(matrix, weights, styles, mods, style_stride, batch, first_image, row, first_column, eps);
    } else {
        modulate_row<T, false>(matrix, weights, styles, mods, style_stride, batch, first_image, row, first_column, eps);
    }
}

}  // namespace cips
