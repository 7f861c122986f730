// What a consumer warpgroup of stack_blend_fwd_kernel does between products. Every pixel p has a style of its own, a
// blend of its image's: s_p = sum_k beta_pk s_k. With activations x scaled by it, all pixels share the weights:
//
//     y_pi = d_pi sum_j c W_ij (s_pj x_pj) + nu n_p + b_i,   d_pi = 1 / sqrt(sum_k<=l beta_pk beta_pl q_kl,i + eps)
//
// The scale goes onto a layer's output, for the next; colours are linear in the style, so each style's are summed by
// themselves and blended at the end.
#pragma once

#include "epilogue/leaky_relu.cuh"
#include "epilogue/stack_parts.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T, int kStyles>
struct StackBlendTail : StackParts<T, kStyles> {
    using Parts = StackParts<T, kStyles>;
    using Parts::a;
    using Parts::acc;
    using Parts::lane;
    using Parts::of_record;
    using Parts::p;
    using typename Parts::Shape;

    using Colours = float[Shape::kRgbProducts][4];  // rows g and g + 8; columns 2 t and 2 t + 1: 4 (k % 2) + c

    __device__ __forceinline__ StackBlendTail(const StackParams& params, uint32_t base) : Parts(params, base) {}

    /// A row's weights wait in shared memory, kStyles floats.
    __device__ __forceinline__ uint32_t weights_of(int row) const
    {
        const int of_block = threadIdx.x / 32 * 16 + lane / 4 + 8 * row;
        return this->shared + Shape::kBlendOffset + 4 * kStyles * of_block;
    }

    /// Of a quad's four threads each fetches for one of two rows (t % 2) half of the styles.
    __device__ __forceinline__ void find_blend()
    {
        const int row = lane % 2, first = lane % 4 / 2 * (kStyles / 2);
        const int64_t at = min(this->pixel() + 8 * row, p.places.pixels - 1);
        const float* weights = p.blend + this->image() * p.blend_batch_stride + at * p.styles;
        __syncwarp();
#pragma unroll
        for (int k = first; k < first + kStyles / 2; ++k) {
            const float weight = k < p.styles ? __ldg(weights + k) : 0.0f;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(weights_of(row) + 4 * k), "f"(weight) : "memory");
        }
        __syncwarp();
    }

    __device__ __forceinline__ RowBlend<kStyles> blend_of(int row) const
    {
        RowBlend<kStyles> result;
#pragma unroll
        for (int k = 0; k < kStyles; k += 2) {
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                         : "=f"(result.of[k]), "=f"(result.of[k + 1])
                         : "r"(weights_of(row) + 4 * k)
                         : "memory");
        }
        return result;
    }

    __device__ __forceinline__ void make_input()
    {
        const RowBlend<kStyles> blend[2] = {blend_of(0), blend_of(1)};
        Parts::make_input(blend);
    }

    __device__ __forceinline__ void start_chunk(float, float)
    {
#pragma unroll
        for (int j = 0; j < 64; ++j) acc[j] = 0.0f;
    }

    /// Demodulation of four channels of the two rows. What rounds below zero counts as zero.
    __device__ __forceinline__ void demodulation(float4 (&d)[2], uint32_t at, const RowBlend<kStyles> (&blend)[2]) const
    {
        d[0] = d[1] = make_float4(p.eps, p.eps, p.eps, p.eps);
        int pair = 0;
#pragma unroll
        for (int k = 0; k < kStyles; ++k) {
#pragma unroll
            for (int l = k; l < kStyles; ++l) {
                const float4 form = of_record(Shape::kForm + 4 * kChunk * pair++ + at);
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float weight;  // volatile: eight times the product is cheaper than a register of this loop
                    asm volatile("mul.f32 %0, %1, %2;" : "=f"(weight) : "f"(blend[row].of[k]), "f"(blend[row].of[l]));
                    d[row] = fma4(form, weight, d[row]);
                }
            }
        }
        const auto inverse_root = [&](float v) {
            float result;
            asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(fmaxf(v, p.eps)));
            return result;
        };
#pragma unroll
        for (float4& row : d) {
            row = make_float4(inverse_root(row.x), inverse_root(row.y), inverse_root(row.z), inverse_root(row.w));
        }
    }

    /// y d + b, here and now: put off, it holds registers.
    __device__ __forceinline__ static void apply(float& y, float d, float b)
    {
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(y) : "f"(d), "f"(b));
    }

    __device__ __forceinline__ void demodulate(const float (&noise)[2])
    {
        const RowBlend<kStyles> blend[2] = {blend_of(0), blend_of(1)};
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            const uint32_t at = 16 * (lane % 4) + 64 * q;
            float4 d[2];
            demodulation(d, at, blend);
            const float4 bias = of_record(Shape::kBias + at);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float* y = acc + 8 * q + 2 * row;
                apply(y[0], d[row].x, bias.x + noise[row]);
                apply(y[1], d[row].y, bias.y + noise[row]);
                apply(y[4], d[row].z, bias.z + noise[row]);
                apply(y[5], d[row].w, bias.w + noise[row]);
            }
        }
    }

    /// drawn, source: the noise of a quad's rows, with threads `source` and `source` + 1.
    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool keep, float drawn, int source)
    {
        this->wait_for_record();
        const float strength = this->noise_strength();
        const float noise[2] = {strength * __shfl_sync(~0u, drawn, source),
                                strength * __shfl_sync(~0u, drawn, source + 1)};
        demodulate(noise);
        uint32_t x[32];
#pragma unroll
        for (int j = 0; j < 32; ++j) x[j] = leaky_relu_pair<T>(acc[2 * j], acc[2 * j + 1], p.slope_pair);
        if (l.rgb) {
            Colours rgb;
            load_colours(rgb);
            this->add_colours(rgb, x);
            keep_colours(rgb);
        }
        if (keep) scale(x);
        if (kLast) {
#pragma unroll
            for (int j = 0; j < 32; ++j) a[16 * (kRegisterSlabs - 2) + j] = x[j];
        } else if (keep) {
#pragma unroll
            for (int s = 0; s < 8; ++s) this->park(8 * chunk + s, x + 4 * s);
        }
        this->end_chunk();
    }

    /// Times the pixel's style of the next layer.
    __device__ __forceinline__ void scale(uint32_t (&x)[32]) const
    {
        const RowBlend<kStyles> blend[2] = {blend_of(0), blend_of(1)};  // once more: not worth registers until here
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            uint32_t styles[2 * kStyles];  // [style][half of 8 channels]
#pragma unroll
            for (int i = 0; i < kStyles / 2; ++i) {
                const uint32_t at = 2 * Shape::kStyleStep * (lane % 4) + 8 * Shape::kStyleStep * q + 16 * i;
                const float4 v = of_record(Shape::kStyle + at);
                styles[4 * i + 0] = __float_as_uint(v.x);
                styles[4 * i + 1] = __float_as_uint(v.y);
                styles[4 * i + 2] = __float_as_uint(v.z);
                styles[4 * i + 3] = __float_as_uint(v.w);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float low = 0.0f, high = 0.0f;
#pragma unroll
                    for (int k = 0; k < kStyles; ++k) {
                        const float2 s = unpack_pair(styles[2 * k + half], T());
                        low = fmaf(s.x, blend[row].of[k], low);
                        high = fmaf(s.y, blend[row].of[k], high);
                    }
                    uint32_t& pair = x[4 * q + 2 * half + row];
                    pair = mul_pair<T>(pair, pack_pair(low, high, T()));
                }
            }
        }
    }

    /// Sums of colours wait in shared memory, each thread's own.
    __device__ __forceinline__ uint32_t colours(int product) const
    {
        return this->shared + Shape::kColourOffset + (product * 128 * kConsumers + threadIdx.x) * 16;
    }

    __device__ __forceinline__ void load_colours(Colours& rgb) const
    {
#pragma unroll
        for (int i = 0; i < Shape::kRgbProducts; ++i) {
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(rgb[i][0]), "=f"(rgb[i][1]), "=f"(rgb[i][2]), "=f"(rgb[i][3])
                         : "r"(colours(i))
                         : "memory");
        }
    }

    __device__ __forceinline__ void keep_colours(const Colours& rgb) const
    {
#pragma unroll
        for (int i = 0; i < Shape::kRgbProducts; ++i) {
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(colours(i)), "f"(rgb[i][0]), "f"(rgb[i][1]),
                         "f"(rgb[i][2]), "f"(rgb[i][3])
                         : "memory");
        }
    }

    __device__ __forceinline__ void start_colours() { keep_colours(Colours{}); }

    /// Colours c and c + 1 of the two rows lie with threads t = c / 2 for even styles and t + 2 for odd ones.
    __device__ __forceinline__ void store() const
    {
        const RowBlend<kStyles> blend[2] = {blend_of(0), blend_of(1)};
        Colours rgb;
        load_colours(rgb);
        const int t = lane % 4, odd = t / 2, first = 2 * (t % 2);
        float* out = p.rgb + this->image() * p.rgb_batch_stride + first * p.rgb_channel_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = j / 2, channel = first + j % 2;
            float colour = 0.0f;
#pragma unroll
            for (int i = 0; i < Shape::kRgbProducts; ++i) {
                colour = fmaf(rgb[i][j], odd ? blend[row].of[2 * i + 1] : blend[row].of[2 * i], colour);
            }
            colour += __shfl_xor_sync(~0u, colour, 2);
            const int64_t at_pixel = this->pixel() + 8 * row;
            if (!odd && channel < p.channels && at_pixel < p.places.pixels) {
                out[at_pixel * p.rgb_pixel_stride + j % 2 * p.rgb_channel_stride] =
                    colour + __ldg(p.rgb_bias + channel);
            }
        }
    }
};

}  // namespace cips
