// A consumer warpgroup of blends: a layer's outputs in halves of a chunk, whose products leave half of the accumulators
// to the forms of the demodulation. Halves park at the position of their number, the first of the last chunk at
// position 6; the last half goes straight to position 7.
#pragma once

#include "tile/stack_turns.cuh"

namespace cips {

/// All of it is in registers, so all of it is inlined.
template <typename Tail>
struct StackHalves : StackTurns<Tail> {
    using Turns = StackTurns<Tail>;
    using Shape = typename Turns::Shape;
    using T = typename Turns::T;
    using Turns::a;
    using Turns::acc;
    using Turns::at;
    using Turns::lane;
    using Turns::p;
    using Turns::release;
    using Turns::reload;

    using Turns::Turns;

    /// kFresh: the first products of a half.
    template <bool kFresh = false>
    __device__ __forceinline__ void send_slab(int position, uint32_t b)
    {
        float (&sums)[32] = this->template half<0>();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint32_t* x = a + 16 * position + 4 * k;
            const uint64_t weights = matrix_descriptor(b + 2 * k);
            if (kFresh && k == 0) {
                wgmma_fresh<T>(sums, x[0], x[1], x[2], x[3], weights);
            } else {
                wgmma_registers<T>(sums, x[0], x[1], x[2], x[3], weights);
            }
        }
    }

    /// The products of a half and its forms. Parked positions below `reloads` and, if `keep`, position 6 come back as
    /// the products on them end.
    template <bool kLast>
    __device__ __forceinline__ void products(uint32_t positions, int reloads, bool keep)
    {
        typename Turns::Pending pending;
        this->wait_for_record();
#pragma unroll
        for (int j = 0; j < 32; ++j) start_from_zero(acc[j]);
        wgmma_fence();
        this->wait_for_turn();
        wgmma_fence();
        this->send_forms();
        wgmma_commit();
#pragma unroll
        for (int i = 0; i < kRegisterSlabs; ++i) {
            if (positions >> i & 1) {
                if (i % 2 == 0) this->wait_for_slab();
                wgmma_fence();
                send_slab(i, this->slot_descriptor() + i % 2 * Tail::kHalfSlab);
                wgmma_commit();
                wgmma_wait<1>();
                this->retire(pending);
                if (i % 2 == 1 || !(positions >> (i + 1) & 1)) {
                    pending.weights = at.slot();
                    at.advance();
                }
            } else {
                wgmma_wait<0>();
                this->retire(pending);
            }
            if (kLast && i > 0 && i - 1 < reloads) reload(i - 1, i - 1);
            if (i + 1 == kRegisterSlabs) this->pass_turn();
        }
        wgmma_wait<0>();
        this->retire(pending);
        if (kLast && keep) reload(kRegisterSlabs - 2, kRegisterSlabs - 2);
    }

    uint32_t asked = 0;  // whether what the next half of a full layer waits for first has come

    /// The same for a layer whose input fills every position. Between the end of one group of products and the end of
    /// the next is time for little but to send another: whatever waits in the queue of shared memory, where the other
    /// warpgroup's roots are too, is done before the turn as far as can be.
    template <bool kLast>
    __device__ __forceinline__ void full_products(int reloads, bool keep, typename Tail::Ahead& tail, int source)
    {
        constexpr int kPairs = kRegisterSlabs / 2;
        const uint32_t first = __shfl_sync(~0u, at.slot(), 0);
        auto ahead = at;  // two slots ahead of the products
        ahead.advance();
        if (!asked) mbarrier_wait_all(this->full_phase(at), this->full_phase(ahead), this->record_phase());
        ahead.advance();
        this->wait_for_turn();
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            const uint32_t slot = first + pair < Shape::kStages ? first + pair : first + pair - Shape::kStages;
            const uint32_t b = this->slot_descriptor(slot);
            wgmma_fence();
            if (pair == 0) {
                send_slab<true>(0, b);
            } else {
                send_slab(2 * pair, b);
            }
            wgmma_commit();
            if (pair + 2 < kPairs) {
                this->wait_for(ahead);
                ahead.advance();
            }
            wgmma_wait<1>();
            if (pair > 0) {
                release(at.slot());
                at.advance();
            }
            wgmma_fence();
            send_slab(2 * pair + 1, b + Tail::kHalfSlab);
            if (pair == kPairs - 1) this->send_forms();
            wgmma_commit();
            if (pair == kPairs - 1) {
                this->pass_turn();
                this->load_ahead(tail, source);
            }
            if (kLast && pair > 0) {  // the products of the pair before have ended
#pragma unroll
                for (int i = 2 * pair - 2; i < 2 * pair; ++i) {
                    if (i < reloads) reload(i, i);
                }
            }
            wgmma_wait<1>();
        }
        wgmma_wait<0>();
        release(at.slot());
        at.advance();
        auto next = at;
        next.advance();
        asked = mbarrier_test(this->full_phase(at)) & mbarrier_test(this->full_phase(next)) &
                mbarrier_test(this->record_phase(1));
        if (kLast && keep) reload(kRegisterSlabs - 2, kRegisterSlabs - 2);
    }

    template <bool kFull>
    __device__ __forceinline__ void layer(int index)
    {
        const StackLayer& l = p.layers[index];
        const bool keep = index + 1 < p.depth;
        const int last = kHalves * (l.chunks - 1);
        if constexpr (!kFull) asked = 0;
        const int source = lane - lane % 4 + 2 * (index % 2);
        typename Tail::Ahead tail;
#pragma unroll 1
        for (int half = 0; half <= last; ++half) {
            if constexpr (kFull) {
                full_products<false>(0, false, tail, source);
            } else {
                products<false>(l.positions, 0, false);
                this->load_ahead(tail, source);
            }
            this->template finish_half<false>(half < last ? half : kRegisterSlabs - 2, l, tail);
        }
        if constexpr (kFull) {
            full_products<true>(keep ? last : 0, keep, tail, source);
        } else {
            products<true>(l.positions, keep ? last : 0, keep);
            this->load_ahead(tail, source);
        }
        this->template finish_half<true>(kRegisterSlabs - 1, l, tail);
    }

    /// A chunk of layer 0, whose products left no room for forms. After the last one registers do without their input.
    template <bool kLast>
    __device__ __forceinline__ void finish_first_chunk(int position, const StackLayer& l, int source)
    {
        typename Tail::Ahead tail;
        if constexpr (kLast) reload(Tail::kAside, Tail::kAside);
        this->put_sums_aside();
        this->make_forms(tail, source);
        this->template finish_half<kLast>(position, l, tail);
        this->take_sums_back();
        this->make_forms(tail, source);
        this->template finish_half<kLast>(position + 1, l, tail);
    }

    /// By chunks: in halves its streamed input would come twice as often.
    __device__ __forceinline__ void first_layer()
    {
        const StackLayer& l = p.layers[0];
        const bool keep = p.depth > 1;
        const int source = lane - lane % 4, last = l.chunks - 1;
        this->make_input();
#pragma unroll 1
        for (int chunk = 0; chunk <= last; ++chunk) {
            if (chunk > 0) finish_first_chunk<false>(2 * chunk - 2, l, source);
#pragma unroll
            for (int j = 0; j < 64; ++j) start_from_zero(acc[j]);
            this->first_products();
#pragma unroll
            for (int j = 0; j < 64; ++j) read_from_here(acc[j]);
        }
        finish_first_chunk<true>(kRegisterSlabs - 2, l, source);
#pragma unroll
        for (int i = 0; i < Tail::kAside; ++i) {
            if (keep && i < 2 * last) reload(i, i);
        }
        asked = 0;
    }

    __device__ __forceinline__ void next_layer(int index)
    {
        if (p.layers[index].positions == (1 << kRegisterSlabs) - 1) {
            layer<true>(index);
        } else {
            layer<false>(index);
        }
    }
};

}  // namespace cips
