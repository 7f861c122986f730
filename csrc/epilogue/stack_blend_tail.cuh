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
#include "tile/stack_scaled_rows.cuh"
#include "tile/vector.cuh"

namespace cips {

template <typename T, int kStyles>
struct StackBlendTail : StackParts<T, StackShape<kStyles>> {
    static_assert(kStyles == 2, "three forms and a bias make the four floats of a channel");
    using Parts = StackParts<T, StackShape<kStyles>>;
    using Parts::a;
    using Parts::acc;
    using Parts::lane;
    using Parts::of_record;
    using Parts::p;
    using Parts::thread_of_block;
    using typename Parts::Shape;
    using Rows = ScaledRows<T>;

    static constexpr uint32_t kHalfSlab = kSlabBytes / kHalves >> 4;  // in descriptors
    // Of two positions where in layer 0 nothing parks before the second half of the last chunk but one.
    static constexpr int kAside = kRegisterSlabs - 3;

    uint32_t forms[2];  // left side of a half's forms: rows g and g + 8, columns 2 t and 2 t + 1, see StackShape<2>

    using Colours = float[4];  // rows g and g + 8; columns 2 t and 2 t + 1: 4 k + c

    __device__ __forceinline__ StackBlendTail(const StackParams& params, uint32_t base) : Parts(params, base) {}

    /// A row's weights wait in shared memory, kStyles floats.
    __device__ __forceinline__ uint32_t weights_of(int row) const
    {
        const uint32_t at = thread_of_block();
        return this->shared + Shape::kBlendOffset + 4 * kStyles * (at / 32 * 16 + at % 32 / 4 + 8 * row);
    }

    /// Of a quad's four threads each fetches for one of two rows (t % 2) half of the styles.
    __device__ __forceinline__ void find_blend()
    {
        const int row = lane % 2, first = lane % 4 / 2 * (kStyles / 2);
        const int64_t at = min(this->pixel() + 8 * row, p.places.pixels - 1);
        const float* weights = p.blend + this->image() * p.blend_batch_stride + at * kStyles;
        __syncwarp();
#pragma unroll
        for (int k = first; k < first + kStyles / 2; ++k) {
            // rounded here, for scale and demodulation alike: what both share then cancels
            const float weight = round_to<T>(__ldg(weights + k));
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(weights_of(row) + 4 * k), "f"(weight) : "memory");
        }
        __syncwarp();
        const int t = lane % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const RowBlend<kStyles> blend = blend_of(r);
            const float left = t < 2 ? blend.of[0] : blend.of[1], right = t < 1 ? blend.of[0] : blend.of[1];
            const float form = t == 3 ? 1.0f : left * right;
            forms[r] = pack_pair(form, form - round_to<__nv_bfloat16>(form), __nv_bfloat16());
        }
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

    __device__ __forceinline__ uint32_t noise_of(uint32_t of_thread) const
    {
        return this->shared + Shape::kNoiseOffset + 4 * of_thread;
    }

    /// What a thread drew waits in shared memory too.
    __device__ __forceinline__ float keep_noise(float drawn) const
    {
        __syncwarp();
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(noise_of(thread_of_block())), "f"(drawn) : "memory");
        __syncwarp();
        return 0.0f;
    }

    __device__ __forceinline__ void make_input()
    {
        const RowBlend<kStyles> blend[2] = {blend_of(0), blend_of(1)};
        Parts::make_input(blend);
    }

    /// By halves, as the other layers: the compiler finds no room for accumulators of two shapes.
    __device__ __forceinline__ void multiply(const uint32_t* x, uint32_t b)
    {
        wgmma_registers<T>(half<0>(), x[0], x[1], x[2], x[3], matrix_descriptor(b));
        wgmma_registers<T>(half<1>(), x[0], x[1], x[2], x[3], matrix_descriptor(b + kHalfSlab));
    }

    __device__ __forceinline__ void multiply_shared(uint32_t x, uint32_t b)
    {
        wgmma_shared<T>(half<0>(), matrix_descriptor(x), matrix_descriptor(b));
        wgmma_shared<T>(half<1>(), matrix_descriptor(x), matrix_descriptor(b + kHalfSlab));
    }

    /// The quadratic forms of a half's channels, into the second half of the accumulators.
    __device__ __forceinline__ void send_forms()
    {
        const uint64_t b = halves_descriptor(this->record() + Shape::kChannel, Shape::kFormStep);
        wgmma_fresh<__nv_bfloat16>(half<1>(), forms[0], forms[1], forms[0], forms[1], b);
    }

    template <int kHalf>
    __device__ __forceinline__ float (&half())[32]
    {
        return *reinterpret_cast<float (*)[32]>(acc + 32 * kHalf);
    }

    __device__ __forceinline__ static float demodulation(float form)
    {
        float d;  // |form|: what is zero but for rounding may come out below
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(fabsf(form)));
        return d;
    }

    /// What the tail of a half reads first: loaded while its last products are under way.
    struct Ahead {
        float4 bias[4];
        float noise[2];
    };

    /// source: the noise of a quad's rows is that of threads `source` and `source` + 1.
    __device__ __forceinline__ void load_noise(float (&noise)[2], int source) const
    {
        const float strength = this->noise_strength();
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(noise[0]), "=f"(noise[1])
                     : "r"(noise_of(thread_of_block() / 32 * 32 + source))
                     : "memory");
        noise[0] = __fmul_rn(noise[0], strength);  // not fused with the bias, which would keep three registers for two
        noise[1] = __fmul_rn(noise[1], strength);
    }

    __device__ __forceinline__ void load_ahead(Ahead& ahead, int source) const
    {
        load_noise(ahead.noise, source);
#pragma unroll
        for (int q = 0; q < 4; ++q) ahead.bias[q] = of_record(Shape::kBias + 16 * (lane % 4) + 64 * q);
    }

    /// Demodulation, bias, noise and activation of a half whose forms were sent.
    __device__ __forceinline__ void activate(uint32_t (&x)[16], const Ahead& ahead) const
    {
        const float (&noise)[2] = ahead.noise;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float4 v = ahead.bias[q];
            const float bias[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 4 * q; j < 4 * q + 4; ++j) {
                float y[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    y[e] =
                        fmaf(acc[2 * j + e], demodulation(acc[32 + 2 * j + e]), bias[j % 4 / 2 * 2 + e] + noise[j % 2]);
                }
                x[j] = leaky_relu_pair<T>(y[0], y[1], p.slope_pair);
            }
        }
    }

    /// The sums of layer 0's second half, for which there is no room while the first half has its forms, wait at two
    /// positions that no output has taken yet. Forms by ordinary arithmetic in place of products took 2% to 3% of the
    /// whole time.
    __device__ __forceinline__ void put_sums_aside() const
    {
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            const float* v = acc + 32 + j;
            this->store_shared(this->parked(4 * kAside + j / 4), __float_as_uint(v[0]), __float_as_uint(v[1]),
                               __float_as_uint(v[2]), __float_as_uint(v[3]));
        }
    }

    /// Into the first half of the accumulators.
    __device__ __forceinline__ void take_sums_back()
    {
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(acc[j]), "=f"(acc[j + 1]), "=f"(acc[j + 2]), "=f"(acc[j + 3])
                         : "r"(this->parked(4 * kAside + j / 4))
                         : "memory");
        }
    }

    /// Forms of a half of layer 0, and what its tail reads first.
    __device__ __forceinline__ void make_forms(Ahead& ahead, int source)
    {
        this->wait_for_record();
        wgmma_fence();
        send_forms();
        wgmma_commit();
        load_ahead(ahead, source);
        wgmma_wait<0>();
    }

    /// position: where the result goes, parked or, if kKeeps, in the registers. Forms are there, and `ahead`.
    template <bool kKeeps>
    __device__ __forceinline__ void finish_half(int position, const StackLayer& l, const Ahead& ahead)
    {
        uint32_t x[16];
        activate(x, ahead);
        uint32_t weights[2][kStyles];
        float4 styles[4];
        load_weights(weights);
#pragma unroll
        for (int q = 0; q < 4; ++q) styles[q] = styles_of(q);
        Colours rgb;
        load_colours(rgb);
        if (l.rgb) this->send_colours(rgb, x);
        // the last layer's too: its styles are zeros, and nobody reads what parks
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            uint32_t to[4];
            scale(to, x + 4 * q, weights, styles[q]);
            if constexpr (kKeeps) {
#pragma unroll
                for (int j = 0; j < 4; ++j) a[16 * position + 4 * q + j] = to[j];
            } else {
                this->park(4 * position + q, to);
            }
        }
        wgmma_wait<0>();
        keep_colours(rgb);
        this->end_chunk();
    }

    /// The next layer's styles of 16 channels.
    __device__ __forceinline__ float4 styles_of(int quarter) const
    {
        return of_record(Shape::kStyle + 2 * Shape::kStyleStep * (lane % 4 + 4 * quarter));
    }

    __device__ __forceinline__ void load_weights(uint32_t (&weights)[2][kStyles]) const
    {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const RowBlend<kStyles> blend = blend_of(row);
#pragma unroll
            for (int k = 0; k < kStyles; ++k) weights[row][k] = pack_pair(blend.of[k], blend.of[k], T());
        }
    }

    /// 16 channels times the pixel's style of the next layer, in packed arithmetic: half of the instructions of
    /// float32's.
    __device__ __forceinline__ static void scale(uint32_t (&to)[4], const uint32_t* x,
                                                 const uint32_t (&weights)[2][kStyles], const float4& v)
    {
        const uint32_t styles[2][2] = {{__float_as_uint(v.x), __float_as_uint(v.y)},
                                       {__float_as_uint(v.z), __float_as_uint(v.w)}};  // [style][half of 8 channels]
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const uint32_t style =
                    fma_pair<T>(styles[1][half], weights[row][1], mul_pair<T>(styles[0][half], weights[row][0]));
                to[2 * half + row] = mul_pair<T>(x[2 * half + row], style);
            }
        }
    }

    /// Sums of colours wait in shared memory, each thread's own.
    __device__ __forceinline__ uint32_t colours() const
    {
        return this->shared + Shape::kColourOffset + thread_of_block() * 16;
    }

    __device__ __forceinline__ void load_colours(Colours& rgb) const
    {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(rgb[0]), "=f"(rgb[1]), "=f"(rgb[2]), "=f"(rgb[3])
                     : "r"(colours())
                     : "memory");
    }

    __device__ __forceinline__ void keep_colours(const Colours& rgb) const
    {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(colours()), "f"(rgb[0]), "f"(rgb[1]), "f"(rgb[2]),
                     "f"(rgb[3])
                     : "memory");
    }

    __device__ __forceinline__ void start_colours() { keep_colours({0.0f, 0.0f, 0.0f, 0.0f}); }

    /// Colours c and c + 1 of the two rows lie with threads t = c / 2 for even styles and t + 2 for odd ones.
    __device__ __forceinline__ void store() const
    {
        Colours rgb;
        load_colours(rgb);
        const int t = lane % 4, odd = t / 2, first = 2 * (t % 2);
        float* out = p.rgb + this->image() * p.rgb_batch_stride + first * p.rgb_channel_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = j / 2, channel = first + j % 2;
            const int64_t at_pixel = this->pixel() + 8 * row;
            const int64_t there = min(at_pixel, p.places.pixels - 1);
            const float* weights = p.blend + this->image() * p.blend_batch_stride + there * kStyles;
            float colour = rgb[j] * __ldg(weights + odd);
            colour += __shfl_xor_sync(~0u, colour, 2);
            if (!odd && channel < p.channels && at_pixel < p.places.pixels) {
                out[at_pixel * p.rgb_pixel_stride + j % 2 * p.rgb_channel_stride] =
                    colour + __ldg(p.rgb_bias + channel);
            }
        }
    }
};

}  // namespace cips
