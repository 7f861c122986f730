// A consumer warpgroup that works off a layer's outputs in chunks of 128, with a tail between them that is the
// kernel's own. A finished chunk parks; the last one goes straight to the registers.
#pragma once

#include "tile/stack_turns.cuh"

namespace cips {

/// All of it is in registers, so all of it is inlined.
template <typename Tail>
struct StackConsumer : StackTurns<Tail> {
    using Turns = StackTurns<Tail>;
    using Shape = typename Turns::Shape;
    using T = typename Turns::T;
    using Turns::a;
    using Turns::acc;
    using Turns::at;
    using Turns::bars;
    using Turns::drawn;
    using Turns::first_products;
    using Turns::lane;
    using Turns::p;
    using Turns::pass_turn;
    using Turns::release;
    using Turns::reload;
    using Turns::retire;
    using Turns::send;
    using Turns::slot_descriptor;
    using Turns::start_chunk;
    using Turns::wait_for_turn;
    using typename Turns::Pending;

    using Turns::Turns;

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
            if (i + 1 == kRegisterSlabs) pass_turn();
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
        // What never parked is whatever lies there: nobody looks at it. The last chunk may pass by way of the first's
        // place; the others come back when its accumulators are done with.
        constexpr int kFirst = kChunk / kSlab;
#pragma unroll
        for (int i = 0; i < kFirst; ++i) reload(i, i);
        this->template finish_chunk<true>(l.chunks - 1, l, keep, source);
#pragma unroll
        for (int i = kFirst; i < kParked; ++i) reload(i, i);
    }

    __device__ __forceinline__ void next_layer(int index)
    {
        if (is_full<Shape>(p, index)) {
            layer<true>(index);
        } else {
            layer<false>(index);
        }
    }
};

}  // namespace cips
