// The whole stack of one tile of pixels on chip: input from coordinates or memory, every modulated layer with bias,
// noise and leaky ReLU, the ToRGB sums out. Activations never leave the multiprocessor.
//
// A cluster of two blocks takes 256 pixels, a consumer warpgroup 64. Its activations sit in registers as A fragments
// (the accumulator of a product has the very layout that the next product reads), 8 positions of 64 channels. Outputs
// are computed in chunks of 128: a finished chunk parks in shared memory, each thread its own registers, until the
// last chunk's products have read the input for the last time; then it moves to the registers. Weights come through a
// ring of slabs, multicast to both blocks. No warpgroup barrier, no stmatrix, no proxy fence.
#pragma once

#include "epilogue/leaky_relu.cuh"
#include "epilogue/noise.cuh"
#include "ptx/cluster.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/wgmma.cuh"
#include "tile/pixel_coordinates.cuh"
#include "tile/stack_input.cuh"
#include "tile/stack_ring.cuh"
#include "tile/unpack.cuh"

namespace cips {

/// A consumer warpgroup. All of it is in registers, so all of it is inlined.
template <typename T>
struct StackConsumer {
    const StackParams& p;
    const StackBarriers bars;
    const uint32_t shared;
    const int thread, lane, warpgroup;
    RingPosition at;
    uint32_t chunks = 0;  // worked off so far, over all tiles: the number of the record in hand
    StackInput a;         // the layer's input, 16 registers a position
    float acc[64];
    float rgb[2];  // rows g and g + 8, channel t
    float drawn = 0.0f;
    uint32_t place;  // see find_place

    __device__ __forceinline__ StackConsumer(const StackParams& params, uint32_t base)
        : p(params),
          bars(base),
          shared(base),
          thread(threadIdx.x % 128),
          lane(threadIdx.x % 32),
          warpgroup(threadIdx.x / 128),
          at(false)
    {
    }

    __device__ __forceinline__ uint32_t parked(int step) const
    {
        return shared + warpgroup * kParkBytes + thread * 16 + step * 2048;
    }

    __device__ __forceinline__ uint32_t record() const { return shared + kRecordOffset + (chunks & 1) * kRecordBytes; }

    __device__ __forceinline__ void release(uint32_t slot) const
    {
        if (thread < kCluster) mbarrier_arrive_cluster(bars.empty + 8 * slot, thread);
    }

    __device__ __forceinline__ uint32_t slot_descriptor(uint32_t slot) const
    {
        return descriptor_start(shared + kRingOffset) + slot * (kSlabBytes >> 4);
    }

    /// Accumulators start as bias + strength * noise.
    __device__ __forceinline__ void start_chunk(float noise0, float noise1)
    {
        mbarrier_wait(bars.record_full + 8 * (chunks & 1), chunks >> 1 & 1);
        const uint32_t bias = record() + kRecordBias + 16 * (lane % 4);
        float strength;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(strength) : "r"(record() + kRecordStrength) : "memory");
        noise0 *= strength;
        noise1 *= strength;
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            float4 v;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                         : "r"(bias + 64 * q)
                         : "memory");
            acc[8 * q + 0] = v.x + noise0;
            acc[8 * q + 1] = v.y + noise0;
            acc[8 * q + 2] = v.x + noise1;
            acc[8 * q + 3] = v.y + noise1;
            acc[8 * q + 4] = v.z + noise0;
            acc[8 * q + 5] = v.w + noise0;
            acc[8 * q + 6] = v.z + noise1;
            acc[8 * q + 7] = v.w + noise1;
        }
    }

    __device__ __forceinline__ void end_chunk()
    {
        if (lane == 0) mbarrier_arrive(bars.record_empty + 8 * (chunks & 1));
        ++chunks;
    }

    /// Products of the two warpgroups take turns, a chunk each, so that one's tail runs under the other's products.
    /// Without turns they fall into step, and the matrix units wait through both tails.
    __device__ __forceinline__ void wait_for_turn() const { named_barrier_wait(1 + warpgroup, 128 * kConsumers); }
    __device__ __forceinline__ void pass_turn() const { named_barrier_arrive(2 - warpgroup, 128 * kConsumers); }

    /// The products of one chunk. Parked positions below `reloads` come back as the products on them end. kStreamed:
    /// the first layer's, each of the first `streamed` positions followed by a streamed slab and its weights.
    template <bool kReload, bool kStreamed>
    __device__ __forceinline__ void products(uint32_t positions, int reloads, int streamed)
    {
        constexpr uint32_t kNone = kStages;
        uint32_t pending = kNone, pending_input = kNone;  // slots that the group under way reads
        auto retire = [&] {
            if (pending != kNone) release(pending);
            if (kStreamed && pending_input != kNone) release(pending_input);
            pending = pending_input = kNone;
        };
        wait_for_turn();
        // a streamed chunk has more slabs than the ring has slots: no warpgroup can run through it alone
        if (kStreamed && streamed > 0) pass_turn();
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            if (positions >> i & 1) {
                mbarrier_wait(bars.full + 8 * at.slot(), at.phase());
                wgmma_fence();
                const uint32_t b = slot_descriptor(at.slot());
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int j = 16 * i + 4 * k;
                    wgmma_registers<T>(acc, a[j], a[j + 1], a[j + 2], a[j + 3], matrix_descriptor(b + 2 * k));
                }
                wgmma_commit();
                wgmma_wait<1>();
                retire();
                pending = at.slot();
                at.advance();
            } else {
                wgmma_wait<0>();
                retire();
            }
            if (kStreamed && i < streamed) {
                const uint32_t slot = at.slot();
                const uint32_t x = slot_descriptor(at.slot()) + warpgroup * (kInputSlabBytes >> 4);
                mbarrier_wait(bars.full + 8 * at.slot(), at.phase());
                at.advance();
                mbarrier_wait(bars.full + 8 * at.slot(), at.phase());
                wgmma_fence();
                const uint32_t b = slot_descriptor(at.slot());
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    wgmma_shared<T>(acc, matrix_descriptor(x + 2 * k), matrix_descriptor(b + 2 * k));
                }
                wgmma_commit();
                wgmma_wait<1>();
                retire();
                pending = at.slot();
                pending_input = slot;
                at.advance();
            } else if (kStreamed && i < reloads) {
                wgmma_wait<0>();
                retire();
            }
            // here the products on position i (streamed) or i - 1 have ended
            const int ended = kStreamed ? i : i - 1;
            if (kReload && ended >= 0 && ended < reloads) reload(ended);
        }
        if (!kStreamed || streamed == 0) pass_turn();
        wgmma_wait<0>();
        retire();
    }

    /// The same for a layer whose input fills every position: slab i is in slot i.
    template <bool kReload>
    __device__ __forceinline__ void full_products(int reloads)
    {
        wait_for_turn();
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            mbarrier_wait(bars.full + 8 * i, at.phase_of(i));
            wgmma_fence();
            const uint32_t b = slot_descriptor(i);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int j = 16 * i + 4 * k;
                wgmma_registers<T>(acc, a[j], a[j + 1], a[j + 2], a[j + 3], matrix_descriptor(b + 2 * k));
            }
            wgmma_commit();
            if (i == kRegisterSlabs - 1) pass_turn();
            wgmma_wait<1>();
            if (i > 0) release(i - 1);
            if (kReload && i > 0 && i - 1 < reloads) reload(i - 1);
        }
        wgmma_wait<0>();
        release(kRegisterSlabs - 1);
        at.advance_all();
    }

    __device__ __forceinline__ void reload(int position)
    {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = 16 * position + 4 * k;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[i]), "=r"(a[i + 1]), "=r"(a[i + 2]), "=r"(a[i + 3])
                         : "r"(parked(4 * position + k))
                         : "memory");
        }
    }

    /// Activation, ToRGB, and the result to where it waits: the last chunk to the last two positions, another parked.
    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, bool has_rgb, bool keep)
    {
        uint32_t local[32];
        uint32_t* q = kLast ? a + 16 * (kRegisterSlabs - 2) : local;
#pragma unroll
        for (int j = 0; j < 32; ++j) q[j] = leaky_relu_pair<T>(acc[2 * j], acc[2 * j + 1], p.slope_pair);
        if (has_rgb) add_rgb(q);
        if (!kLast && keep) {
#pragma unroll
            for (int s = 0; s < 8; ++s) {
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(parked(8 * chunk + s)), "r"(q[4 * s]),
                             "r"(q[4 * s + 1]), "r"(q[4 * s + 2]), "r"(q[4 * s + 3])
                             : "memory");
            }
        }
        end_chunk();
    }

    /// Adds R x' of a chunk's 128 channels. By ordinary arithmetic: a small product of the warp's own would wait in the
    /// matrix units behind all of the other warpgroup's.
    __device__ __forceinline__ void add_rgb(const uint32_t* q)
    {
        const uint32_t weights = record() + kRecordRgb + 16 * (lane % 4);
        float sum[2][kMaxRgbChannels] = {};
#pragma unroll
        for (int n = 0; n < kRgbPairs / 4; ++n) {
            uint32_t w[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                         : "r"(weights + 64 * n)
                         : "memory");
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int block = (4 * n + k) / kMaxRgbChannels, c = (4 * n + k) % kMaxRgbChannels;
                const float2 v = unpack_pair(w[k], T());
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const float2 x = unpack_pair(q[2 * block + row], T());
                    sum[row][c] = fmaf(v.y, x.y, fmaf(v.x, x.x, sum[row][c]));
                }
            }
        }
        // the quad's four sums become one: thread t keeps channel t
        const bool high = lane & 2, odd = lane & 1;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float* s = sum[row];
            const float first = (high ? s[2] : s[0]) + __shfl_xor_sync(~0u, high ? s[0] : s[2], 2);
            const float second = (high ? 0.0f : s[1]) + __shfl_xor_sync(~0u, high ? s[1] : 0.0f, 2);
            rgb[row] += (odd ? second : first) + __shfl_xor_sync(~0u, odd ? first : second, 1);
        }
    }

    /// kFirst: layer 0, whose input may come in streamed slabs too.
    template <bool kFirst, bool kFull>
    __device__ __forceinline__ void layer(int index)
    {
        const StackLayer& l = p.layers[index];
        const bool keep = index + 1 < p.depth;
        const bool has_rgb = l.rgb;
        const int last = l.chunks - 1;
        const uint32_t positions = l.positions;
        const int streamed = kFirst ? p.streamed_slabs : 0;
        const int reloads = keep ? 2 * last : 0;
        const int source = lane - lane % 4 + 2 * (index % 2);
        const float noise0 = __shfl_sync(~0u, drawn, source), noise1 = __shfl_sync(~0u, drawn, source + 1);
        if (kFull) at.align();
#pragma unroll 1
        for (int chunk = 0; chunk < last; ++chunk) {
            start_chunk(noise0, noise1);
            if constexpr (kFull) {
                full_products<false>(0);
            } else {
                products<false, kFirst>(positions, 0, streamed);
            }
            finish_chunk<false>(chunk, has_rgb, keep);
        }
        start_chunk(noise0, noise1);
        if constexpr (kFull) {
            full_products<true>(reloads);
        } else {
            products<true, kFirst>(positions, reloads, streamed);
        }
        finish_chunk<true>(last, has_rgb, keep);
    }

    /// The unit in hand waits in shared memory: registers are scarcer.
    __device__ __forceinline__ int unit() const
    {
        int value;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(unit_address()) : "memory");
        return value;
    }

    __device__ __forceinline__ void set_unit(int value) const
    {
        __syncwarp();
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(unit_address()), "r"(value) : "memory");
        __syncwarp();
    }

    __device__ __forceinline__ uint32_t unit_address() const { return shared + kUnitOffset + threadIdx.x / 32 * 4; }

    __device__ __forceinline__ int image() const { return unit() / p.groups; }

    /// Pixel of row g; row g + 8 is eight pixels on.
    __device__ __forceinline__ int64_t pixel() const
    {
        const int row = warpgroup * kWarpgroupPixels + thread / 32 * 16 + lane / 4;
        return int64_t{unit() % p.groups} * kGroupPixels + cluster_rank() * kBlockPixels + row;
    }

    /// A quad keeps the places of its two rows, half a place a thread: of row g + 8 (t % 2), x where t / 2 is 0,
    /// otherwise y, as bits; where there are no coordinates, the low or the high word of the pixel's number.
    __device__ __forceinline__ void find_place()
    {
        const int64_t mine = min(pixel() + 8 * (lane % 2), p.places.pixels - 1);
        const bool second = lane & 2;
        if (p.places.coords != nullptr || p.places.grid_columns > 0) {
            place = __float_as_uint(pixel_coordinate(p.places, image(), mine, second));
        } else {
            place = static_cast<uint32_t>((p.places.first_pixel + mine) >> (second ? 32 : 0));
        }
    }

    /// Half of the place of row g + 8 `row`.
    __device__ __forceinline__ uint32_t place_of(int row, int second) const
    {
        return __shfl_sync(~0u, place, lane - lane % 4 + row + 2 * second);
    }

    /// Noise of one layer at this thread's row g + 8 (t % 2).
    __device__ __forceinline__ float draw(int index) const
    {
        if (p.noise_mode == StackNoise::kNone) return 0.0f;
        if (p.noise_mode == StackNoise::kGiven) {
            const int64_t mine = min(pixel() + 8 * (lane % 2), p.places.pixels - 1);
            if (index >= p.depth) return 0.0f;
            return __ldg(p.noise + index * p.noise_layer_stride + image() * p.noise_batch_stride + mine);
        }
        uint32_t c0 = place_of(lane % 2, 0), c1 = place_of(lane % 2, 1);
        if (p.noise_mode == StackNoise::kCoords) {
            c0 = __float_as_uint(__uint_as_float(c0) + 0.0f);  // adding +0 turns -0 into +0: one point, one noise
            c1 = __float_as_uint(__uint_as_float(c1) + 0.0f);
        }
        const auto seed = static_cast<uint64_t>(__ldg(p.seed));
        return normal_noise(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), c0, c1,
                            p.first_image + image(), p.first_layer + index);
    }

    /// The first layer's input.
    __device__ __forceinline__ void enter()
    {
        if (p.fourier != nullptr) {
            const auto point = [&](int row) {
                return make_float2(__uint_as_float(place_of(row, 0)), __uint_as_float(place_of(row, 1)));
            };
            encode_input<T>(a, p, lane % 4, point(0), point(1));
        } else {
            load_input(a, p, lane % 4, image(), pixel());
        }
    }

    __device__ __forceinline__ void run()
    {
        const int t = lane % 4;
        if (warpgroup == 1) pass_turn();  // warpgroup 0 begins
#pragma unroll 1
        for (set_unit(cluster_index()); unit() < p.units; set_unit(unit() + cluster_count())) {
            find_place();
            enter();
#pragma unroll
            for (int row = 0; row < 2; ++row) rgb[row] = t < p.channels ? __ldg(p.rgb_bias + t) : 0.0f;
            // noise: of a quad's four threads each draws for one of two rows (t % 2) and one of two layers (t / 2)
            drawn = draw(t / 2);
            layer<true, false>(0);
#pragma unroll 1
            for (int index = 1; index < p.depth; ++index) {
                if (index % 2 == 0) drawn = draw(index + t / 2);
                if (is_full(p, index)) {
                    layer<false, true>(index);
                } else {
                    layer<false, false>(index);
                }
            }
            store();
        }
        if (warpgroup == 0) wait_for_turn();  // no barrier is left half full
    }

    __device__ __forceinline__ void store() const
    {
        const int t = lane % 4;
        if (t >= p.channels) return;
        float* out = p.rgb + image() * p.rgb_batch_stride + t * p.rgb_channel_stride;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int64_t at_pixel = pixel() + 8 * row;
            if (at_pixel < p.places.pixels) out[at_pixel * p.rgb_pixel_stride] = rgb[row];
        }
    }
};

/// Grid: clusters of kCluster blocks of kStackThreads threads, as many as fit; each takes units in turn.
/// input_map: of the streamed inputs, [B or 1][P][streamed channels]; unused without them.
template <typename T>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStackThreads, 1)
    stack_fwd_kernel(const __grid_constant__ StackParams p, const __grid_constant__ TensorMap input_map)
{
    extern __shared__ __align__(1024) char memory[];
    const uint32_t shared = shared_address(memory);
    const StackBarriers bars(shared);
    if (threadIdx.x == 0) bars.init();
    __syncthreads();
    cluster_sync();

    if (threadIdx.x >= 128 * kConsumers) {
        registers_give<24>();
        if (threadIdx.x == 128 * kConsumers) {
            produce_slabs(p, &input_map, shared, bars);
        } else if (threadIdx.x == 128 * kConsumers + 32) {
            produce_records(p, shared, bars);
        }
    } else {
        registers_take<240>();
        StackConsumer<T> consumer(p, shared);
        consumer.run();
    }
    // nobody leaves while the other block may still signal it
    __syncthreads();
    cluster_sync();
}

}  // namespace cips
