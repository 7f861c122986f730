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

/// sum_j (c W_ij)^2 s_kj s_lj for each pair k <= l, by a warp.
template <int kStyles>
__device__ __forceinline__ void sum_forms(float (&sums)[kStyles * (kStyles + 1) / 2], const StackPackParams& p,
                                          const StackLayer& l, const float* styles, int row)
{
    const float* weight = p.weights + l.weight_offset + static_cast<int64_t>(row) * l.in_features;
    const float scale = 1.0f / static_cast<float>(l.in_features);
#pragma unroll 4
    for (int j = threadIdx.x % 32; j < l.in_features; j += 32) {
        const float w = __ldg(weight + j), square = scale * w * w;
        float s[kStyles];
#pragma unroll
        for (int k = 0; k < kStyles; ++k) {
            s[k] = k < p.kinds ? __ldg(styles + k * p.kind_stride + l.style_offset + j) : 0.0f;
        }
        int pair = 0;
#pragma unroll
        for (int k = 0; k < kStyles; ++k) {
#pragma unroll
            for (int other = k; other < kStyles; ++other, ++pair) {
                sums[pair] = fmaf(k == other ? square : 2.0f * square, s[k] * s[other], sums[pair]);
            }
        }
    }
#pragma unroll
    for (float& sum : sums) sum = warp_sum(sum);
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

/// What a record holds of one output channel, by a warp: lanes that have nothing to write are idle. number: of the
/// record, a chunk has kHalves.
template <typename T, typename Shape>
__device__ __forceinline__ void pack_channel(const StackPackParams& p, int image, int number, int channel)
{
    const int lane = threadIdx.x % 32;
    int index = 0;
    while (index + 1 < p.depth && p.layers[index + 1].first_record <= number / kHalves) ++index;
    const StackLayer& l = p.layers[index];
    const int row = (number - kHalves * l.first_record) * Shape::kOutputs + channel;
    const bool exists = row < l.out_features;
    const float* styles = p.styles + image * p.style_stride;
    char* record = p.records + image * p.record_stride + static_cast<int64_t>(number) * Shape::kRecordBytes;
    const int order = accumulator_order(channel);

    const float nothing = exists || index > 0 ? 0.0f : 1.0f;  // layer 0 has no eps of its own, see below
    float forms[Shape::kForms] = {nothing, nothing, nothing};
    if (exists && p.demodulate) sum_forms<Shape::kStyles>(forms, p, l, styles, row);
    if (lane == 0) {
        // a channel that does not exist is zero times a finite number
        const float eps = exists && p.demodulate ? p.eps : 1.0f;
        pack_forms<Shape>(record, index, channel, forms, exists ? p.biases[l.bias_offset + row] : 0.0f, eps);
        if (channel < 4) {
            reinterpret_cast<float*>(record + Shape::kStrength)[channel] = channel == 0 ? p.strengths[index] : 0.0f;
        }
    }
    if (lane < Shape::kStyles) {  // the next layer's styles: of 16 channels a thread has [style][half][2]
        float s = 0.0f;
        if (exists && index + 1 < p.depth && lane < p.kinds) {
            s = styles[lane * p.kind_stride + p.layers[index + 1].style_offset + row];
        }
        const int place = (order / 16 * 4 + order / 4 % 4) * Shape::kStyleStep + 4 * lane + order % 4;
        reinterpret_cast<T*>(record + Shape::kStyle)[place] = static_cast<T>(s);
    }
    if (lane < 8) {  // ToRGB: colour c of style k is column 4 k + c
        const int kind = lane / 4, colour = lane % 4;
        float sum = 0.0f;
        if (l.rgb && exists && colour < p.channels && kind < p.kinds) {
            const float scale = p.fold * rsqrtf(static_cast<float>(l.out_features));
            for (int i = 0; i < p.rgb_count; ++i) {
                const StackRgb& r = p.rgbs[i];
                if (r.layer != index) continue;
                const float weight = p.weights[r.weight_offset + static_cast<int64_t>(colour) * l.out_features + row];
                sum += scale * styles[kind * p.kind_stride + r.style_offset + row] * weight;
            }
        }
        const int place = channel / 8 * (Shape::kRgbStep / 2) + lane * 8 + channel % 8;
        reinterpret_cast<T*>(record + Shape::kRgb)[place] = static_cast<T>(sum);
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

/// Grid: (blocks of eight output channels' records, then as many of eight rows of weights, then one of constants;
/// images). Images share the rows among them.
template <typename T, int kStyles>
__global__ void __launch_bounds__(kPackThreads) stack_blend_pack_kernel(const __grid_constant__ StackPackParams p)
{
    using Shape = StackShape<kStyles>;
    const int image = blockIdx.y, block = blockIdx.x, warp = threadIdx.x / 32;
    if (block < p.row_blocks) {
        const int row = block * (kPackThreads / 32) + warp;
        pack_channel<T, Shape>(p, image, row / Shape::kOutputs, row % Shape::kOutputs);
    } else if (block < 2 * p.row_blocks) {
        int row = (block - p.row_blocks) * (kPackThreads / 32) + warp;
        if (block % gridDim.y != blockIdx.y) return;
        const int index = take_layer(p, row);
        pack_row<T, true>(p, index, row, 0);
    } else {
        if (p.fourier_weight != nullptr) pack_features<Shape>(p, image);
        if (image == 0) pack_rgb_bias(p);
    }
}

}  // namespace cips
