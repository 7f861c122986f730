// What a consumer warpgroup of stack_train_fwd_kernel does between products: as stack_fwd_kernel's, and every output
// goes to memory too, its signs a bit each.
#pragma once

#include "epilogue/fragment_rows.cuh"
#include "epilogue/stack_tail.cuh"
#include "tile/stack_train.h"

namespace cips {

template <typename T>
struct StackTrainTail : StackTail<T> {
    using Tail = StackTail<T>;
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

    template <bool kLast>
    __device__ __forceinline__ void finish_chunk(int chunk, const StackLayer& l, bool keep, int)
    {
        uint32_t local[32];
        uint32_t* q = kLast ? a + 16 * (kRegisterSlabs - 2) : local;
        uint32_t signs[2] = {};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            q[j] = leaky_relu_pair<T>(acc[2 * j], acc[2 * j + 1], p.slope_pair);
            signs[j / 16] |= positive_pair<T>(q[j]) & 0x80008000u >> j % 16;
        }
        if (!kLast && keep) {
#pragma unroll
            for (int s = 0; s < 8; ++s) this->park(8 * chunk + s, q + 4 * s);
        }
        const int64_t number = l.first_record + chunk;
        saved.signs[signs_place(*this, saved.image_chunks) + number * 128] = make_uint2(signs[0], signs[1]);
        char* base = keep ? saved.activations + 2 * saved.rows * l.bias_offset : saved.features;
        const int64_t pixel = this->pixel();
        const FragmentRows rows(base, this->image() * p.places.pixels + pixel, pixel, p.places.pixels, l.out_features,
                                chunk, lane % 4);
#pragma unroll
        for (int group = 0; group < 4; ++group) rows.store(group, q + 8 * group);
        if (l.rgb) this->add_colours(this->rgb, q);
        this->end_chunk();
    }
};

}  // namespace cips
