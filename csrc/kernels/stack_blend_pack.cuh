// What stack_blend_fwd_kernel reads of parameters and styles: slabs of weights that are not modulated, the same for all
// images; records, Fourier weights with the styles of layer 0, the sum of the ToRGB biases. One launch.
#pragma once

#include "kernels/stack_pack.cuh"

namespace cips {

/// Column of a record's channel in the order of the accumulators: thread t of a quad holds 16 q + 2 t, + 1 and both
/// + 8.
__device__ __forceinline__ int accumulator_order(int channel)
{
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}

constexpr int kFormChannels = 4, kFormImages = 2;  // that a warp sums at once: what it loads serves all of them

/// Sums of kFormImages images and kFormChannels rows, of each pair of styles.
template <int kStyles>
using Forms = float[kFormImages][kFormChannels][kStyles * (kStyles + 1) / 2];

/// sum_j (c W_ij)^2 s_kj s_lj for each pair k <= l, by a warp: of rows from `row` on and images from `image` on. Those
/// beyond the last are the last again.
template <int kStyles>
__device__ __forceinline__ void sum_forms(Forms<kStyles>& sums, const StackPackParams& p, const StackLayer& l,
                                          int image, int row)
{
    const float scale = 1.0f / static_cast<float>(l.in_features);
    const float* weights[kFormChannels];
    const float* styles[kFormImages];
#pragma unroll
    for (int r = 0; r < kFormChannels; ++r) {
        weights[r] =
            p.weights + l.weight_offset + static_cast<int64_t>(min(row + r, l.out_features - 1)) * l.in_features;
    }
#pragma unroll
    for (int i = 0; i < kFormImages; ++i) {
        styles[i] = p.styles + min(image + i, p.batch - 1) * p.style_stride + l.style_offset;
    }
#pragma unroll 2
    for (int j = threadIdx.x % 32; j < l.in_features; j += 32) {
        float square[kFormChannels], s[kFormImages][kStyles];
#pragma unroll
        for (int r = 0; r < kFormChannels; ++r) {
            const float w = __ldg(weights[r] + j);
            square[r] = scale * w * w;
        }
#pragma unroll
        for (int i = 0; i < kFormImages; ++i) {
#pragma unroll
            for (int k = 0; k < kStyles; ++k) s[i][k] = k < p.kinds ? __ldg(styles[i] + k * p.kind_stride + j) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kFormImages; ++i) {
            int pair = 0;
#pragma unroll
            for (int k = 0; k < kStyles; ++k) {
#pragma unroll
                for (int other = k; other < kStyles; ++other, ++pair) {
                    const float product = s[i][k] * s[i][other];
#pragma unroll
                    for (int r = 0; r < kFormChannels; ++r) {
                        sums[i][r][pair] = fmaf(k == other ? square[r] : 2.0f * square[r], product, sums[i][r][pair]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (auto& of_image : sums) {
#pragma unroll
        for (auto& of_row : of_image) {
#pragma unroll
            for (float& sum : of_row) sum = warp_sum(sum);
        }
    }
}

/// What demodulation reads of one output channel: see StackShape<2>.
template <typename Shape>
__device__ __forceinline__ void pack_forms(char* record, int index, int channel, const float (&forms)[Shape::kForms],
                                           float bias, float eps)
{
    const int order = accumulator_order(channel);
    if (index == 0) {
        // of a quad's threads side by side: thread t holds 16 q + 2 t, + 1 and both + 8
        const int place = order / 16 * 16 + order % 4 * 4 + order / 4 % 4;
        reinterpret_cast<float4*>(record + Shape::kChannel)[place] = make_float4(forms[0], forms[1], forms[2], bias);
        return;
    }
    reinterpret_cast<float*>(record + Shape::kBias)[order] = bias;
    uint32_t pairs[2][4];  // what a rounding to bfloat16 gives, and what it leaves
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const float v = k < Shape::kForms ? forms[k] : eps, rest = v - round_to<__nv_bfloat16>(v);
        pairs[0][k] = pack_pair(v, v, __nv_bfloat16());
        pairs[1][k] = pack_pair(rest, rest, __nv_bfloat16());
    }
    auto* row = reinterpret_cast<uint4*>(record + Shape::kChannel) + channel;
    row[0] = make_uint4(pairs[0][0], pairs[0][1], pairs[0][2], pairs[0][3]);
    row[Shape::kFormStep / 16] = make_uint4(pairs[1][0], pairs[1][1], pairs[1][2], pairs[1][3]);
}

/// What a record holds of kFormChannels output channels from `channel` on, of one image, by a warp. number: of the
/// record, a chunk has kHalves.
template <typename T, typename Shape, typename Sums>
__device__ __forceinline__ void pack_channels(const StackPackParams& p, int image, int index, int number, int channel,
                                              const Sums& sums)
{
    const int lane = threadIdx.x % 32;
    const StackLayer& l = p.layers[index];
    const int row = (number - kHalves * l.first_record) * Shape::kOutputs + channel;
    const float* styles = p.styles + image * p.style_stride;
    char* record = p.records + image * p.record_stride + static_cast<int64_t>(number) * Shape::kRecordBytes;

    if (lane < kFormChannels) {
        const bool exists = row + lane < l.out_features;
        // a channel that does not exist is zero times a finite number; layer 0 has no eps of its own, see below
        float forms[Shape::kForms];
#pragma unroll
        for (int k = 0; k < Shape::kForms; ++k) {
            forms[k] = exists || index > 0 ? 0.0f : 1.0f;
#pragma unroll
            for (int r = 0; r < kFormChannels; ++r) forms[k] = exists && lane == r ? sums[r][k] : forms[k];
        }
        const float eps = exists && p.demodulate ? p.eps : 1.0f;
        pack_forms<Shape>(record, index, channel + lane, forms, exists ? p.biases[l.bias_offset + row + lane] : 0.0f,
                          eps);
        if (channel == 0) {
            reinterpret_cast<float*>(record + Shape::kStrength)[lane] = lane == 0 ? p.strengths[index] : 0.0f;
        }
    }
    if (lane < kFormChannels * Shape::kStyles) {  // the next layer's styles: of 16 channels a thread has
        const int of = lane / Shape::kStyles, kind = lane % Shape::kStyles;  // [style][half][2]
        const int order = accumulator_order(channel + of);
        float s = 0.0f;
        if (row + of < l.out_features && index + 1 < p.depth && kind < p.kinds) {
            s = styles[kind * p.kind_stride + p.layers[index + 1].style_offset + row + of];
        }
        const int place = (order / 16 * 4 + order / 4 % 4) * Shape::kStyleStep + 4 * kind + order % 4;
        reinterpret_cast<T*>(record + Shape::kStyle)[place] = static_cast<T>(s);
    }
    static_assert(kFormChannels * 8 == 32, "a lane for each channel, style and colour");
    {  // ToRGB: colour c of style k is column 4 k + c
        const int of = lane / 8, kind = lane % 8 / 4, colour = lane % 4;
        float sum = 0.0f;
        if (l.rgb && row + of < l.out_features && colour < p.channels && kind < p.kinds) {
            const float scale = p.fold * rsqrtf(static_cast<float>(l.out_features));
            for (int i = 0; i < p.rgb_count; ++i) {
                const StackRgb& r = p.rgbs[i];
                if (r.layer != index) continue;
                const float weight =
                    p.weights[r.weight_offset + static_cast<int64_t>(colour) * l.out_features + row + of];
                sum += scale * styles[kind * p.kind_stride + r.style_offset + row + of] * weight;
            }
        }
        const int place = (channel + of) / 8 * (Shape::kRgbStep / 2) + lane % 8 * 8 + (channel + of) % 8;
        reinterpret_cast<T*>(record + Shape::kRgb)[place] = static_cast<T>(sum);
    }
}

/// The same of kFormImages images from `image` on, forms and all.
template <typename T, typename Shape>
__device__ __forceinline__ void pack_records(const StackPackParams& p, int image, int number, int channel)
{
    int index = 0;
    while (index + 1 < p.depth && p.layers[index + 1].first_record <= number / kHalves) ++index;
    const StackLayer& l = p.layers[index];
    const int row = (number - kHalves * l.first_record) * Shape::kOutputs + channel;
    Forms<Shape::kStyles> sums = {};
    if (row < l.out_features && p.demodulate) sum_forms<Shape::kStyles>(sums, p, l, image, row);
#pragma unroll
    for (int i = 0; i < kFormImages; ++i) {
        if (image + i < p.batch) pack_channels<T, Shape>(p, image + i, index, number, channel, sums[i]);
    }
}

/// Of an image: Fourier weights with the styles of their channels.
template <typename Shape>
__device__ __forceinline__ void pack_features(const StackPackParams& p, int image)
{
    constexpr int kParts = Shape::kFourierParts;
    const int floats = 4 * Shape::kFourierSlab * p.register_slabs;
    auto* out = reinterpret_cast<float*>(p.fourier) + static_cast<int64_t>(image) * floats;
    for (int i = threadIdx.x; i < floats; i += kPackThreads) {
        const int slab = i / (4 * Shape::kFourierSlab), step = i / (16 * kParts) % 4, part = i / 16 % kParts;
        const int channel = kSlab * slab + 16 * (i / 4 % 4) + 4 * step + i % 4;
        float value = 0.0f;
        if (channel < p.register_inputs) {
            if (part < 2) {
                value = p.fourier_weight[2 * channel + part];
            } else if (part == 2) {
                value = p.fourier_bias[channel];
            } else if (part - 3 < p.kinds) {
                value =
                    p.styles[image * p.style_stride + (part - 3) * p.kind_stride + p.layers[0].style_offset + channel];
            }
        }
        out[i] = value;
    }
}

/// Grid: (blocks of eight times kFormChannels output channels' records, then of eight rows of weights, then one of
/// constants; groups of kFormImages images). Groups share the rows among them.
template <typename T, int kStyles>
__global__ void __launch_bounds__(kPackThreads) stack_blend_pack_kernel(const __grid_constant__ StackPackParams p)
{
    using Shape = StackShape<kStyles>;
    constexpr int kWarps = kPackThreads / 32;
    const int image = blockIdx.y * kFormImages, warp = threadIdx.x / 32;
    int block = blockIdx.x;
    if (block < p.row_blocks / kFormChannels) {
        const int channel = (block * kWarps + warp) * kFormChannels;
        pack_records<T, Shape>(p, image, channel / Shape::kOutputs, channel % Shape::kOutputs);
        return;
    }
    block -= p.row_blocks / kFormChannels;
    if (block < p.row_blocks) {
        int row = block * kWarps + warp;
        if (block % gridDim.y != blockIdx.y) return;
        const int index = take_layer(p, row);
        pack_row<T, true>(p, index, row, 0);
        return;
    }
    for (int i = image; i < min(image + kFormImages, p.batch) && p.fourier_weight != nullptr; ++i) {
        pack_features<Shape>(p, i);
    }
    if (image == 0) pack_rgb_bias(p);
}

/// Blocks of its grid.
inline dim3 blend_pack_blocks(const StackPackParams& p)
{
    const int blocks = p.row_blocks + p.row_blocks / kFormChannels + 1;
    return {static_cast<unsigned>(blocks), static_cast<unsigned>((p.batch + kFormImages - 1) / kFormImages)};
}

}  // namespace cips
