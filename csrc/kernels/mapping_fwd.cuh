// The mapping network from z to w: normalisation, then fully-connected layers with leaky ReLU, in one launch.
//
//   x = z rsqrt(mean(z^2) + 1e-8)        x = lrelu(W_l x + b_l), l = 0 .. L - 1
//
// On a few vectors it is all latency: layer by layer it costs three launches each, a tenth of an image. A cluster takes
// up to 16 vectors and shares out each layer's rows, whose weights come to registers while the blocks wait for one
// another: of eight blocks four rows a warp, of sixteen, where the device has so many multiprocessors side by side, two
// rows, and of two layers at once. A result goes to the shared memory of all blocks, whose barriers count its bytes.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_address.cuh"
#include "tile/matrix_rows.cuh"
#include "tile/reduce.cuh"
#include "tile/vector.cuh"

namespace cips {

constexpr int kMappingCluster = 8;  // any device has place for it
constexpr int kMappingLargeCluster = 16;
constexpr int kMappingWarps = 16;
constexpr int kMappingThreads = 32 * kMappingWarps;
constexpr int kMappingVectors = 16;  // of a cluster
constexpr int kMappingSharedBytes = 2 * kMappingVectors * kRowColumns * 4;

struct MappingParams {
    const float* z;        // [N][dim], on 16 bytes
    const float* weights;  // [L][dim][dim]
    const float* biases;   // [L][dim]
    float* w;              // [N][dim]
    int32_t vectors;
    int32_t layers;
    int32_t dim;  // a multiple of 32, at most kRowColumns
    float negative_slope;
};

/// out = z rsqrt(mean(z^2) + 1e-8), by a warp.
__device__ __forceinline__ void normalise(float* out, const float* z, int dim)
{
    const int lane = threadIdx.x % 32;
    float4 v[4];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int column = 128 * j + 4 * lane;
        v[j] = column < dim ? __ldg(reinterpret_cast<const float4*>(z + column)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = dot(v[j], v[j], sum);
    const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(dim) + 1e-8f);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int column = 128 * j + 4 * lane;
        if (column < dim) *reinterpret_cast<float4*>(out + column) = mul4(v[j], scale);
    }
}

/// Grid: a cluster of kBlocks for each kMappingVectors vectors. kDim: the vectors' length, or 0 for any; known when
/// compiled it halves the code.
template <int kBlocks, int kDim>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kMappingThreads, 1)
    mapping_fwd_kernel(const __grid_constant__ MappingParams p)
{
    constexpr int kRows = kRowColumns / (kBlocks * kMappingWarps);  // of a warp
    constexpr int kAhead = kBlocks / kMappingCluster;               // layers whose weights are on their way or there
    using Rows = MatrixRows<kRows>;
    static_assert(Rows::kLanes == kBlocks, "of the lanes that hold a row each sends it to one block");

    const int dim = kDim > 0 ? kDim : p.dim;
    extern __shared__ float4 memory[];  // [2][kMappingVectors][dim]
    __shared__ uint64_t arrivals[2];    // for each half of the memory
    auto* x = reinterpret_cast<float*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.x / kBlocks * kMappingVectors;
    const int count = min(kMappingVectors, p.vectors - first);
    const int first_row = (cluster_rank() * (dim / 32) + warp) * kRows;  // a block has dim / kBlocks rows
    const int row = first_row + lane / kBlocks;
    const bool works = warp < dim / 32;
    const uint32_t arrived = shared_address(arrivals), half = kMappingVectors * dim;
    const auto expect = [&](int layer) {  // the input of a layer, but the first
        if (threadIdx.x == 0 && layer < p.layers) mbarrier_expect(arrived + layer % 2 * 8, count * dim * 4);
    };
    const float* next = Rows::place(p.weights, first_row, dim);  // rows of the layer that is loaded next
    const float* next_bias = p.biases + first_row;
    const auto load = [&](Rows& rows, int layer) {
        if (works && layer < p.layers) rows.load(next, next_bias, kRows, dim);
        next += dim * dim;
        next_bias += dim;
    };

    grid_dependents_come();
    if (threadIdx.x == 0) {
        mbarrier_init(arrived, 1);
        mbarrier_init(arrived + 8, 1);
        mbarrier_fence_init();
    }
    expect(1);
    expect(2);
    Rows weights[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(weights[i], i);
    if (warp < count) normalise(x + warp * dim, p.z + static_cast<int64_t>(first + warp) * dim, dim);
    __syncthreads();
    cluster_meet();  // every block of the cluster runs before anybody writes to it
    const uint32_t target = cluster_address(shared_address(x), lane % kBlocks);
    const uint32_t target_arrived = cluster_address(arrived, lane % kBlocks);

    const auto step = [&](int layer, Rows& rows) {
        const bool last = layer + 1 == p.layers;
        const int out = (layer + 1) % 2;
        if (works) {
            if (layer > 0) mbarrier_wait(arrived + layer % 2 * 8, (layer - 1) / 2 % 2);
            if (layer > 0) expect(layer + 2);
#pragma unroll 1
            for (int n = 0; n < count; ++n) {
                float y = rows.dot(x + layer % 2 * half + n * dim, dim);
                y = y > 0.0f ? y : y * p.negative_slope;
                if (!last) {
                    // whoever still reads this half of the memory has not sent what the sum here needed
                    store_cluster(target + (out * half + n * dim + row) * 4, y, target_arrived + out * 8);
                } else if (lane % kBlocks == 0) {
                    p.w[static_cast<int64_t>(first + n) * dim + row] = y;
                }
            }
        }
        load(rows, layer + kAhead);  // on their way while the others' results come
    };
#pragma unroll 1
    for (int layer = 0; layer < p.layers; layer += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (layer + i < p.layers) step(layer + i, weights[i]);
        }
    }
}

}  // namespace cips
