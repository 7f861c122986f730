// What stack_chain_kernel reads, from parameters and styles: slabs of transposed modulated weights, and the ToRGBs.
//
// The gain of the layers goes into the weights: the chain's gradients are those at the sums over g.
#pragma once

#include "kernels/stack_pack.cuh"

namespace cips {

struct ChainPackParams {
    const float* weights;
    const float* styles;
    int64_t style_stride;
    char* slabs;
    int64_t slab_stride;
    char* records;
    int64_t record_stride;
    float eps;
    float gain;
    int32_t batch;
    int32_t channels;
    int32_t image_records;
    int32_t depth;
    int32_t rgb_count;
    int32_t slab_blocks;  // blocks that pack slabs, for each image
    bool demodulate;
    StackLayer layers[kMaxStackLayers];  // of the chain: in_features are the forward matrix's rows
    StackRgb rgbs[kMaxStackRgbs];        // layer: the forward's
};

static_assert(sizeof(ChainPackParams) <= 4096, "kernel arguments must fit 4 KB");

constexpr int kChainWarps = kPackThreads / 32;

/// The block's rows of one forward matrix, those of slab `slab` of the chain's layer, in one chunk of one image. Blocks
/// of whole slabs and several images are too few to hide the latency of their loads; the sums of squares are made anew.
template <typename T>
__device__ __forceinline__ void pack_transposed(const ChainPackParams& p, const StackLayer& l, int slab, int chunk,
                                                int image)
{
    __shared__ __align__(16) char tile[kSlabBytes];
    __shared__ float factors[kSlab];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale = rsqrtf(static_cast<float>(l.out_features));
    const int rows = min(kSlab, l.in_features - kSlab * slab);  // that exist
    const float* weight = p.weights + l.weight_offset + static_cast<int64_t>(kSlab) * slab * l.out_features;
    const float* style = p.styles + image * p.style_stride + l.style_offset;
    for (int row = warp; row < rows; row += kChainWarps) {
        float sum = 0.0f;
        for (int j = lane; j < l.out_features; j += 32) {
            const float v = __ldg(weight + row * l.out_features + j) * scale * __ldg(style + j);
            sum = fmaf(v, v, sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) factors[row] = p.gain * scale * (p.demodulate ? rsqrtf(sum + p.eps) : 1.0f);
    }
    __syncthreads();
    for (int pair = 2 * warp; pair < kSlab; pair += 2 * kChainWarps) {
#pragma unroll
        for (int m = 0; m < kChunk; m += 32) {
            const int j = m + lane, channel = kChunk * chunk + j;
            float v[2] = {};
            if (channel < l.out_features) {
                const float s = __ldg(style + channel);
                for (int e = 0; e < 2; ++e) {
                    if (pair + e >= rows) continue;
                    v[e] = __ldg(weight + (pair + e) * l.out_features + channel) * s * factors[pair + e];
                }
            }
            *reinterpret_cast<uint32_t*>(tile + j * 128 + ((pair / 8 ^ j % 8) << 4) + pair % 8 * 2) =
                pack_pair(v[0], v[1], T());
        }
    }
    __syncthreads();
    char* out = p.slabs + image * p.slab_stride + l.slab_offset + int64_t{chunk * l.slabs + slab} * kSlabBytes;
    for (int i = threadIdx.x; i < kSlabBytes / 16; i += kPackThreads) {
        reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(tile)[i];
    }
}

/// One record, by a warp: for each of a chunk's channels the weights of the colours, twice.
template <typename T>
__device__ __forceinline__ void pack_chain_record(const ChainPackParams& p, int image, int number)
{
    int index = 0, before = 0;
    while (!p.layers[index].rgb || before + p.layers[index].chunks <= number) {
        before += p.layers[index].rgb ? p.layers[index].chunks : 0;
        ++index;
    }
    const StackLayer& l = p.layers[index];
    const float scale = rsqrtf(static_cast<float>(l.out_features));
    auto* record = reinterpret_cast<uint4*>(p.records + image * p.record_stride +
                                            static_cast<int64_t>(number) * ChainShape::kRecordBytes);
    for (int j = threadIdx.x % 32; j < kChunk; j += 32) {
        const int channel = (number - before) * kChunk + j;
        float sum[kMaxRgbChannels] = {};
        for (int k = 0; k < p.rgb_count && channel < l.out_features; ++k) {
            const StackRgb& r = p.rgbs[k];
            if (r.layer != l.number) continue;
            const float s = scale * p.styles[image * p.style_stride + r.style_offset + channel];
#pragma unroll
            for (int c = 0; c < kMaxRgbChannels; ++c) {
                if (c >= p.channels) continue;
                sum[c] += s * p.weights[r.weight_offset + static_cast<int64_t>(c) * l.out_features + channel];
            }
        }
        record[j] = make_uint4(pack_pair(sum[0], sum[1], T()), pack_pair(sum[2], sum[0], T()),
                               pack_pair(sum[1], sum[2], T()), 0);
    }
}

/// Grid: a block for each slab of 64 rows of the layers' matrices, chunk and image, then records, eight a block.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) stack_chain_pack_kernel(const __grid_constant__ ChainPackParams p)
{
    int block = blockIdx.x;
    if (block < p.slab_blocks * p.batch) {
        int tile = block / p.batch, index = 0;
        while (tile >= p.layers[index].slabs * p.layers[index].chunks) {
            tile -= p.layers[index].slabs * p.layers[index].chunks;
            ++index;
        }
        const StackLayer& l = p.layers[index];
        pack_transposed<T>(p, l, tile % l.slabs, tile / l.slabs, block % p.batch);
        return;
    }
    block -= p.slab_blocks * p.batch;
    const int record = block * kChainWarps + threadIdx.x / 32;
    if (record < p.batch * p.image_records) {
        pack_chain_record<T>(p, record / p.image_records, record % p.image_records);
    }
}

}  // namespace cips
