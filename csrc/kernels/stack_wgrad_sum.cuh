// Adds up what stack_wgrad_kernel left in pieces, in the order of the pixels: the same bits every run.
#pragma once

#include "tile/wgrad_params.h"

namespace cips {

constexpr int kWgradSumThreads = kWgradTile;
constexpr int kWgradSumRows = 8;  // of a tile, a block

/// Grid: [sums][kWgradTile / kWgradSumRows]; a thread has a column.
__global__ void __launch_bounds__(kWgradSumThreads) stack_wgrad_sum_kernel(const __grid_constant__ WgradSumParams p)
{
    const WgradSum s = p.sums[blockIdx.x];
    const WgradRun& run = p.runs[s.run];
    const int column = threadIdx.x, row = blockIdx.y * kWgradSumRows;
    if (s.input + column >= run.in_features) return;
    if (s.output < 0) {  // a ToRGB's: a colour is the sum of its columns, rounded and rest
        if (row > 0) return;
        for (int c = 0; c < p.channels; ++c) {
            float sum = 0.0f;
            for (int i = 0; i < s.count; ++i) {
                const float* part = p.colour_parts + int64_t{s.first + i} * kColourColumns * kWgradTile + column;
                sum += part[c * kWgradTile] + part[(c + kMaxRgbChannels) * kWgradTile];
            }
            p.n[s.place + int64_t{c} * s.row_stride + s.input + column] = sum * p.colour_scale;
        }
        return;
    }
    for (int r = row; r < row + kWgradSumRows && s.output + r < run.out_features; ++r) {
        float sum = 0.0f;
        for (int i = 0; i < s.count; ++i) {
            sum += p.pieces[(int64_t{s.first + i} * kWgradTile + r) * kWgradTile + column];
        }
        p.n[s.place + int64_t{s.output + r} * run.row_stride + s.input + column] = sum;
    }
}

}  // namespace cips
