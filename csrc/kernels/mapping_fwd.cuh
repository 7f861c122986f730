// The mapping network from z to w: normalisation, then fully-connected layers with leaky ReLU, in one launch.
//
//   x = z rsqrt(mean(z^2) + 1e-8)        x = lrelu(W_l x + b_l), l = 0 .. L - 1
//
// On a few vectors it is all latency: layer by layer it costs three launches each, a tenth of an image. A cluster of
// eight blocks takes up to 16 vectors and shares out each layer's rows, four a warp, whose weights come to registers
// while the blocks wait for one another. A result goes to the shared memory of all blocks at once.
#pragma once

#include <cstdint>

#include "ptx/cluster.cuh"
#include "ptx/shared_address.cuh"

namespace cips {

constexpr int kMappingCluster = 8;
constexpr int kMappingWarps = 16;
constexpr int kMappingThreads = 32 * kMappingWarps;
constexpr int kMappingVectors = 16;  // of a cluster
constexpr int kMappingRows = 4;      // of a warp
constexpr int kMappingMaxDim = kMappingCluster * kMappingWarps * kMappingRows;
constexpr int kMappingSharedBytes = 2 * kMappingVectors * kMappingMaxDim * 4;

struct MappingParams {
    const float* z;        // [N][dim]
    const float* weights;  // [L][dim][dim]
    const float* biases;   // [L][dim]
    float* w;              // [N][dim]
    int32_t vectors;
    int32_t layers;
    int32_t dim;  // a multiple of 32, at most kMappingMaxDim
    float negative_slope;
};

/// A warp's rows of one layer: lane holds columns 128 j + 4 lane + 0..3.
struct MappingWeights {
    float4 rows[kMappingRows][4];
    float bias;  // of the row that the lane ends up with, see mapping_sum

    __device__ __forceinline__ void load(const MappingParams& p, int layer, int first_row, int my_row)
    {
        const int lane = threadIdx.x % 32;
        const float* weight = p.weights + (static_cast<int64_t>(layer) * p.dim + first_row) * p.dim;
#pragma unroll
        for (int r = 0; r < kMappingRows; ++r) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = 128 * j + 4 * lane;
                rows[r][j] = column < p.dim ? __ldg(reinterpret_cast<const float4*>(weight + r * p.dim + column))
                                            : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
        }
        bias = __ldg(p.biases + layer * p.dim + first_row + my_row);
    }
};

/// Sums four values over the warp's lanes; the lane gets the sum of value (lane / 8).
__device__ __forceinline__ float mapping_sum(const float (&v)[kMappingRows])
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

__device__ __forceinline__ float dot(float4 a, float4 b, float sum)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/// Grid: a cluster for each kMappingVectors vectors.
__global__ void __cluster_dims__(kMappingCluster, 1, 1) __launch_bounds__(kMappingThreads, 1)
    mapping_fwd_kernel(const __grid_constant__ MappingParams p)
{
    extern __shared__ float4 memory[];  // [2][kMappingVectors][dim]
    auto* x = reinterpret_cast<float*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.x / kMappingCluster * kMappingVectors;
    const int count = min(kMappingVectors, p.vectors - first);
    const int first_row = (cluster_rank() * (p.dim / 32) + warp) * kMappingRows;  // a block has dim / 8 rows
    const int row = first_row + lane / 8;
    const bool works = warp < p.dim / 32;

    if (warp < count) {  // normalise one vector a warp
        const float* z = p.z + static_cast<int64_t>(first + warp) * p.dim;
        float sum = 0.0f;
        for (int i = lane; i < p.dim; i += 32) sum = fmaf(z[i], z[i], sum);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        const float scale = rsqrtf(sum / static_cast<float>(p.dim) + 1e-8f);
        for (int i = lane; i < p.dim; i += 32) x[warp * p.dim + i] = z[i] * scale;
    }
    __syncthreads();
    cluster_sync();  // every block of the cluster runs before anybody writes to it

    MappingWeights weights;
    if (works) weights.load(p, 0, first_row, lane / 8);
    for (int layer = 0; layer < p.layers; ++layer) {
        const bool last = layer + 1 == p.layers;
        const float* in = x + (layer % 2) * kMappingVectors * p.dim;
        float* out = x + ((layer + 1) % 2) * kMappingVectors * p.dim;
        if (works) {
            for (int n = 0; n < count; ++n) {
                float sums[kMappingRows] = {};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int column = 128 * j + 4 * lane;
                    if (column >= p.dim) continue;
                    const float4 v = *reinterpret_cast<const float4*>(in + n * p.dim + column);
#pragma unroll
                    for (int r = 0; r < kMappingRows; ++r) sums[r] = dot(weights.rows[r][j], v, sums[r]);
                }
                float y = mapping_sum(sums) + weights.bias;
                y = y > 0.0f ? y : y * p.negative_slope;
                if (!last) {
                    // eight lanes hold each row: one for each block
                    store_cluster(shared_address(out + n * p.dim + row), lane % 8, y);
                } else if (lane % 8 == 0) {
                    p.w[static_cast<int64_t>(first + n) * p.dim + row] = y;
                }
            }
            if (!last) weights.load(p, layer + 1, first_row, lane / 8);  // on their way while the blocks wait
        }
        if (!last) cluster_sync();
    }
}

}  // namespace cips
