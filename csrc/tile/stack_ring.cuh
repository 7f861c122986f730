// The ring of weights and the records: barriers of the on-chip stack, and the two threads that fill them.
#pragma once

#include <type_traits>

#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/stack_params.h"

namespace cips {

/// Slots of the ring in turn, each with the parity of the phase to wait for.
///
/// A layer of 512 inputs takes slot i for its slab i, known when compiled, which saves a third of the instructions
/// between two products. Such a layer starts at slot 0: slots that are passed over keep their phase.
template <int kStages>
struct RingPosition {
    uint32_t state;  // a bit of phase for each slot, and above them the slot: registers are scarce

    __device__ __forceinline__ explicit RingPosition(bool starts_empty) : state(starts_empty ? kPhases : 0) {}

    __device__ __forceinline__ uint32_t slot() const { return state >> kStages; }
    __device__ __forceinline__ uint32_t phase() const { return phase_of(slot()); }
    __device__ __forceinline__ uint32_t phase_of(uint32_t slot) const { return state >> slot & 1; }

    __device__ __forceinline__ void advance()
    {
        const uint32_t phases = (state ^ 1u << slot()) & kPhases;
        state = phases | (slot() + 1) % kStages << kStages;
    }

    /// To slot 0.
    __device__ __forceinline__ void align() { state &= kPhases; }

    /// After every slot from slot 0 on was taken once.
    __device__ __forceinline__ void advance_all() { state ^= kPhases; }

private:
    static constexpr uint32_t kPhases = (1u << kStages) - 1;
};

/// The same where no slot is ever passed over: one phase for all that are left of a round, which takes few
/// instructions.
template <int kStages>
struct RingCursor {
    uint32_t state;  // the slot, and below it the bit of phase

    __device__ __forceinline__ explicit RingCursor(bool starts_empty) : state(starts_empty) {}

    __device__ __forceinline__ uint32_t slot() const { return state >> 1; }
    __device__ __forceinline__ uint32_t phase() const { return state & 1; }

    __device__ __forceinline__ void advance()
    {
        state += 2;
        if (state >= 2 * kStages) state ^= 2 * kStages ^ 1;
    }

    __device__ __forceinline__ void align() {}
};

template <typename Shape>
using RingOf = std::conditional_t<Shape::kBlends, RingCursor<Shape::kStages>, RingPosition<Shape::kStages>>;

/// Whether a layer's products run through slots known when compiled.
template <typename Shape>
__device__ __forceinline__ bool is_full(const StackParams& p, int index)
{
    return !Shape::kBlends && index > 0 && p.layers[index].positions == (1 << kRegisterSlabs) - 1;
}

template <typename Shape>
struct StackBarriers {
    uint32_t full, empty, record_full, record_empty;

    __device__ __forceinline__ explicit StackBarriers(uint32_t shared)
        : full(shared + kBarrierOffset),
          empty(full + 8 * Shape::kStages),
          record_full(empty + 8 * Shape::kStages),
          record_empty(record_full + 8 * Shape::kRecords)
    {
    }

    __device__ __forceinline__ void init() const
    {
        for (int i = 0; i < Shape::kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, kConsumers * kCluster);
        }
        for (int i = 0; i < Shape::kRecords; ++i) {
            mbarrier_init(record_full + 8 * i, 1);
            mbarrier_init(record_empty + 8 * i, 4 * kConsumers);
        }
        mbarrier_fence_init();
    }
};

/// A cluster's units in turn, without divisions: producers have few registers.
struct UnitCursor {
    int image = 0;
    int group;

    __device__ __forceinline__ explicit UnitCursor(const StackParams& p) : group(cluster_index()) { carry(p); }

    __device__ __forceinline__ UnitCursor(const StackParams& p, int image, int group) : image(image), group(group) {}

    __device__ __forceinline__ void advance(const StackParams& p)
    {
        group += cluster_count();
        carry(p);
    }

private:
    __device__ __forceinline__ void carry(const StackParams& p)
    {
        while (group >= p.groups) {
            group -= p.groups;
            ++image;
        }
    }
};

/// Counters in shared memory, where a register is one too many.
__device__ __forceinline__ void start_count(uint32_t address)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(0) : "memory");
}

__device__ __forceinline__ uint32_t counted(uint32_t address)
{
    uint32_t count;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(count) : "r"(address) : "memory");
    return count;
}

/// Returns the count before.
__device__ __forceinline__ uint32_t count(uint32_t address)
{
    const uint32_t before = counted(address);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(before + 1) : "memory");
    return before;
}

/// First row that a block makes of its unit of a number.
template <typename Rows>
__device__ __forceinline__ uint32_t made_row(uint32_t unit)
{
    uint32_t block = block_index();
    if (Rows::kBuffers > 1) block += unit % Rows::kBuffers * block_count();
    return block * kBlockPixels;
}

/// One thread: weights, and the first layer's streamed inputs between them. Each block of the cluster fetches its
/// share of a slab for all; inputs are its own. A slot is free when the warpgroups of every block have let go of it.
/// Made: barriers of the rows that are made here.
template <typename Shape, typename Rows, typename Made>
__device__ __forceinline__ void produce_slabs(const StackParams& p, const void* input_map, uint32_t shared,
                                              const StackBarriers<Shape>& bars, const Made& made)
{
    const uint32_t rank = cluster_rank();
    constexpr uint32_t kShare = kSlabBytes / kCluster;
    const uint32_t ring = shared + Shape::kRingOffset + rank * kShare;
    RingOf<Shape> at(true);
    for (UnitCursor unit(p); unit.image < p.images; unit.advance(p)) {
        const char* slab = p.slabs + unit.image * p.slab_stride + rank * kShare;
        auto weights = [&] {
            const uint32_t full = bars.full + 8 * at.slot();
            mbarrier_wait_long(bars.empty + 8 * at.slot(), at.phase());
            mbarrier_expect(full, kSlabBytes);
            bulk_copy_multicast(ring + at.slot() * kSlabBytes, slab, kShare, full, (1 << kCluster) - 1);
            slab += kSlabBytes;
            at.advance();
        };
        int first = 0;
        if (p.streamed_slabs > 0) {
            first = 1;
            const bool makes = Rows::kMakes && p.made.made != nullptr;
            if (makes) made.wait_full(count(shared + kMadeFetched));
            auto inputs = [&](int index) {
                const uint32_t full = bars.full + 8 * at.slot();
                mbarrier_wait_long(bars.empty + 8 * at.slot(), at.phase());
                mbarrier_expect(full, kSlabBytes);
                int row = unit.group * kGroupPixels + rank * kBlockPixels;
                if (makes) row = made_row<Rows>(counted(shared + kMadeFetched) - 1);
                for (int wg = 0; wg < kConsumers; ++wg) {
                    tensor_copy(shared + Shape::kRingOffset + at.slot() * kSlabBytes + wg * kInputSlabBytes, input_map,
                                index * kSlab, row + wg * kWarpgroupPixels, p.input_per_image ? unit.image : 0, full);
                }
                at.advance();
            };
#pragma unroll 1
            for (int chunk = 0; chunk < p.layers[0].chunks; ++chunk) {
#pragma unroll 1
                for (int i = 0; i < kRegisterSlabs; ++i) {
                    if (i < p.streamed_slabs) {
                        inputs(i);
                        weights();
                    }
                    if (i < p.register_slabs) weights();
                }
            }
        }
#pragma unroll 1
        for (int index = first; index < p.depth; ++index) {
            if (is_full<Shape>(p, index)) at.align();
#pragma unroll 1
            for (int i = (p.layers[index].skip_chunks + p.layers[index].chunks) * p.layers[index].slots; i > 0; --i) {
                weights();
            }
        }
    }
}

/// One thread: the record of every chunk.
template <typename Shape>
__device__ __forceinline__ void produce_records(const StackParams& p, uint32_t shared, const StackBarriers<Shape>& bars)
{
    uint32_t buffer = 0, phase = 1;
    for (UnitCursor unit(p); unit.image < p.images; unit.advance(p)) {
        const char* record = p.records + unit.image * p.record_stride;
#pragma unroll 1
        for (int i = 0; i < p.image_records * (kChunk / Shape::kOutputs); ++i) {
            mbarrier_wait_long(bars.record_empty + 8 * buffer, phase);
            mbarrier_expect(bars.record_full + 8 * buffer, Shape::kRecordBytes);
            bulk_copy(shared + Shape::kRecordOffset + buffer * Shape::kRecordBytes, record, Shape::kRecordBytes,
                      bars.record_full + 8 * buffer);
            record += Shape::kRecordBytes;
            buffer = (buffer + 1) % Shape::kRecords;
            if (buffer == 0) phase ^= 1;
        }
    }
}

}  // namespace cips
