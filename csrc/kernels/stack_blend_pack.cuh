// What stack_blend_fwd_kernel reads of parameters and styles: slabs of weights that are not modulated, the same for all
// images; records, Fourier weights with the styles of layer 0, its other styles, the sum of the ToRGB biases. One
// launch.
#pragma once

#include "kernels/stack_pack.cuh"

namespace cips {

/// Column of a record's channel in the order of the accumulators: thread t of a quad holds 16 q + 2 t, + 1 and both
/// + 8.
__device__ __forceinline__ int accumulator_order(int channel)
{
    return channel / 16 * 16 + channel % 8 / 2 * 4 + channel / 8 % 2 * 2 + channel % 2;
}

constexpr int kFormChannels = 4;  // whose forms a warp sums at once: the styles that it loads serve all of them

/// Sums of kFormChannels rows, of each pair of styles.
template <int kStyles>
using Forms = float[kFormChannels][kStyles * (kStyles + 1) / 2];

/// sum_j (c W_ij)^2 s_kj s_lj for each pair k <= l, twice it where k < l, of rows from `row` on; rows beyond the last
/// are the last again. kVector: rows of weights and styles start on 16 bytes.
template <bool kVector, int kStyles>
__device__ __forceinline__ void sum_forms(Forms<kStyles>& sums, const StackPackParams& p, const StackLayer& l,
                                          int image, int row)
{
    const float* weights = p.weights + l.weight_offset;
    const float* styles = p.styles + image * p.style_stride + l.style_offset;
#pragma unroll 2
    for (int column = 4 * (threadIdx.x % 32); column < l.in_features; column += 4 * 32) {
        float4 square[kFormChannels], s[kStyles];
#pragma unroll
        for (int r = 0; r < kFormChannels; ++r) {
            const int64_t at = static_cast<int64_t>(min(row + r, l.out_features - 1)) * l.in_features;
            square[r] = load4<kVector>(weights + at, column, l.in_features);
        }
#pragma unroll
        for (int k = 0; k < kStyles; ++k) s[k] = load4<kVector>(styles + k * p.kind_stride, column, l.in_features);
#pragma unroll
        for (float4& w : square) w = mul4(w, w);
        int pair = 0;
#pragma unroll
        for (int k = 0; k < kStyles; ++k) {
#pragma unroll
            for (int other = k; other < kStyles; ++other, ++pair) {
                const float4 product = mul4(s[k], s[other]);
#pragma unroll
                for (int r = 0; r < kFormChannels; ++r) sums[r][pair] = dot4(square[r], product, sums[r][pair]);
            }
        }
    }
}

/// Over all lanes of the warp, and scaled.
template <int kStyles>
__device__ __forceinline__ void gather_forms(Forms<kStyles>& sums, int in_features)
{
    const float scale = 1.0f / static_cast<float>(in_features);
#pragma unroll
    for (auto& of_row : sums) {
        int pair = 0;
#pragma unroll
        for (int k = 0; k < kStyles; ++k) {
#pragma unroll
            for (int other = k; other < kStyles; ++other, ++pair) {
                of_row[pair] = warp_sum(of_row[pair]) * (k == other ? scale : 2.0f * scale);
            }
        }
    }
}

/// What demodulation reads of one output channel: see StackShape<2>.
template <typename Shape>
__device__ __forceinline__ void pack_forms(char* record, int channel, const float (&forms)[Shape::kForms], float bias,
                                           float eps)
{
    const int order = accumulator_order(channel);
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

/// What an image's record holds of kFormChannels output channels besides their forms: of a lane, what it will write.
struct ChannelParts {
    float bias, strength;  // lanes below kFormChannels
    float style;           // of the next layer, lanes below kFormChannels * kMaxBlend
    float colour;          // of channel lane / 8, in column lane % 8: 4 k + c for colour c of style k

    /// row: the first of the channels.
    __device__ __forceinline__ void load(const StackPackParams& p, int image, int index, int row)
    {
        const int lane = threadIdx.x % 32;
        const StackLayer& l = p.layers[index];
        const float* styles = p.styles + image * p.style_stride;
        const int count = min(kFormChannels, l.out_features - row);  // of channels that exist
        bias = lane < count ? __ldg(p.biases + l.bias_offset + row + lane) : 0.0f;
        strength = lane == 0 ? __ldg(p.strengths + index) : 0.0f;
        style = 0.0f;
        if (lane / kMaxBlend < count && index + 1 < p.depth && lane % kMaxBlend < p.kinds) {
            const int first = p.layers[index + 1].style_offset + row;
            style = __ldg(styles + lane % kMaxBlend * p.kind_stride + first + lane / kMaxBlend);
        }
        colour = 0.0f;
        const int of = lane / 8, kind = lane % 8 / 4, c = lane % 4;
        if (!l.rgb || of >= count || c >= p.channels || kind >= p.kinds) return;
        const float scale = p.fold * rsqrtf(static_cast<float>(l.out_features));
        for (int k = 0; k < p.rgb_count; ++k) {
            const StackRgb& r = p.rgbs[k];
            if (r.layer != index) continue;
            const float weight = __ldg(p.weights + r.weight_offset + c * l.out_features + row + of);
            colour += scale * __ldg(styles + kind * p.kind_stride + r.style_offset + row + of) * weight;
        }
    }

    /// channel: the first of the channels, in the record.
    template <typename T, typename Shape>
    __device__ __forceinline__ void store(char* record, int channel) const
    {
        const int lane = threadIdx.x % 32;
        if (channel == 0 && lane < 4) {
            reinterpret_cast<float*>(record + Shape::kStrength)[lane] = lane == 0 ? strength : 0.0f;
        }
        if (lane < kFormChannels * kMaxBlend) {  // of 16 channels a thread has [style][half][2]
            const int order = accumulator_order(channel + lane / kMaxBlend);
            const int place = (order / 16 * 4 + order / 4 % 4) * Shape::kStyleStep + lane % kMaxBlend * 4 + order % 4;
            reinterpret_cast<T*>(record + Shape::kStyle)[place] = static_cast<T>(style);
        }
        static_assert(kFormChannels * 8 == 32, "a lane for each channel, style and colour");
        const int of = channel + lane / 8;
        const int place = of / 8 * (Shape::kRgbStep / 2) + lane % 8 * 8 + of % 8;
        reinterpret_cast<T*>(record + Shape::kRgb)[place] = static_cast<T>(colour);
    }
};

/// What an image's record holds of kFormChannels output channels from `channel` on, by a warp. number: of the record, a
/// chunk has kHalves.
template <typename T, typename Shape>
__device__ __forceinline__ void pack_channels(const StackPackParams& p, int image, int number, int channel)
{
    int index = 0;
    while (index + 1 < p.depth && p.layers[index + 1].first_record <= number / kHalves) ++index;
    const StackLayer& l = p.layers[index];
    const int row = (number - kHalves * l.first_record) * Shape::kOutputs + channel;
    ChannelParts parts;
    parts.load(p, image, index, row);  // under way while forms are summed
    Forms<Shape::kStyles> sums = {};
    if (row < l.out_features && p.demodulate) {
        if (p.vectors >> index & 1) {
            sum_forms<true, Shape::kStyles>(sums, p, l, image, row);
        } else {
            sum_forms<false, Shape::kStyles>(sums, p, l, image, row);
        }
        gather_forms<Shape::kStyles>(sums, l.in_features);
    }
    char* record = p.records + image * p.record_stride + static_cast<int64_t>(number) * Shape::kRecordBytes;
    parts.store<T, Shape>(record, channel);
    const int lane = threadIdx.x % 32;
    if (lane >= kFormChannels) return;
    const bool exists = row + lane < l.out_features;
    // a channel that does not exist is zero times a finite number
    float forms[Shape::kForms];
#pragma unroll
    for (int k = 0; k < Shape::kForms; ++k) {
        forms[k] = 0.0f;
#pragma unroll
        for (int r = 0; r < kFormChannels; ++r) forms[k] = exists && lane == r ? sums[r][k] : forms[k];
    }
    pack_forms<Shape>(record, channel + lane, forms, parts.bias, exists && p.demodulate ? p.eps : 1.0f);
}

/// What makes the first layer's input of an image: Fourier weights with the styles of their channels, and the styles of
/// the streamed channels, as the stack's type. By a block.
template <typename T, typename Shape>
__device__ __forceinline__ void pack_input(const StackPackParams& p, int image)
{
    const float* styles = p.styles + image * p.style_stride + p.layers[0].style_offset;
    if (p.fourier_weight != nullptr) {
        constexpr int kParts = Shape::kFourierParts;
        const int floats = 4 * Shape::kFourierSlab * p.register_slabs;
        auto* out = reinterpret_cast<float*>(p.fourier) + static_cast<int64_t>(image) * floats;
#pragma unroll 5
        for (int i = threadIdx.x; i < floats; i += kPackThreads) {
            const int slab = i / (4 * Shape::kFourierSlab), step = i / (16 * kParts) % 4, part = i / 16 % kParts;
            const int channel = kSlab * slab + 16 * (i / 4 % 4) + 4 * step + i % 4, kind = part - 3;
            const float* from = part < 2    ? p.fourier_weight + 2 * channel + part
                                : part == 2 ? p.fourier_bias + channel
                                            : styles + kind * p.kind_stride + channel;
            out[i] = channel < p.register_inputs && kind < p.kinds ? __ldg(from) : 0.0f;
        }
    }
    if (p.row_styles == nullptr) return;
    const int streamed = p.layers[0].in_features - p.register_inputs, row = (streamed + 7) / 8 * 8;
    auto* out = reinterpret_cast<T*>(p.row_styles) + static_cast<int64_t>(image) * Shape::kStyles * row;
#pragma unroll 4
    for (int i = threadIdx.x; i < Shape::kStyles * row; i += kPackThreads) {
        const int kind = i / row, channel = i % row;
        const bool exists = channel < streamed && kind < p.kinds;
        out[i] = static_cast<T>(exists ? __ldg(styles + kind * p.kind_stride + p.register_inputs + channel) : 0.0f);
    }
}

/// Blocks that pack channels, a warp kFormChannels of an image: those of all images side by side read the same weights.
__host__ __device__ inline int form_blocks(const StackPackParams& p)
{
    return p.row_blocks / kFormChannels * p.batch;
}

/// Grid: form_blocks, a block an image of what makes its input, then blocks of eight rows of weights: what is short but
/// slow goes first.
template <typename T, int kStyles>
__global__ void __launch_bounds__(kPackThreads, 3) stack_blend_pack_kernel(const __grid_constant__ StackPackParams p)
{
    grid_dependency_wait();
    grid_dependents_come();
    using Shape = StackShape<kStyles>;
    constexpr int kWarps = kPackThreads / 32;
    const int warp = threadIdx.x / 32, forms = form_blocks(p);
    int block = blockIdx.x;
    if (block < forms) {
        const int unit = block * kWarps + warp, channel = unit / p.batch * kFormChannels;
        pack_channels<T, Shape>(p, unit % p.batch, channel / Shape::kOutputs, channel % Shape::kOutputs);
        return;
    }
    block -= forms;
    if (block < p.batch) {
        pack_input<T, Shape>(p, block);
        if (block == 0) pack_rgb_bias(p);
        return;
    }
    int row = (block - p.batch) * kWarps + warp;
    const int index = take_layer(p, row);
    pack_row<T, true>(p, index, row, 0);
}

/// Blocks of its grid.
inline unsigned blend_pack_blocks(const StackPackParams& p)
{
    return static_cast<unsigned>(form_blocks(p) + p.batch + p.row_blocks);
}

}  // namespace cips
