// Backward of M = d V, V = c s W, given N = dL/dM: dW, and of ds the part that each block of rows gives.
//
//   t_i = sum_j N_ij M_ij    dV = d (N - M t)    dW_ij = c sum_b s_bj dV_bij    ds_bj = c sum_i W_ij dV_bij
//
// A warp owns one row i (at most kTileColumns of its columns) and walks over the images in order: dW stays in
// its registers, so no element of it is ever added to by two threads. N streams through shared memory, one
// image ahead. Once read, its place takes c W dV, which the block adds up over its rows: a partial sum of ds
// for modulate_bwd_kernel_styles. The read of N, 4 bytes an element, bounds it. V and d are recomputed in
// float32 from W and s, not read from the rounded M.
#pragma once

#include "ptx/cp_async.cuh"
#include "tile/find_matrix.cuh"
#include "tile/reduce.cuh"
#include "tile/vector.cuh"

namespace cips {

constexpr int kStageQuads = kTileColumns / 4;
// With three stages one barrier an image is enough: the stage that is refilled was last read before it.
constexpr int kGradStages = 3;

struct RowSums {
    float vv;  // sum_j V_ij^2
    float nv;  // sum_j N_ij V_ij
};

/// The sums over the whole row, for rows wider than a tile.
template <bool kVector>
__device__ __forceinline__ RowSums sums_of_row(const float* weight, const float* style, const float* grad, float scale,
                                               int columns, int lane)
{
    RowSums sums{0.0f, 0.0f};
#pragma unroll(kVector ? 4 : 1)
    for (int column = 4 * lane; column < columns; column += 128) {
        const float4 scaled = mul4(load4<kVector>(weight, column, columns), scale);
        const float4 v = mul4(load4<kVector>(style, column, columns), scaled);
        sums.vv = dot4(v, v, sums.vv);
        sums.nv = dot4(load4<kVector>(grad, column, columns), v, sums.nv);
    }
    return sums;
}

template <bool kVector>
__device__ __forceinline__ void modulate_backward_tile(const MatrixEntry& matrix, const float* __restrict__ weights,
                                                       const float* __restrict__ styles,
                                                       const float* __restrict__ grad_mods,
                                                       float* __restrict__ grad_weights, float* __restrict__ partials,
                                                       int64_t style_stride, int batch, int row_block, int first_column,
                                                       float eps, float4* stages)
{
    constexpr int kChunks = kTileColumns / 128;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int columns = matrix.in_features;
    const int lane_column = first_column + 4 * lane;  // of chunk 0; chunk k is 128 k further
    const int rows = min(kTileRows, matrix.out_features - row_block * kTileRows);
    const bool works = warp < rows;
    const int row = row_block * kTileRows + (works ? warp : 0);
    const float* weight = weights + matrix.weight_offset + static_cast<int64_t>(row) * columns;
    const float* grad = grad_mods + matrix.mod_offset + static_cast<int64_t>(row) * matrix.row_stride;
    const int64_t grad_image = static_cast<int64_t>(matrix.out_features) * matrix.row_stride;

    // A lane fills and reads only its own quads of its warp's row, until the barrier shows them to the block.
    const auto lane_quads = [&](int image) {
        return stages + (image % kGradStages * kTileRows + warp) * kStageQuads + lane;
    };
    const auto prefetch = [&](int image) {
        float4* target = lane_quads(image);
        const float* source = grad + image * grad_image + lane_column;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            if (lane_column + 128 * chunk < columns) cp_async_16(target + 32 * chunk, source + 128 * chunk);
        }
    };

    if (works) prefetch(0);
    cp_async_commit();
    float4 scaled[kChunks];  // c W
    float4 sum_s_dv[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        scaled[chunk] = mul4(load4<kVector>(weight, lane_column + 128 * chunk, columns), matrix.scale);
        sum_s_dv[chunk] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    for (int image = 0; image < batch; ++image) {
        if (works && image + 1 < batch) prefetch(image + 1);
        cp_async_commit();
        if (works) {
            const float* style = styles + image * style_stride + matrix.style_offset;
            float4 s[kChunks];
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                s[chunk] = load4<kVector>(style, lane_column + 128 * chunk, columns);
            }
            cp_async_wait<1>();
            float4* quads = lane_quads(image);
            float4 n[kChunks];
            RowSums sums{0.0f, 0.0f};
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                const int column = lane_column + 128 * chunk;
                n[chunk] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (column < columns) n[chunk] = quads[32 * chunk];
                if constexpr (!kVector) {  // the last quad may hold padding, and that may be NaN
                    n[chunk] = keep_below(n[chunk], column, columns);
                }
                const float4 v = mul4(s[chunk], scaled[chunk]);
                sums.vv = dot4(v, v, sums.vv);
                sums.nv = dot4(n[chunk], v, sums.nv);
            }
            float demodulation = 1.0f;
            float projection = 0.0f;  // M t = V * projection
            if (matrix.demodulate) {
                if (columns > kTileColumns) {
                    sums = sums_of_row<kVector>(weight, style, grad + image * grad_image, matrix.scale, columns, lane);
                }
                demodulation = rsqrtf(warp_sum(sums.vv) + eps);
                projection = demodulation * (demodulation * warp_sum(sums.nv));
            }
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                const float4 pulled = mul4(scaled[chunk], -projection);
                const float4 dv = mul4(fma4(s[chunk], pulled, n[chunk]), demodulation);
                sum_s_dv[chunk] = fma4(s[chunk], dv, sum_s_dv[chunk]);
                if (lane_column + 128 * chunk < columns) quads[32 * chunk] = mul4(scaled[chunk], dv);
            }
        }
        __syncthreads();

        // One float4 of columns a thread, rows in order. No second barrier: see kGradStages.
        const int column = first_column + 4 * static_cast<int>(threadIdx.x);
        if (threadIdx.x < kStageQuads && column < columns) {
            const float4* quads = stages + image % kGradStages * kTileRows * kStageQuads + threadIdx.x;
            float4 sum = quads[0];
#pragma unroll
            for (int other = 1; other < kTileRows; ++other) {
                if (other < rows) sum = add4(sum, quads[other * kStageQuads]);
            }
            const int64_t out = (static_cast<int64_t>(row_block) * batch + image) * matrix.row_stride + column;
            *reinterpret_cast<float4*>(partials + matrix.partial_offset + out) = sum;
        }
    }

    if (works) {
        float* out = grad_weights + matrix.weight_offset + static_cast<int64_t>(row) * columns;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            store4<kVector>(out, lane_column + 128 * chunk, columns, mul4(sum_s_dv[chunk], matrix.scale));
        }
    }
}

/// Grid: one block a tile; the tiles of a matrix run over column blocks first, then row blocks.
/// Shared memory: kGradStages * kTileRows * kStageQuads float4.
/// grad_mods: float32 in the packing of the mods, padding columns undefined; partials: see MatrixEntry. Both
/// 16-byte aligned. aligned: weights, styles, grad_weights and style_stride allow 16-byte accesses.
__global__ void __launch_bounds__(kTileThreads, 2)
    modulate_bwd_kernel_weights(const __grid_constant__ MatrixTable table, const float* weights, const float* styles,
                                const float* grad_mods, float* grad_weights, float* partials, int64_t style_stride,
                                int batch, float eps, bool aligned)
{
    extern __shared__ float4 shared_quads[];
    const int tile = static_cast<int>(blockIdx.x);
    const int index = find_matrix(table, tile);
    const MatrixEntry& matrix = table.entries[index];
    const int local = tile - table.first_tile[index];
    const int row_block = local / matrix.column_blocks;
    const int first_column = local % matrix.column_blocks * kTileColumns;

    if (aligned && matrix.vectorizable) {
        modulate_backward_tile<true>(matrix, weights, styles, grad_mods, grad_weights, partials, style_stride, batch,
                                     row_block, first_column, eps, shared_quads);
    } else {
        modulate_backward_tile<false>(matrix, weights, styles, grad_mods, grad_weights, partials, style_stride, batch,
                                      row_block, first_column, eps, shared_quads);
    }
}

}  // namespace cips
