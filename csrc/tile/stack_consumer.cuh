// A consumer warpgroup of an on-chip stack, and a block's work: products of the layers in turn, with a tail between
// them that is the kernel's own.
//
// A cluster of two blocks takes 256 pixels, a consumer warpgroup 64. Its activations sit in registers as A fragments
// (the accumulator of a product has the very layout that the next product reads), 8 positions of 64 channels. Outputs
// are computed in chunks of 128: a finished chunk parks in shared memory, each thread its own registers, until the
// last chunk's products have read the input for the last time; then it moves to the registers. Weights come through a
// ring of slabs, multicast to both blocks. No warpgroup barrier, no stmatrix, no proxy fence.
#pragma once

#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/wgmma.cuh"
#include "tile/stack_ring.cuh"

namespace cips {

/// A consumer warpgroup. All of it is in registers, so all of it is inlined.
template <typename Tail>
struct StackConsumer : Tail {
    using T = typename Tail::Type;
    using Shape = typename Tail::Shape;
    using Tail::a;
    using Tail::acc;
    using Tail::bars;
    using Tail::draw;
    using Tail::lane;
    using Tail::p;
    using Tail::reload;
    using Tail::set_unit;
    using Tail::shared;
    using Tail::start_chunk;
    using Tail::thread;
    using Tail::unit;
    using Tail::warpgroup;

    RingPosition<Shape::kStages> at{false};
    float drawn = 0.0f;

    template <typename... More>
    __device__ __forceinline__ StackConsumer(const StackParams& params, uint32_t base, const More&... more)
        : Tail(params, base, more...)
    {
    }

    __device__ __forceinline__ void release(uint32_t slot) const
    {
        if (thread < kCluster) mbarrier_arrive_cluster(bars.empty + 8 * slot, thread);
    }

    __device__ __forceinline__ uint32_t slot_descriptor(uint32_t slot) const
    {
        return descriptor_start(shared + Shape::kRingOffset) + slot * (kSlabBytes >> 4);
    }

    /// Products of the two warpgroups take turns, a chunk each, so that one's tail runs under the other's products.
    /// Without turns they fall into step, and the matrix units wait through both tails.
    __device__ __forceinline__ void wait_for_turn() const { named_barrier_wait(1 + warpgroup, 128 * kConsumers); }
    __device__ __forceinline__ void pass_turn() const { named_barrier_arrive(2 - warpgroup, 128 * kConsumers); }

    /// The slots that the group of products under way reads, to be released when it has ended.
    struct Pending {
        static constexpr uint32_t kNone = Shape::kStages;
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
            if (p.streamed_slabs > 0 ? i == 0 : i + 1 == Shape::kTurn) pass_turn();
        }
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
            if (i + 1 == Shape::kTurn) pass_turn();
        }
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

    /// kFull: a layer whose input fills every position.
    template <bool kFull>
    __device__ __forceinline__ void layer(int index)
    {
        const StackLayer& l = p.layers[index];
        const bool keep = index + 1 < p.depth;
        const int last = l.chunks - 1;
        const int reloads = keep ? 2 * last : 0;
        const int source = lane - lane % 4 + 2 * (index % 2);
        const float noise0 = __shfl_sync(~0u, drawn, source), noise1 = __shfl_sync(~0u, drawn, source + 1);
        if (kFull) at.align();
        if constexpr (Tail::kSkips) {
            if (l.keeps_input) this->keep_input();
        }
#pragma unroll 1
        for (int chunk = -l.skip_chunks; chunk < last; ++chunk) {
            start_chunk(l, chunk, noise0, noise1);
            if constexpr (kFull) {
                full_products<false>(0);
            } else {
                products<false>(l.positions, 0);
            }
            if constexpr (Tail::kSkips) {
                if (chunk < 0) {
                    this->keep_chunk(chunk + l.skip_chunks, l.skip_chunks);
                    continue;
                }
            }
            this->template finish_chunk<false>(chunk, l, keep, source);
        }
        start_chunk(l, last, noise0, noise1);
        if constexpr (kFull) {
            full_products<true>(reloads);
        } else {
            products<true>(l.positions, reloads);
        }
        this->template finish_chunk<true>(last, l, keep, source);
    }

    __device__ __forceinline__ void first_layer()
    {
        const StackLayer& l = p.layers[0];
        const bool keep = p.depth > 1;
        const int source = lane - lane % 4;
        const float noise0 = __shfl_sync(~0u, drawn, source), noise1 = __shfl_sync(~0u, drawn, source + 1);
        this->make_input();
#pragma unroll 1
        for (int chunk = 0; chunk < l.chunks; ++chunk) {
            if (chunk > 0) this->template finish_chunk<false>(chunk - 1, l, keep, source);
            start_chunk(l, chunk, noise0, noise1);
            if constexpr (Tail::kInput) first_products();
        }
        if (Tail::kTight) this->template finish_chunk<true>(l.chunks - 1, l, keep, source);
#pragma unroll
        for (int i = 0; i < kRegisterSlabs - 2; ++i) {
            if (keep && i < 2 * (l.chunks - 1)) reload(i, i);
        }
        if (!Tail::kTight) this->template finish_chunk<true>(l.chunks - 1, l, keep, source);
    }

    __device__ __forceinline__ void run()
    {
        const int t = lane % 4;
        if (warpgroup == 1) pass_turn();  // warpgroup 0 begins
#pragma unroll 1
        for (bool more = set_unit(0, 0, cluster_index()); more; more = set_unit(unit().x, unit().y, cluster_count())) {
            this->find_place();
            this->find_blend();
            this->start_colours();
            // noise: of a quad's four threads each draws for one of two rows (t % 2) and one of two layers (t / 2)
            drawn = this->keep_noise(draw(t / 2));
            first_layer();
#pragma unroll 1
            for (int index = 1; index < p.depth; ++index) {
                if (index % 2 == 0) drawn = this->keep_noise(draw(index + t / 2));
                if constexpr (Shape::kStages == kRegisterSlabs) {
                    if (is_full<Shape>(p, index)) {
                        layer<true>(index);
                        continue;
                    }
                }
                layer<false>(index);
            }
            this->store();
        }
        if (warpgroup == 0) wait_for_turn();  // no barrier is left half full
    }
};

/// A block's work. more: what else the tail is made with.
template <typename Tail, typename... More>
__device__ __forceinline__ void run_stack(const StackParams& p, const TensorMap& input_map, char* memory,
                                          const More&... more)
{
    using Shape = typename Tail::Shape;
    const uint32_t shared = shared_address(memory);
    const StackBarriers<Shape> bars(shared);
    if (threadIdx.x == 0) {
        bars.init();
        Tail::keep_seed(p, shared);
    }
    __syncthreads();
    cluster_sync();

    if (threadIdx.x >= 128 * kConsumers) {
        registers_give<24>();
        if (threadIdx.x == 128 * kConsumers) {
            produce_slabs<Shape>(p, &input_map, shared, bars);
        } else if (threadIdx.x == 128 * kConsumers + 32) {
            produce_records<Shape>(p, shared, bars);
        }
    } else {
        registers_take<240>();
        StackConsumer<Tail> consumer(p, shared, more...);
        consumer.run();
    }
    // nobody leaves while the other block may still signal it
    __syncthreads();
    cluster_sync();
}

}  // namespace cips
