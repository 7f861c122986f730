// What the consumer warpgroups of every on-chip stack share: turns, the ring's slots, the products of layer 0, and a
// block's work.
//
// A cluster of two blocks takes 256 pixels, a consumer warpgroup 64. Its activations sit in registers as A fragments
// (the accumulator of a product has the very layout that the next product reads), 8 positions of 64 channels. What is
// finished parks in shared memory, each thread its own registers, until the last products have read the input for the
// last time; then it moves to the registers. Weights come through a ring of slabs, multicast to both blocks. No
// warpgroup barrier, no stmatrix; a proxy fence only where training stores what is parked.
#pragma once

#include "ptx/grid_dependency.cuh"
#include "ptx/named_barrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/wgmma.cuh"
#include "tile/stack_made.cuh"
#include "tile/stack_ring.cuh"

namespace cips {

template <typename Tail>
struct StackTurns : Tail {
    using T = typename Tail::Type;
    using Shape = typename Tail::Shape;
    using Tail::a;
    using Tail::acc;
    using Tail::bars;
    using Tail::p;
    using Tail::shared;
    using Tail::thread;
    using Tail::warpgroup;

    RingOf<Shape> at{false};
    float drawn = 0.0f;

    template <typename... More>
    __device__ __forceinline__ StackTurns(const StackParams& params, uint32_t base, const More&... more)
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

    /// Of the slot in hand. Taken from one lane it is known to be the warp's: descriptors are then worked out in
    /// uniform registers. Moved there one by one they cost 48 cycles a product, which has 32 (64 outputs) or 64.
    __device__ __forceinline__ uint32_t slot_descriptor() const
    {
        return slot_descriptor(__shfl_sync(~0u, at.slot(), 0));
    }

    /// After layer 0: the next unit's rows may be made.
    __device__ __forceinline__ void release_rows() const
    {
        if constexpr (Tail::Rows::kMakes) {
            if (p.made.made == nullptr || thread % 32 != 0) return;
            const uint32_t unit = count(shared + kMadeRead + threadIdx.x / 32 * 4);
            mbarrier_arrive(MadeBarriers<typename Tail::Rows>(shared).empty(unit));
        }
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

    __device__ __forceinline__ BarrierPhase full_phase(const RingOf<Shape>& slab) const
    {
        return {bars.full + 8 * slab.slot(), slab.phase()};
    }

    __device__ __forceinline__ void wait_for(const RingOf<Shape>& slab) const
    {
        const BarrierPhase full = full_phase(slab);
        mbarrier_wait(full.barrier, full.parity);
    }

    __device__ __forceinline__ void wait_for_slab() const { wait_for(at); }

    /// Sends the products on a position in registers, and waits for those before.
    __device__ __forceinline__ void send(int position, Pending& pending)
    {
        wait_for_slab();
        wgmma_fence();
        const uint32_t b = slot_descriptor();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int j = 16 * position + 4 * k;
            Tail::multiply(a + j, b + 2 * k);
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
        const uint32_t x = slot_descriptor() + __shfl_sync(~0u, warpgroup, 0) * (kInputSlabBytes >> 4);
        wait_for_slab();
        at.advance();
        wait_for_slab();
        wgmma_fence();
        const uint32_t b = slot_descriptor();
#pragma unroll
        for (int k = 0; k < 4; ++k) Tail::multiply_shared(x + 2 * k, b + 2 * k);
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
            if (i == (p.streamed_slabs > 0 ? 0 : Shape::kTurn - 1)) pass_turn();
        }
        wgmma_wait<0>();
        retire(pending);
    }
};

/// A consumer warpgroup's work.
template <typename Consumer>
__device__ __forceinline__ void run_consumer(Consumer& c)
{
    const int t = c.lane % 4;
    if (c.warpgroup == 1) c.pass_turn();  // warpgroup 0 begins
#pragma unroll 1
    for (bool more = c.set_unit(0, 0, cluster_index()); more;
         more = c.set_unit(c.unit().x, c.unit().y, cluster_count())) {
        c.find_place();
        c.find_blend();
        c.start_colours();
        // noise: of a quad's four threads each draws for one of two rows (t % 2) and one of two layers (t / 2)
        c.drawn = c.keep_noise(c.draw(t / 2));
        c.first_layer();
        c.release_rows();
#pragma unroll 1
        for (int index = 1; index < c.p.depth; ++index) {
            if (index % 2 == 0) c.drawn = c.keep_noise(c.draw(index + t / 2));
            c.next_layer(index);
        }
        c.store();
    }
    if (c.warpgroup == 0) c.wait_for_turn();  // no barrier is left half full
    c.settle();
}

/// A block's work. more: what else the tail is made with.
template <typename Consumer, typename... More>
__device__ __forceinline__ void run_stack(const StackParams& p, const TensorMap& input_map, char* memory,
                                          const More&... more)
{
    grid_dependency_wait();
    using Shape = typename Consumer::Shape;
    const uint32_t shared = shared_address(memory);
    const StackBarriers<Shape> bars(shared);
    const MadeBarriers<typename Consumer::Rows> made(shared);
    if (threadIdx.x == 0) {
        made.init();
        bars.init();
        Consumer::keep_seed(p, shared);
    }
    make_first_rows<typename Consumer::Rows>(p, shared);
    __syncthreads();
    cluster_sync();

    if (threadIdx.x >= 128 * kConsumers) {
        registers_give<24>();
        const int warp = threadIdx.x / 32 - 4 * kConsumers;
        if (threadIdx.x == 128 * kConsumers) {
            produce_slabs<Shape, typename Consumer::Rows>(p, &input_map, shared, bars, made);
        } else if (threadIdx.x == 128 * kConsumers + 32) {
            produce_records<Shape>(p, shared, bars);
        } else if (warp >= 4 - kMakers) {
            make_next_rows<typename Consumer::Rows>(p, shared);
        }
    } else {
        registers_take<240>();
        Consumer consumer(p, shared, more...);
        run_consumer(consumer);
    }
    // nobody leaves while the other block may still signal it
    __syncthreads();
    cluster_sync();
}

}  // namespace cips
