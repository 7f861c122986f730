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
#include "ptx/mma.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/wgmma.cuh"
#include "tile/pixel_coordinates.cuh"
#include "tile/stack_input.cuh"
#include "tile/stack_ring.cuh"

namespace cips {

/// A consumer warpgroup. All of it is in registers, so all of it is inlined.
template <typename T>
struct StackConsumer {
    const StackParams& p;
    const StackBarriers bars;
    const uint32_t shared;
    const int thread, lane, warpgroup;
    RingPosition at;
    uint32_t chunks = 0;              // worked off so far, over all tiles: the number of the record in hand
    StackInput a;                     // the layer's input, 16 registers a position
    float acc[64];
    float rgb[4];  // rows g and g + 8, channels 2 t and 2 t + 1
    float drawn = 0.0f;
    int unit = 0;

    __device__ __forceinline__ StackConsumer(const StackParams& params, uint32_t base)
        : p(params),
          bars(base),
          shared(base),
          thread(threadIdx.x % 128),
          lane(threadIdx.x % 32),
          warpgroup(threadIdx.x / 128)
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

    __device__ __forceinline__ uint32_t slot_descriptor() const
    {
        return descriptor_start(shared + kRingOffset) + at.slot * (kSlabBytes >> 4);
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
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            if (positions >> i & 1) {
                mbarrier_wait(bars.full + 8 * at.slot, at.phase);
                wgmma_fence();
                const uint32_t b = slot_descriptor();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int j = 16 * i + 4 * k;
                    wgmma_registers<T>(acc, a[j], a[j + 1], a[j + 2], a[j + 3], matrix_descriptor(b + 2 * k));
                }
                wgmma_commit();
                wgmma_wait<1>();
                retire();
                pending = at.slot;
                at.advance();
            } else {
                wgmma_wait<0>();
                retire();
            }
            if (kStreamed && i < streamed) {
                const uint32_t slot = at.slot;
                const uint32_t x = slot_descriptor() + warpgroup * (kInputSlabBytes >> 4);
                mbarrier_wait(bars.full + 8 * at.slot, at.phase);
                at.advance();
                mbarrier_wait(bars.full + 8 * at.slot, at.phase);
                wgmma_fence();
                const uint32_t b = slot_descriptor();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    wgmma_shared<T>(acc, matrix_descriptor(x + 2 * k), matrix_descriptor(b + 2 * k));
                }
                wgmma_commit();
                wgmma_wait<1>();
                retire();
                pending = at.slot;
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
        wgmma_wait<0>();
        retire();
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

    /// Adds R x' of a chunk's 128 channels: `q` are their A fragments.
    __device__ __forceinline__ void add_rgb(const uint32_t* q)
    {
        const uint32_t weights = record() + kRecordRgb + 8 * lane;
        float odd[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint2 b[4] = {};
            if (lane < kRgbLanes) {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                                 : "=r"(b[s].x), "=r"(b[s].y)
                                 : "r"(weights + 8 * kRgbLanes * (4 * half + s))
                                 : "memory");
                }
            }
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const uint32_t* f = q + 16 * half + 4 * s;
                mma<T>(s % 2 ? odd : rgb, f[0], f[1], f[2], f[3], b[s]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) rgb[j] += odd[j];
    }

    template <bool kStreamed>
    __device__ __forceinline__ void layer(int index)
    {
        const StackLayer& l = p.layers[index];
        const bool keep = index + 1 < p.depth;
        const bool has_rgb = l.rgb;
        const int last = l.chunks - 1;
        const uint32_t positions = l.positions;
        const int streamed = kStreamed ? p.streamed_slabs : 0;
        const int source = lane - lane % 4 + 2 * (index % 2);
        const float noise0 = __shfl_sync(~0u, drawn, source), noise1 = __shfl_sync(~0u, drawn, source + 1);
#pragma unroll 1
        for (int chunk = 0; chunk < last; ++chunk) {
            start_chunk(noise0, noise1);
            products<false, kStreamed>(positions, 0, streamed);
            finish_chunk<false>(chunk, has_rgb, keep);
        }
        start_chunk(noise0, noise1);
        products<true, kStreamed>(positions, keep ? 2 * last : 0, streamed);
        finish_chunk<true>(last, has_rgb, keep);
    }

    __device__ __forceinline__ int image() const { return unit / static_cast<int>(p.groups); }

    /// Pixel of row g; row g + 8 is eight pixels on.
    __device__ __forceinline__ int64_t pixel() const
    {
        const int row = warpgroup * kWarpgroupPixels + thread / 32 * 16 + lane / 4;
        return int64_t{unit % static_cast<int>(p.groups)} * kGroupPixels + cluster_rank() * kBlockPixels + row;
    }

    /// Noise of one layer at this thread's row g + 8 (t % 2). The counter is found anew each time: registers are scarcer
    /// than arithmetic.
    __device__ __forceinline__ float draw(int index) const
    {
        if (p.noise_mode == StackNoise::kNone || index >= p.depth) return 0.0f;
        const int64_t mine = min(pixel() + 8 * (lane % 2), p.places.pixels - 1);
        if (p.noise_mode == StackNoise::kGiven) {
            return __ldg(p.noise + index * p.noise_layer_stride + image() * p.noise_batch_stride + mine);
        }
        uint32_t c0, c1;
        if (p.noise_mode == StackNoise::kCoords) {
            const float2 point = pixel_coordinates(p.places, image(), mine);
            c0 = __float_as_uint(point.x + 0.0f);  // adding +0 turns -0 into +0: one point, one noise
            c1 = __float_as_uint(point.y + 0.0f);
        } else {
            c0 = static_cast<uint32_t>(p.places.first_pixel + mine);
            c1 = static_cast<uint32_t>((p.places.first_pixel + mine) >> 32);
        }
        const auto seed = static_cast<uint64_t>(__ldg(p.seed));
        return normal_noise(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), c0, c1,
                            p.first_image + image(), p.first_layer + index);
    }

    /// The first layer's input.
    __device__ __forceinline__ void enter()
    {
        const int64_t first = pixel();
        if (p.fourier != nullptr) {
            encode_input<T>(a, p, lane % 4, pixel_coordinates(p.places, image(), first),
                            pixel_coordinates(p.places, image(), first + 8));
        } else {
            load_input(a, p, lane % 4, image(), first);
        }
    }

    __device__ __forceinline__ void run(int cluster, int clusters)
    {
        const int t = lane % 4;
#pragma unroll 1
        for (unit = cluster; unit < p.units; unit += clusters) {
            enter();
#pragma unroll
            for (int j = 0; j < 4; ++j) rgb[j] = 2 * t + j % 2 < p.channels ? __ldg(p.rgb_bias + 2 * t + j % 2) : 0.0f;
            // noise: of a quad's four threads each draws for one of two rows (t % 2) and one of two layers (t / 2)
            drawn = draw(t / 2);
            layer<true>(0);
#pragma unroll 1
            for (int index = 1; index < p.depth; ++index) {
                if (index % 2 == 0) drawn = draw(index + t / 2);
                layer<false>(index);
            }
            store();
        }
    }

    __device__ __forceinline__ void store() const
    {
        const int t = lane % 4;
        float* out = p.rgb + image() * p.rgb_batch_stride + 2 * t * p.rgb_channel_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t at_pixel = pixel() + 8 * (j / 2);
            if (2 * t + j % 2 < p.channels && at_pixel < p.places.pixels) {
                out[at_pixel * p.rgb_pixel_stride + j % 2 * p.rgb_channel_stride] = rgb[j];
            }
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
    const uint32_t rank = cluster_rank();
    const int cluster = blockIdx.x / kCluster;
    const int clusters = gridDim.x / kCluster;
    if (threadIdx.x == 0) bars.init();
    __syncthreads();
    cluster_sync();

    if (threadIdx.x >= 128 * kConsumers) {
        registers_give<24>();
        if (threadIdx.x == 128 * kConsumers) {
            produce_slabs(p, &input_map, shared, bars, rank, cluster, clusters);
        } else if (threadIdx.x == 128 * kConsumers + 32) {
            produce_records(p, shared, bars, cluster, clusters);
        }
    } else {
        registers_take<240>();
        StackConsumer<T> consumer(p, shared);
        consumer.run(cluster, clusters);
    }
    // nobody leaves while the other block may still signal it
    __syncthreads();
    cluster_sync();
}

}  // namespace cips
