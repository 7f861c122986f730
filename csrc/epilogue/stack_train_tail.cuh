// What a consumer warpgroup of stack_train_fwd_kernel does between products: as stack_fwd_kernel's, and every output
// goes to memory too, its signs a bit each.
#pragma once

#include "epilogue/stack_tail.cuh"
#include "epilogue/stored_parts.cuh"

namespace cips {

template <typename T>
struct StackTrainTail : StoredParts<StackTail<T>> {
    using Tail = StoredParts<StackTail<T>>;
    using Tail::a;
    using Tail::acc;
    using Tail::lane;
    using Tail::p;

    using Rows = NoRows;
    static constexpr bool kSkips = false;

    const StackSaved& saved;

    __device__ __forceinline__ StackTrainTail(const StackParams& params, uint32_t base, const StackSaved& kept)
        : Tail(params, base), saved(kept)
    {
    }

    __device__ __forceinline__ void make_input()
    {
        this->wait_until_stored();
        Tail::make_input();
    }

    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool, int)
    {
        uint32_t local[32];
        uint32_t* q = kLast ? a + 16 * (kRegisterSlabs - 2) : local;
        uint32_t signs[2] = {};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            q[j] = leaky_relu_pair<T>(acc[2 * j], acc[2 * j + 1], p.slope_pair);
            signs[j / 16] |= positive_pair<T>(q[j]) & 0x80008000u >> j % 16;
        }
        const int place = kLast ? 0 : chunk;  // free once the layer's input is in registers
        this->wait_until_stored();
#pragma unroll
        for (int group = 0; group < 4; ++group) this->park_rows(place, group, q + 8 * group);
        this->store_rows(saved.outputs[l.number], place, chunk);
        const int64_t number = l.first_record + chunk;
        saved.signs[this->signs_place(saved.image_chunks) + number * 128] = make_uint2(signs[0], signs[1]);
        if (l.rgb) this->add_colours(this->rgb, q);
        this->end_chunk();
    }
};

}  // namespace cips
