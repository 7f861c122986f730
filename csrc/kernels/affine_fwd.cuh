// One matrix times a few vectors, float32: every style of a network from w. y = W x + b.
//
// Behind the mapping network, which leaves most of the device idle, it brings to L2 what that reads, its own matrix to
// registers, and to L2 what the kernel behind reads.
#pragma once

#include "ptx/grid_dependency.cuh"
#include "tile/matrix_rows.cuh"

namespace cips {

constexpr int kAffineThreads = 256;
constexpr int kAffineWarpRows = 4;
constexpr int kAffineRows = kAffineThreads / 32 * kAffineWarpRows;  // of a block
constexpr int kAffineResident = 2;                                  // blocks of a multiprocessor

struct AffineParams {
    const float* x;       // [vectors][dim]
    const float* weight;  // [rows][dim]
    const float* bias;    // [rows]
    float* y;             // [vectors][rows]
    const char* current;  // what the kernel before reads
    int64_t current_bytes;
    const char* upcoming;  // what the kernel behind reads
    int64_t upcoming_bytes;
    int32_t vectors;
    int32_t rows;
    int32_t dim;          // a multiple of 32, at most kRowColumns
    int32_t prefetchers;  // blocks that the device holds at once: the others would come too late
};

/// Grid: a block for each kAffineRows rows. If it is launched to overlap with the kernel before it, weight and bias
/// were written before that began.
__global__ void __launch_bounds__(kAffineThreads, kAffineResident)
    affine_fwd_kernel(const __grid_constant__ AffineParams p)
{
    const int first = (blockIdx.x * (kAffineThreads / 32) + threadIdx.x / 32) * kAffineWarpRows;
    grid_dependents_come();
    const bool prefetches = static_cast<int>(blockIdx.x) < p.prefetchers;
    const int64_t thread = blockIdx.x * kAffineThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(min(static_cast<int>(gridDim.x), p.prefetchers)) * kAffineThreads;
    if (prefetches) prefetch_lines(p.current, p.current_bytes, thread, threads);
    using Rows = MatrixRows<kAffineWarpRows>;
    Rows rows;
    const int begin = min(first, p.rows - 1);
    rows.load(Rows::place(p.weight, begin, p.dim), p.bias + begin, p.rows - begin, p.dim);
    if (prefetches) {
        // registers hold two thirds of the paper's matrix, and less where another kernel still runs
        const int64_t row = int64_t{p.dim} * 4, late = p.rows / 2 * row;
        prefetch_lines(reinterpret_cast<const char*>(p.weight) + p.rows * row - late, late, thread, threads);
        prefetch_lines(p.upcoming, p.upcoming_bytes, thread, threads);
    }
    grid_dependency_wait();
    const int lane = threadIdx.x % 32, row = first + lane / rows.kLanes;
    for (int n = 0; n < p.vectors; ++n) {
        const float y = rows.dot(p.x + static_cast<int64_t>(n) * p.dim, p.dim);
        if (lane % rows.kLanes == 0 && row < p.rows) p.y[static_cast<int64_t>(n) * p.rows + row] = y;
    }
}

}  // namespace cips
