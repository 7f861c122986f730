// The ring of weights and the records: barriers of the on-chip stack, and the two threads that fill them.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "tile/stack_params.h"

namespace cips {

/// Slots of the ring in turn, with the parity of the phase to wait for.
struct RingPosition {
    uint32_t slot = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance()
    {
        if (++slot == kStages) {
            slot = 0;
            phase ^= 1;
        }
    }
};

struct StackBarriers {
    uint32_t full, empty, record_full, record_empty;

    __device__ __forceinline__ explicit StackBarriers(uint32_t shared)
        : full(shared + kBarrierOffset),
          empty(full + 8 * kStages),
          record_full(empty + 8 * kStages),
          record_empty(record_full + 8 * kRecords)
    {
    }

    __device__ __forceinline__ void init() const
    {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, kConsumers * kCluster);
        }
        for (int i = 0; i < kRecords; ++i) {
            mbarrier_init(record_full + 8 * i, 1);
            mbarrier_init(record_empty + 8 * i, 4 * kConsumers);
        }
        mbarrier_fence_init();
    }
};

/// One thread: weights, and the first layer's streamed inputs between them. Each block of the cluster fetches its
/// share of a slab for all; inputs are its own. A slot is free when the warpgroups of every block have let go of it.
__device__ __forceinline__ void produce_slabs(const StackParams& p, const void* input_map, uint32_t shared,
                                              const StackBarriers& bars, uint32_t rank, int cluster, int clusters)
{
    constexpr uint32_t kShare = kSlabBytes / kCluster;
    const uint32_t ring = shared + kRingOffset;
    RingPosition at;
    at.phase = 1;  // the ring starts empty
    for (int unit = cluster; unit < p.units; unit += clusters) {
        const int image = unit / p.groups;
        const int pixel = unit % p.groups * kGroupPixels + rank * kBlockPixels;
        const char* slab = p.slabs + image * p.slab_stride + rank * kShare;
        auto weights = [&] {
            const uint32_t full = bars.full + 8 * at.slot;
            mbarrier_wait_long(bars.empty + 8 * at.slot, at.phase);
            mbarrier_expect(full, kSlabBytes);
            bulk_copy_multicast(ring + at.slot * kSlabBytes + rank * kShare, slab, kShare, full, (1 << kCluster) - 1);
            slab += kSlabBytes;
            at.advance();
        };
        auto inputs = [&](int index) {
            const uint32_t full = bars.full + 8 * at.slot;
            mbarrier_wait_long(bars.empty + 8 * at.slot, at.phase);
            mbarrier_expect(full, kSlabBytes);
            for (int wg = 0; wg < kConsumers; ++wg) {
                tensor_copy(ring + at.slot * kSlabBytes + wg * kInputSlabBytes, input_map, index * kSlab,
                            pixel + wg * kWarpgroupPixels, p.input_per_image ? image : 0, full);
            }
            at.advance();
        };
        int rest = p.image_slabs;
        if (p.streamed_slabs > 0) {
            const int chunks = p.layers[0].chunks;
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll 1
                for (int i = 0; i < kRegisterSlabs; ++i) {
                    if (i < p.register_slabs) weights();
                    if (i < p.streamed_slabs) {
                        inputs(i);
                        weights();
                    }
                }
            }
            rest -= chunks * p.layers[0].slabs;
        }
#pragma unroll 1
        for (int i = 0; i < rest; ++i) weights();
    }
}

/// One thread: the record of every chunk.
__device__ __forceinline__ void produce_records(const StackParams& p, uint32_t shared, const StackBarriers& bars,
                                                int cluster, int clusters)
{
    uint32_t buffer = 0, phase = 1;
    for (int unit = cluster; unit < p.units; unit += clusters) {
        const char* record = p.records + int64_t{unit / p.groups} * p.record_stride;
#pragma unroll 1
        for (int i = 0; i < p.image_records; ++i) {
            mbarrier_wait_long(bars.record_empty + 8 * buffer, phase);
            mbarrier_expect(bars.record_full + 8 * buffer, kRecordBytes);
            bulk_copy(shared + kRecordOffset + buffer * kRecordBytes, record, kRecordBytes,
                      bars.record_full + 8 * buffer);
            record += kRecordBytes;
            buffer ^= 1;
            if (buffer == 0) phase ^= 1;
        }
    }
}

}  // namespace cips
