// What stack_fwd_kernel reads, from parameters and styles: slabs of modulated weights, records of chunks, Fourier
// weights, the sum of the ToRGB biases. One launch.
//
// The gain g and the leaky ReLU's factor 1 - s (see leaky_relu.cuh) of each layer go into the weights of the next and
// into the ToRGBs that read it. A warp packs one row of a layer, padding included, for kPackImages images.
#pragma once

#include "ptx/grid_dependency.cuh"
#include "tile/reduce.cuh"
#include "tile/stack_layout.h"
#include "tile/vector.cuh"

namespace cips {

using Plain = StackShape<1>;

constexpr int kPackThreads = 256;
constexpr int kPackImages = 4;
constexpr int kMaxStackRgbs = 24;
constexpr float kSqrtHalf = 0.707106781f;

struct StackPackParams {
    const float* weights;
    const float* styles;
    int64_t style_stride;
    int64_t kind_stride;  // blends: floats from one of an image's styles to the next
    const float* biases;
    const float* strengths;       // [L]
    const float* fourier_weight;  // [F][2]; null: the input is given
    const float* fourier_bias;    // [F]
    char* slabs;
    int64_t slab_stride;
    char* records;
    int64_t record_stride;
    float4* fourier;   // [register_slabs][Plain::kFourierSlab]
    void* row_styles;  // blends: [B][kinds] rows of the streamed channels' styles, of whole 16 bytes; or null
    float* rgb_bias;   // [kMaxRgbChannels]
    float eps;
    float fold;  // g (1 - s)
    int32_t batch;
    int32_t channels;
    int32_t register_inputs;  // channels of the first layer's input held in registers
    int32_t register_slabs;
    int32_t streamed_slabs;
    int32_t row_blocks;  // blocks that pack rows, for each group of images
    int32_t record_blocks;
    int32_t image_records;
    int32_t depth;
    int32_t rgb_count;
    int32_t kinds;     // blends: styles an image
    uint64_t vectors;  // a bit a layer: whether its rows of weights and styles start on 16 bytes
    bool demodulate;
    StackLayer layers[kMaxStackLayers];
    StackRgb rgbs[kMaxStackRgbs];
};

static_assert(sizeof(StackPackParams) <= 4096, "kernel arguments must fit 4 KB");

/// Eight channels of a row from logical channel `first`, a multiple of four; those from `count` on are zero.
/// vectors: the row starts on 16 bytes.
__device__ __forceinline__ void load_channels(float (&v)[8], const float* row, int first, int count, bool vectors)
{
    if (vectors && first + 8 <= count) {
        const float4 low = __ldg(reinterpret_cast<const float4*>(row + first));
        const float4 high = __ldg(reinterpret_cast<const float4*>(row + first) + 1);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = first + e < count ? __ldg(row + first + e) : 0.0f;
}

/// Bytes from the start of a layer's slabs to a row's line in slab `order` of its chunk. kBlends: past layer 0 two
/// slabs of 64 outputs a slot.
template <bool kBlends>
__device__ __forceinline__ int line_of(const StackLayer& l, int index, int row, int order)
{
    const int chunk = row / kChunk + l.skip_chunks;
    if (!kBlends || index == 0) return (chunk * l.slabs + order) * kSlabBytes + row % kChunk * 128;
    constexpr int kOutputs = BlendShape::kOutputs;
    const int half = row / kOutputs % kHalves, slot = l.slots / kHalves * half + order / 2;
    return (chunk * l.slots + slot) * kSlabBytes + (order % 2 * kOutputs + row % kOutputs) * 128;
}

/// Half of a row of up to 1,024 inputs, padding included: lane owns the 8-channel groups lane and lane + 32 of it. Two
/// halves at once would take twice the registers of all rows, whose loads are then under way at the same time.
template <typename T, bool kBlends>
struct PackedHalf {
    static constexpr int kGroups = 2;
    static constexpr int kHalves = 2;
    static constexpr int kSlabs = 32 * kGroups * 8 / kSlab;  // of a half

    float w[kGroups][8];
    int place[kGroups];

    __device__ __forceinline__ void load(const StackPackParams& p, int index, int row, int half)
    {
        const StackLayer& l = p.layers[index];
        const int held_slabs = index == 0 ? p.register_slabs : l.slabs;
        const int streamed = l.slabs - held_slabs;
        load_row(w, p.weights + l.weight_offset + static_cast<int64_t>(row) * l.in_features, p, index, row, half);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int slab = group_of(half, i) / 8;
            const bool in_registers = slab < held_slabs;
            // a streamed slab, then one in registers, as long as there are both
            const int number = in_registers ? slab : slab - held_slabs;
            const int order =
                slab < l.slabs ? number + (in_registers ? min(number + 1, streamed) : min(number, held_slabs)) : slab;
            place[i] = line_of<kBlends>(l, index, row, order);
        }
    }

    /// The weights, scaled and times an image's style; their squares are added to `sum`.
    __device__ __forceinline__ void modulate(float (&v)[kGroups][8], float& sum, const StackPackParams& p, int index,
                                             int row, int half, int image) const
    {
        const StackLayer& l = p.layers[index];
        if (!kBlends) load_row(v, p.styles + image * p.style_stride + l.style_offset, p, index, row, half);
        const float scale = rsqrtf(static_cast<float>(l.in_features));
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                v[i][e] = kBlends ? w[i][e] * scale : v[i][e] * (w[i][e] * scale);
                sum = fmaf(v[i][e], v[i][e], sum);
            }
        }
    }

    __device__ __forceinline__ void store(const float (&v)[kGroups][8], float factor, const StackPackParams& p,
                                          int index, int row, int half, int image) const
    {
        const StackLayer& l = p.layers[index];
        const int held_slabs = index == 0 ? p.register_slabs : l.slabs;
        // what only fills a slot is zero: nobody multiplies with it, but it travels
        const int written = kBlends && index > 0 ? (l.slabs + 1) / 2 * 2 : l.slabs;
        char* slabs = p.slabs + image * p.slab_stride + l.slab_offset;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int group = group_of(half, i);
            if (group / 8 >= written) continue;
            uint32_t pairs[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) pairs[e] = pack_pair(v[i][2 * e] * factor, v[i][2 * e + 1] * factor, T());
            char* line = slabs + place[i];
            if (index == 0 && group / 8 < held_slabs) {  // the order of stack_input.cuh along K
                const int t = group % 8 / 2;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int unit = 4 * (group % 2) + e;  // 2 s + h
                    *reinterpret_cast<uint32_t*>(line + ((unit ^ row % 8) << 4) + 4 * t) = pairs[e];
                }
            } else {
                *reinterpret_cast<uint4*>(line + ((group % 8 ^ row % 8) << 4)) =
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }

private:
    __device__ __forceinline__ static int group_of(int half, int i)
    {
        return threadIdx.x % 32 + 32 * (kGroups * half + i);
    }

    /// The half's channels of a row of weights or of its styles; zeros where `row` or the channel does not exist.
    __device__ __forceinline__ static void load_row(float (&v)[kGroups][8], const float* from, const StackPackParams& p,
                                                    int index, int row, int half)
    {
        const StackLayer& l = p.layers[index];
        const int held_slabs = index == 0 ? p.register_slabs : l.slabs;
        const int held = index == 0 ? p.register_inputs : l.in_features;
        const bool vectors = p.vectors >> index & 1 && held % 4 == 0, exists = row < l.out_features;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int group = group_of(half, i);
            const bool in_registers = group / 8 < held_slabs;
            const int first = in_registers ? 8 * group : held + 8 * (group - 8 * held_slabs);
            const int limit = !exists || group / 8 >= l.slabs ? 0 : in_registers ? held : l.in_features;
            load_channels(v[i], from, first, limit, vectors);
        }
    }
};

/// One row, by a warp. Blends: without a style, for all images.
template <typename T, bool kBlends>
__device__ __forceinline__ void pack_row(const StackPackParams& p, int index, int row, int first_image)
{
    using Half = PackedHalf<T, kBlends>;
    const StackLayer& l = p.layers[index];
    const float fold = index == 0 ? 1.0f : p.fold * (l.after_block ? kSqrtHalf : 1.0f);
    const bool demodulates = !kBlends && p.demodulate && row < l.out_features;
    const int last_image = kBlends ? 1 : min(first_image + kPackImages, p.batch);
    const auto factor = [&](float sum) {
        // a row that does not exist is zero times a finite number, also where eps is zero
        return fold * (demodulates ? rsqrtf(warp_sum(sum) + p.eps) : 1.0f);
    };
    Half half;
    float v[Half::kGroups][8];
    if (l.slabs <= Half::kSlabs) {
        half.load(p, index, row, 0);
#pragma unroll 1
        for (int image = first_image; image < last_image; ++image) {
            float sum = 0.0f;
            half.modulate(v, sum, p, index, row, 0, image);
            half.store(v, factor(sum), p, index, row, 0, image);
        }
        return;
    }
#pragma unroll 1
    for (int image = first_image; image < last_image; ++image) {
        float sum = 0.0f;
#pragma unroll 1
        for (int i = kBlends ? Half::kHalves : 0; i < 2 * Half::kHalves; ++i) {  // their sum, then each again
            half.load(p, index, row, i % Half::kHalves);
            float again = 0.0f;
            half.modulate(v, i < Half::kHalves ? sum : again, p, index, row, i % Half::kHalves, image);
            if (i < Half::kHalves) continue;
            half.store(v, factor(sum), p, index, row, i % Half::kHalves, image);
        }
    }
}

/// The layer that ends the residual block which begins with layer `index`.
__device__ __forceinline__ int skip_end(const StackPackParams& p, int index)
{
    while (!p.layers[index].adds_skip) ++index;
    return index;
}

/// One row of a residual block's skip, the same for all images: x W^T / sqrt(I), as activations over g (1 - s).
template <typename T>
__device__ __forceinline__ void pack_skip_row(const StackPackParams& p, int index, int row, int first_image)
{
    const StackLayer& l = p.layers[index];
    const float scale = rsqrtf(static_cast<float>(l.in_features)) * (l.after_block ? kSqrtHalf : 1.0f);
    const int rows = p.layers[skip_end(p, index)].out_features;
    const float* weight = p.weights + l.skip_offset + static_cast<int64_t>(row) * l.in_features;
    for (int group = threadIdx.x % 32; group < 8 * l.slabs; group += 32) {
        float v[8];
        load_channels(v, weight, 8 * group, row < rows ? l.in_features : 0, false);
        uint4 packed;
        packed.x = pack_pair(v[0] * scale, v[1] * scale, T());
        packed.y = pack_pair(v[2] * scale, v[3] * scale, T());
        packed.z = pack_pair(v[4] * scale, v[5] * scale, T());
        packed.w = pack_pair(v[6] * scale, v[7] * scale, T());
        const int64_t place = l.slab_offset + int64_t{row / kChunk * l.slabs + group / 8} * kSlabBytes +
                              row % kChunk * 128 + ((group % 8 ^ row % 8) << 4);
        for (int image = first_image; image < min(first_image + kPackImages, p.batch); ++image) {
            *reinterpret_cast<uint4*>(p.slabs + image * p.slab_stride + place) = packed;
        }
    }
}

/// Colour and pair of channels of a record's 16-bit pair.
__device__ __forceinline__ int colour_of(int at)
{
    return at / 4 % kMaxRgbChannels;
}

__device__ __forceinline__ int pair_of(int at)
{
    return at / (4 * kMaxRgbChannels) * 4 + at % 4;
}

/// One record, by a warp. It is all latency, and with the constants the longest of all: loads that nothing keeps from
/// being under way at the same time.
template <typename T>
__device__ __forceinline__ void pack_record(const StackPackParams& p, int image, int number)
{
    const int lane = threadIdx.x % 32;
    int index = 0;
    while (index + 1 < p.depth && p.layers[index + 1].first_record <= number) ++index;
    const StackLayer& l = p.layers[index];
    // the first are of the chunks of a skip, which has neither bias nor noise nor ToRGB
    const int first = (number - l.first_record - l.skip_chunks) * kChunk;  // output channel
    char* record = p.records + image * p.record_stride + static_cast<int64_t>(number) * Plain::kRecordBytes;
    auto* bias = reinterpret_cast<float*>(record + Plain::kBias);
#pragma unroll
    for (int i = 0; i < kChunk; i += 32) {
        const int at = i + lane;
        const int j = at % 4, t = at / 4 % 4, q = at / 16;
        const int channel = first + 16 * q + 2 * t + j % 2 + 8 * (j / 2);
        bias[at] = first >= 0 && channel < l.out_features ? __ldg(p.biases + l.bias_offset + channel) : 0.0f;
    }
    if (lane < 4) {
        reinterpret_cast<float*>(record + Plain::kStrength)[lane] =
            lane == 0 && first >= 0 ? __ldg(p.strengths + index) : 0.0f;
    }
    constexpr int kAtOnce = 3;  // of a lane's pairs of channels
    const float scale = p.fold * (l.adds_skip ? kSqrtHalf : 1.0f) * rsqrtf(static_cast<float>(l.out_features));
#pragma unroll 1
    for (int at = lane; at < kChunk / 2 * kMaxRgbChannels; at += 32 * kAtOnce) {
        float sums[kAtOnce][2] = {};
        for (int k = 0; l.rgb && first >= 0 && k < p.rgb_count; ++k) {
            const StackRgb& r = p.rgbs[k];
            if (r.layer != index) continue;
            const float* styles = p.styles + image * p.style_stride + r.style_offset;
            const float* weights = p.weights + r.weight_offset;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int c = colour_of(at + 32 * i);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int channel = first + 2 * pair_of(at + 32 * i) + e;
                    if (c >= p.channels || channel >= l.out_features) continue;
                    const float weight = __ldg(weights + static_cast<int64_t>(c) * l.out_features + channel);
                    sums[i][e] += scale * __ldg(styles + channel) * weight;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            reinterpret_cast<uint32_t*>(record + Plain::kRgb)[at + 32 * i] = pack_pair(sums[i][0], sums[i][1], T());
        }
    }
    static_assert(kChunk / 2 * kMaxRgbChannels % (32 * kAtOnce) == 0, "every lane has as many pairs");
}

__device__ __forceinline__ void pack_rgb_bias(const StackPackParams& p)
{
    const int c = kPackThreads - 1 - static_cast<int>(threadIdx.x);
    if (c >= kMaxRgbChannels) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < p.rgb_count; ++k) {
        if (c < p.channels) sum += __ldg(p.biases + p.rgbs[k].bias_offset + c);
    }
    p.rgb_bias[c] = sum;
}

__device__ __forceinline__ void pack_constants(const StackPackParams& p)
{
    pack_rgb_bias(p);
    if (p.fourier_weight == nullptr) return;
    auto* out = reinterpret_cast<float*>(p.fourier);
#pragma unroll 6
    for (int i = threadIdx.x; i < 4 * Plain::kFourierSlab * p.register_slabs; i += kPackThreads) {
        const int slab = i / (4 * Plain::kFourierSlab), step = i / 48 % 4, part = i / 16 % 3, t = i / 4 % 4;
        const int channel = kSlab * slab + 16 * t + 4 * step + i % 4;
        float value = 0.0f;
        if (channel < p.register_inputs) {
            value = __ldg(part < 2 ? p.fourier_weight + 2 * channel + part : p.fourier_bias + channel);
        }
        out[i] = value;
    }
}

/// The layer of one of all layers' rows, padding included; `row` becomes the layer's own.
__device__ __forceinline__ int take_layer(const StackPackParams& p, int& row)
{
    int index = 0;
    const auto rows = [&] { return (p.layers[index].skip_chunks + p.layers[index].chunks) * kChunk; };
    while (row >= rows()) {
        row -= rows();
        ++index;
    }
    return index;
}

/// Grid: records, eight a block, one block of constants, then row blocks of eight rows for each group of images: what
/// is short but slow goes first.
template <typename T>
__global__ void __launch_bounds__(kPackThreads, 4) stack_pack_kernel(const __grid_constant__ StackPackParams p)
{
    grid_dependency_wait();
    grid_dependents_come();
    const int warp = threadIdx.x / 32;
    int block = blockIdx.x;
    if (block < p.record_blocks) {
        const int record = block * (kPackThreads / 32) + warp;
        if (record < p.batch * p.image_records) {
            pack_record<T>(p, record / p.image_records, record % p.image_records);
        }
        return;
    }
    block -= p.record_blocks;
    if (block == 0) {
        pack_constants(p);
        return;
    }
    --block;
    const int image_groups = (p.batch + kPackImages - 1) / kPackImages;
    int row = block / image_groups * (kPackThreads / 32) + warp;
    const int index = take_layer(p, row);
    const int skip_rows = p.layers[index].skip_chunks * kChunk;
    if (row < skip_rows) {
        pack_skip_row<T>(p, index, row, block % image_groups * kPackImages);
    } else {
        pack_row<T, false>(p, index, row - skip_rows, block % image_groups * kPackImages);
    }
}

}  // namespace cips
