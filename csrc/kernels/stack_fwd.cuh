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
#include "epilogue/stack_pixels.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/wgmma.cuh"
#include "tile/stack_input.cuh"
#include "tile/stack_ring.cuh"

namespace cips {

/// A consumer warpgroup. All of it is in registers, so all of it is inlined.
template <typename T>
struct StackConsumer : StackPixels {
    const StackBarriers bars;
    RingPosition at{false};
    uint32_t chunks = 0;  // worked off so far, over all tiles: the number of the record in hand
    StackInput a;         // the layer's input, 16 registers a position
    float acc[64];
    float rgb[4];  // rows g and g + 8, colours 2 t and 2 t + 1
    float drawn = 0.0f;

    __device__ __forceinline__ StackConsumer(const StackParams& params, uint32_t base)
        : StackPixels(params, base), bars(base)
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

    /// The slots that the group of products under way reads, to be released when it has ended.
    struct Pending {
        static constexpr uint32_t kNone = kStages;
        uint32_t weights = kNone, input = kNone;
    };

    __device__ __forceinline__ void retire(Pending& pending) const
    {
        if (pending.weights != Pending::kNone) release(pending.weights);
        if (pending.input != Pending::kNone) release(pending.input);
        pending = Pending();
    }

    __device__ __forceinline__ void wait_for_slab() const { mbarrier_wait(bars.full + 8 * at.slot(), at.phase()); }

    /// Sends the products on a position in registers, and waits for those before.
    __device__ __forceinline__ void send(int position, Pending& pending)
    {
        wait_for_slab();
        wgmma_fence();
        const uint32_t b = slot_descriptor(at.slot());
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int j = 16 * position + 4 * k;
            wgmma_registers<T>(acc, a[j], a[j + 1], a[j + 2], a[j + 3], matrix_descriptor(b + 2 * k));
        }
        wgmma_commit();
        wgmma_wait<1>();
        retire(pending);
        pending.weights = at.slot();
        at.advance();
    }

    /// The same on a streamed slab.
    __device__ __forceinline__ void send_streamed(Pending& pending)
    {
        const uint32_t slot = at.slot();
        const uint32_t x = slot_descriptor(slot) + warpgroup * (kInputSlabBytes >> 4);
        wait_for_slab();
        at.advance();
        wait_for_slab();
        wgmma_fence();
        const uint32_t b = slot_descriptor(at.slot());
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma_shared<T>(acc, matrix_descriptor(x + 2 * k), matrix_descriptor(b + 2 * k));
        wgmma_commit();
        wgmma_wait<1>();
        retire(pending);
        pending = {at.slot(), slot};
        at.advance();
    }

    /// Slabs of the input of layer 0, into the parking area. A loop cannot number registers; unrolled, the instructions
    /// that a tile needs once would have to come from L2 each time, and took 16,000 cycles.
    __device__ __forceinline__ void park_input(int first, int end)
    {
#pragma unroll 1
        for (int slab = first; slab < end; ++slab) {
            uint32_t v[16];
            if (p.fourier != nullptr) {
                encode_slab<T>(v, slab, p, lane % 4, place_of(0), place_of(1));
            } else {
                load_slab(v, slab, p, lane % 4, image(), pixel());
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) park(4 * (slab - first) + k, v + 4 * k);
        }
    }

    /// The input of layer 0 that registers hold.
    __device__ __forceinline__ void make_input()
    {
        constexpr int kParked = 2 * kParkedChunks;  // slabs that the parking area holds
        park_input(0, min(kParked, p.register_slabs));
#pragma unroll
        for (int i = 0; i < kParked; ++i) reload(i, i);
        park_input(kParked, p.register_slabs);
#pragma unroll
        for (int i = kParked; i < kRegisterSlabs; ++i) reload(i, i - kParked);
    }

    /// The products of a chunk of layer 0: streamed slabs and positions in registers by turns.
    __device__ __forceinline__ void first_products()
    {
        Pending pending;
        // A streamed chunk has more slabs than the ring has slots: no warpgroup can run through it alone. One is ahead
        // of the other by a position, as much as the ring allows, and so is its tail.
        wait_for_turn();
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            if (i < p.streamed_slabs) send_streamed(pending);
            if (i < p.register_slabs) send(i, pending);
            if (i == 0 && p.streamed_slabs > 0) pass_turn();
        }
        if (p.streamed_slabs == 0) pass_turn();
        wgmma_wait<0>();
        retire(pending);
    }

    /// The products of a chunk of another layer. Parked positions below `reloads` come back as the products on them
    /// end.
    template <bool kReload>
    __device__ __forceinline__ void products(uint32_t positions, int reloads)
    {
        Pending pending;
        wait_for_turn();
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            if (positions >> i & 1) {
                send(i, pending);
            } else {
                wgmma_wait<0>();
                retire(pending);
            }
            // here the products on position i - 1 have ended
            if (kReload && i > 0 && i - 1 < reloads) reload(i - 1, i - 1);
        }
        pass_turn();
        wgmma_wait<0>();
        retire(pending);
    }

    /// The same for a layer whose input fills every position: slab i is in slot i. Between the end of one group of
    /// products and the end of the next is time for nothing but to send another: all else is done before.
    template <bool kReload>
    __device__ __forceinline__ void full_products(int reloads)
    {
        wgmma_fence();  // else the compiler starts the accumulators within the turn
        wait_for_turn();
        mbarrier_wait(bars.full, at.phase_of(0));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            const uint32_t b = slot_descriptor(i);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int j = 16 * i + 4 * k;
                wgmma_registers<T>(acc, a[j], a[j + 1], a[j + 2], a[j + 3], matrix_descriptor(b + 2 * k));
            }
            wgmma_commit();
            if (i + 1 == kRegisterSlabs) pass_turn();
            if (kReload && i > 1 && i - 2 < reloads) reload(i - 2, i - 2);
            if (i + 1 < kRegisterSlabs) mbarrier_wait(bars.full + 8 * (i + 1), at.phase_of(i + 1));
            wgmma_wait<1>();
            if (i > 0) release(i - 1);
            if (i + 1 < kRegisterSlabs) wgmma_fence();
        }
        wgmma_wait<0>();
        release(kRegisterSlabs - 1);
        at.advance_all();
    }

    __device__ __forceinline__ void park(int step, const uint32_t* v) const
    {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(parked(step)), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                     "r"(v[3])
                     : "memory");
    }

    /// Registers of a position, from the place `from` in the parking area.
    __device__ __forceinline__ void reload(int position, int from)
    {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int i = 16 * position + 4 * k;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(a[i]), "=r"(a[i + 1]), "=r"(a[i + 2]), "=r"(a[i + 3])
                         : "r"(parked(4 * from + k))
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
        if (!kLast && keep) {
#pragma unroll
            for (int s = 0; s < 8; ++s) park(8 * chunk + s, q + 4 * s);
        }
        if (has_rgb) add_rgb(q);
        end_chunk();
    }

    /// Adds R x' of a chunk's 128 channels, whose A fragments are `q`. By ordinary arithmetic, 350 instructions, it
    /// made the tail longer than the other warpgroup's products.
    __device__ __forceinline__ void add_rgb(const uint32_t* q)
    {
        const uint32_t weights = descriptor_start(record() + kRecordRgb, kRgbStep);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            const uint32_t* f = q + 4 * s;
            wgmma_narrow<T>(rgb, f[0], f[1], f[2], f[3], narrow_descriptor(weights + s * (2 * kRgbStep >> 4)));
        }
        wgmma_commit();
        wgmma_wait<0>();
    }

    /// kFull: a layer whose input fills every position.
    template <bool kFull>
    __device__ __forceinline__ void layer(int index)
    {
        const StackLayer& l = p.layers[index];
        const bool keep = index + 1 < p.depth;
        const bool has_rgb = l.rgb;
        const int last = l.chunks - 1;
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
                products<false>(l.positions, 0);
            }
            finish_chunk<false>(chunk, has_rgb, keep);
        }
        start_chunk(noise0, noise1);
        if constexpr (kFull) {
            full_products<true>(reloads);
        } else {
            products<true>(l.positions, reloads);
        }
        finish_chunk<true>(last, has_rgb, keep);
    }

    __device__ __forceinline__ void first_layer()
    {
        const StackLayer& l = p.layers[0];
        const bool keep = p.depth > 1;
        const bool has_rgb = l.rgb;
        const int source = lane - lane % 4;
        const float noise0 = __shfl_sync(~0u, drawn, source), noise1 = __shfl_sync(~0u, drawn, source + 1);
        make_input();
#pragma unroll 1
        for (int chunk = 0; chunk < l.chunks; ++chunk) {
            if (chunk > 0) finish_chunk<false>(chunk - 1, has_rgb, keep);
            start_chunk(noise0, noise1);
            first_products();
        }
#pragma unroll
        for (int i = 0; i < kRegisterSlabs - 2; ++i) {
            if (keep && i < 2 * (l.chunks - 1)) reload(i, i);
        }
        finish_chunk<true>(l.chunks - 1, has_rgb, keep);
    }

    __device__ __forceinline__ void run()
    {
        const int t = lane % 4;
        if (warpgroup == 1) pass_turn();  // warpgroup 0 begins
#pragma unroll 1
        for (bool more = set_unit(0, 0, cluster_index()); more; more = set_unit(unit().x, unit().y, cluster_count())) {
            find_place();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int c = 2 * t + j % 2;
                rgb[j] = c < p.channels ? __ldg(p.rgb_bias + c) : 0.0f;
            }
            // noise: of a quad's four threads each draws for one of two rows (t % 2) and one of two layers (t / 2)
            drawn = draw(t / 2);
            first_layer();
#pragma unroll 1
            for (int index = 1; index < p.depth; ++index) {
                if (index % 2 == 0) drawn = draw(index + t / 2);
                if (is_full(p, index)) {
                    layer<true>(index);
                } else {
                    layer<false>(index);
                }
            }
            store();
        }
        if (warpgroup == 0) wait_for_turn();  // no barrier is left half full
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
    if (threadIdx.x == 0) {
        bars.init();
        StackPixels::keep_seed(p, shared);
    }
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
