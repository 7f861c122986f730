// ds_bj = the sum over row blocks of the partial sums that modulate_bwd_kernel_weights left, in a fixed
// order: warp w adds blocks w, w + 8, ...; then the eight sums are added in order.
#pragma once

#include "tile/find_matrix.cuh"
#include "tile/vector.cuh"

namespace cips {

/// Grid: one block for kStyleColumns columns of one image; the tiles of a matrix run over images first, then
/// columns. Shared memory: kTileThreads float4. Writes grad_styles [B, style_stride] at every column that a
/// matrix owns.
__global__ void __launch_bounds__(kTileThreads)
    modulate_bwd_kernel_styles(const __grid_constant__ MatrixTable table, const float* partials, float* grad_styles,
                               int64_t style_stride, int batch)
{
    extern __shared__ float4 shared_quads[];
    const int tile = static_cast<int>(blockIdx.x);
    const int index = find_matrix(table, tile);
    const MatrixEntry& matrix = table.entries[index];
    const int local = tile - table.first_tile[index];
    const int image = local % batch;
    const int first_column = local / batch * kStyleColumns;
    const int columns = matrix.in_features;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;

    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const int quad_column = first_column + 4 * lane;
    if (quad_column < columns) {
        const int64_t block_stride = static_cast<int64_t>(batch) * matrix.row_stride;
        const float* quads =
            partials + matrix.partial_offset + static_cast<int64_t>(image) * matrix.row_stride + quad_column;
#pragma unroll 8
        for (int block = warp; block < matrix.row_blocks; block += kTileRows) {
            sum = add4(sum, __ldg(reinterpret_cast<const float4*>(quads + block * block_stride)));
        }
    }
    shared_quads[threadIdx.x] = sum;
    __syncthreads();

    const int column = first_column + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kStyleColumns && column < columns) {
        const float* sums = reinterpret_cast<const float*>(shared_quads) + threadIdx.x;
        float total = sums[0];
#pragma unroll
        for (int other = 1; other < kTileRows; ++other) total += sums[other * kStyleColumns];
        grad_styles[image * style_stride + matrix.style_offset + column] = total;
    }
}

}  // namespace cips
