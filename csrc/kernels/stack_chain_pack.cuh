// What stack_chain_kernel reads, from parameters and styles: slabs of transposed modulated weights, and the ToRGBs.
//
// The gain of the layers goes into the weights: the chain's gradients are those at the sums over g.
#pragma once

#include <algorithm>

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
constexpr int kPackRows = 2 * kChainWarps;          // of a forward matrix, by a block
constexpr int kRowParts = kSlab / kPackRows;        // blocks of a slab
constexpr int kPackWidth = kSlab * kRegisterSlabs;  // most columns of a matrix that the chain reads
constexpr int kChainPackBytes = kPackWidth * 2 * kPackRows;
static_assert(kPackRows == 16, "rows of a block are two units of 16 bytes of a line, side by side when swizzled");

/// The block's rows of one forward matrix, part `part` of slab `slab` of the chain's layer, in all chunks of one image.
/// A warp has two rows, whole: every weight is read once, and all of them are under way at once.
template <typename T>
__device__ __forceinline__ void pack_transposed(const ChainPackParams& p, const StackLayer& l, int slab, int part,
                                                int image)
{
    extern __shared__ uint4 chain_units[];  // [unit of a line's two][column]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = kSlab * slab + kPackRows * part + 2 * warp;
    const float scale = rsqrtf(static_cast<float>(l.out_features));
    const float* weight = p.weights + l.weight_offset + static_cast<int64_t>(first) * l.out_features;
    const float* style = p.styles + image * p.style_stride + l.style_offset;
    float v[2][kPackWidth / 32], s[kPackWidth / 32];
#pragma unroll
    for (int m = 0; m < kPackWidth / 32; ++m) {
        const int channel = 32 * m + lane;
        const bool exists = channel < l.out_features;
        s[m] = exists ? __ldg(style + channel) : 0.0f;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            v[e][m] = exists && first + e < l.in_features ? __ldg(weight + e * l.out_features + channel) : 0.0f;
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        float sum = 0.0f;
#pragma unroll
        for (int m = 0; m < kPackWidth / 32; ++m) {
            v[e][m] *= s[m];
            sum = fmaf(v[e][m] * scale, v[e][m] * scale, sum);
        }
        sum = warp_sum(sum);
        // a row that does not exist is zero times a finite number, also where eps is zero
        const bool demodulates = p.demodulate && first + e < l.in_features;
        const float factor = p.gain * scale * (demodulates ? rsqrtf(sum + p.eps) : 1.0f);
#pragma unroll
        for (int m = 0; m < kPackWidth / 32; ++m) v[e][m] *= factor;
    }
    const int unit = warp / 4, pair = warp % 4;
#pragma unroll
    for (int m = 0; m < kPackWidth / 32; ++m) {
        reinterpret_cast<uint32_t*>(chain_units + unit * kPackWidth + 32 * m + lane)[pair] =
            pack_pair(v[0][m], v[1][m], T());
    }
    __syncthreads();
    char* out = p.slabs + image * p.slab_stride + l.slab_offset + int64_t{slab} * kSlabBytes;
    for (int i = threadIdx.x; i < 2 * kChunk * l.chunks; i += kPackThreads) {
        const int channel = i / 2, line = channel % kChunk, from = i % 2;
        char* chunk = out + int64_t{channel / kChunk * l.slabs} * kSlabBytes;
        *reinterpret_cast<uint4*>(chunk + line * 128 + ((2 * part + from ^ line % 8) << 4)) =
            chain_units[from * kPackWidth + channel];
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

/// Grid: a block for each 16 rows of the layers' slabs and image, then records, eight a block. Dynamic shared memory:
/// kChainPackBytes.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) stack_chain_pack_kernel(const __grid_constant__ ChainPackParams p)
{
    int block = blockIdx.x;
    if (block < p.slab_blocks * p.batch) {
        int tile = block / p.batch, index = 0;
        while (tile >= p.layers[index].slabs * kRowParts) {
            tile -= p.layers[index].slabs * kRowParts;
            ++index;
        }
        pack_transposed<T>(p, p.layers[index], tile / kRowParts, tile % kRowParts, block % p.batch);
        return;
    }
    block -= p.slab_blocks * p.batch;
    const int record = block * kChainWarps + threadIdx.x / 32;
    if (record < p.batch * p.image_records) {
        pack_chain_record<T>(p, record / p.image_records, record % p.image_records);
    }
}

/// What a ChainPlan says; tensors and constants are the caller's.
template <typename Plan>
ChainPackParams chain_pack_params(const Plan& plan)
{
    ChainPackParams p{};
    p.slab_stride = plan.slab_bytes;
    p.record_stride = plan.record_bytes;
    p.batch = static_cast<int32_t>(plan.batch);
    p.channels = static_cast<int32_t>(plan.channels);
    p.image_records = static_cast<int32_t>(plan.image_records);
    p.depth = static_cast<int32_t>(plan.layers.size());
    p.rgb_count = static_cast<int32_t>(plan.rgbs.size());
    for (const StackLayer& l : plan.layers) p.slab_blocks += l.slabs * kRowParts;
    std::copy(plan.layers.begin(), plan.layers.end(), p.layers);
    std::copy(plan.rgbs.begin(), plan.rgbs.end(), p.rgbs);
    return p;
}

/// Blocks of its grid.
inline int chain_pack_blocks(const ChainPackParams& p)
{
    return p.slab_blocks * p.batch + (p.image_records * p.batch + kChainWarps - 1) / kChainWarps;
}

}  // namespace cips
