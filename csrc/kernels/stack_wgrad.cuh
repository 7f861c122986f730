// The weight gradients of the on-chip stack, N = scale u^T x of every layer and image of a part in one launch, and with
// them the sums drgb^T x of the ToRGBs that read the same x: eight columns more beside 256, where a pass of their own
// would read every activation once more.
//
// Both operands lie pixel by pixel and are read as they lie. A cluster of two blocks makes a tile of 256 x 256: each
// block 128 output channels, 64 a warpgroup; each fetches half of the input channels for both.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/registers.cuh"
#include "ptx/shared_address.cuh"
#include "ptx/wgmma_transposed.cuh"
#include "tile/stack_ring.cuh"
#include "tile/wgrad_params.h"

namespace cips {

/// Where things lie in shared memory.
struct WgradShared {
    uint32_t base;

    __device__ __forceinline__ uint32_t outputs(uint32_t slot) const
    {
        return base + slot * (kOutputBytes + kInputBytes);
    }
    __device__ __forceinline__ uint32_t inputs(uint32_t slot) const { return outputs(slot) + kOutputBytes; }
    __device__ __forceinline__ uint32_t colours(uint32_t slot) const
    {
        return base + kWgradColourOffset + slot * kColourBytes;
    }
    __device__ __forceinline__ uint32_t full(uint32_t slot) const { return base + kWgradBarrierOffset + 8 * slot; }
    __device__ __forceinline__ uint32_t empty(uint32_t slot) const { return full(slot) + 8 * kWgradStages; }
};

/// The channel that lies at a position in fragment order, and the reverse, see tile/stack_train.h.
__device__ __forceinline__ int natural_channel(int position)
{
    return (position & ~30) | (position & 24) >> 2 | (position & 6) << 2;
}

/// Two threads of a block, in warps of their own since a copy takes long to issue, fetch what its consumers read: one
/// what comes from u and the colours, the other (kInputs) this block's share of x, for both blocks. A slot is free when
/// the warpgroups of both have let go of it.
template <bool kInputs>
__device__ __forceinline__ void produce_operands(const WgradParams& p, const WgradMaps& maps, const WgradShared& at)
{
    constexpr int kShare = kInputs ? kWgradTile / kCluster : kWgradOutputs;  // channels
    const int rank = cluster_rank(), cluster = cluster_index();
    RingCursor<kWgradStages> ring(true);
    const int end = __ldg(p.first_items + cluster + 1);
#pragma unroll 1
    for (int i = __ldg(p.first_items + cluster); i < end; ++i) {
        const WgradItem& item = p.items[i];
        const TensorMap* map = (kInputs ? maps.x : maps.u) + item.run;
        const int plane = kInputs ? item.x_plane : item.u_plane, last = item.end;
        const int channel = (kInputs ? item.input : item.output) + rank * kShare;
        const bool with_colours = !kInputs && item.colours >= 0;
        const char* colours = p.colours + item.image * p.colour_stride;
        const uint32_t bytes = kInputs ? kInputBytes : kOutputBytes + (with_colours ? kColourBytes : 0);
#pragma unroll 1
        for (int block = item.begin; block < last; ++block) {
            const uint32_t full = at.full(ring.slot());
            mbarrier_wait(at.empty(ring.slot()), ring.phase());
            mbarrier_expect(full, bytes);
#pragma unroll
            for (int atom = 0; atom < kShare / 64; ++atom) {
                const int column = channel + 64 * atom, row = block * kWgradPixels;
                if (kInputs) {
                    tensor_copy_multicast(at.inputs(ring.slot()) + (rank * (kShare / 64) + atom) * kAtomBytes, map,
                                          column, row, plane, full, (1 << kCluster) - 1);
                } else {
                    tensor_copy(at.outputs(ring.slot()) + atom * kAtomBytes, map, column, row, plane, full);
                }
            }
            if (with_colours) {
                bulk_copy(at.colours(ring.slot()), colours + int64_t{block} * kColourBytes, kColourBytes, full);
            }
            ring.advance();
        }
    }
}

/// A warpgroup's sums of one item: 64 output channels by 256 input channels, and 64 input channels by the colours.
template <typename T>
struct WgradSums {
    float acc[128];
    float colours[4];

    __device__ __forceinline__ void start()
    {
#pragma unroll
        for (int i = 0; i < 128; ++i) start_from_zero(acc[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) start_from_zero(colours[i]);
    }

    /// Sends the products of a stage. kColourSteps: how many steps of 16 pixels the colours take, of the channels from
    /// `atom` on.
    template <int kColourSteps>
    __device__ __forceinline__ void send(uint32_t outputs, uint32_t inputs, uint32_t atom, uint32_t columns)
    {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kWgradSteps; ++k) {
            wgmma_transposed<T>(acc, channels_descriptor(outputs + 2048 * k, kAtomBytes),
                                channels_descriptor(inputs + 2048 * k, kAtomBytes));
        }
#pragma unroll
        for (int k = 0; k < kColourSteps; ++k) {
            wgmma_transposed<T>(colours, channels_descriptor(atom + 2048 * k, kAtomBytes),
                                columns_descriptor(columns + 256 * k));
        }
        wgmma_commit();
    }
};

template <typename T>
struct WgradConsumer {
    const WgradParams& p;
    const WgradShared at;
    const uint32_t thread = threadIdx.x % 128, warpgroup;  // the same in all of a warp
    const uint32_t rank = cluster_rank();
    RingCursor<kWgradStages> ring{false};
    WgradSums<T> sums;

    __device__ __forceinline__ WgradConsumer(const WgradParams& params, const WgradShared& shared)
        : p(params), at(shared), warpgroup(__shfl_sync(~0u, threadIdx.x / 128, 0))
    {
    }

    __device__ __forceinline__ void release(uint32_t slot) const
    {
        if (thread < kCluster) mbarrier_arrive_cluster(at.empty(slot), thread);
    }

    template <int kColourSteps>
    __device__ __forceinline__ void multiply(int blocks, int colour_step)
    {
        const uint32_t outputs = warpgroup * kAtomBytes;
        const uint32_t atom = (rank * kConsumers + warpgroup) * kAtomBytes;  // whose channels the colours meet here
        const uint32_t skipped = 2048 * colour_step;
        uint32_t before = 0;
#pragma unroll 1
        for (int i = 0; i < blocks; ++i) {
            mbarrier_wait(at.full(ring.slot()), ring.phase());
            const uint32_t inputs = at.inputs(ring.slot());
            sums.template send<kColourSteps>(at.outputs(ring.slot()) + outputs, inputs, inputs + atom + skipped,
                                             at.colours(ring.slot()) + 256 * colour_step);
            wgmma_wait<1>();
            if (i > 0) release(before);
            before = ring.slot();
            ring.advance();
        }
        wgmma_wait<0>();
        release(before);
    }

    __device__ __forceinline__ void multiply(const WgradItem& item)
    {
        const int blocks = item.end - item.begin;
        if (item.colours < 0) {
            multiply<0>(blocks, 0);
        } else if (item.colour_steps == kWgradSteps) {
            multiply<kWgradSteps>(blocks, 0);
        } else {
            multiply<kWgradSteps / 2>(blocks, item.colour_step);
        }
    }

    /// To the matrix, or to a piece of it; rows and columns in natural order.
    __device__ __forceinline__ void store(const WgradItem& item, const WgradRun& run) const
    {
        const bool whole = item.piece < 0;
        const int stride = whole ? run.row_stride : kWgradTile;
        const int lane = thread % 32, t = lane % 4;
        const int first = rank * kWgradOutputs + warpgroup * 64 + thread / 32 * 16 + lane / 4;
        float* base = whole ? p.n + item.place + int64_t{item.output} * stride + item.input
                            : p.pieces + int64_t{item.piece} * kWgradTile * kWgradTile;
        const int columns = run.in_features - item.input;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = natural_channel(first + 8 * half);
            if (item.output + row >= run.out_features) continue;
            float* line = base + int64_t{row} * stride;
#pragma unroll
            for (int group = 0; group < kWgradTile / 32; ++group) {
                float v[8];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    v[2 * j] = sums.acc[16 * group + 4 * j + 2 * half] * run.scale;
                    v[2 * j + 1] = sums.acc[16 * group + 4 * j + 2 * half + 1] * run.scale;
                }
                if (run.fragments) {  // a thread's eight lie side by side
                    if (32 * group >= columns) continue;
                    float4* to = reinterpret_cast<float4*>(line + 32 * group + 8 * t);
                    to[0] = make_float4(v[0], v[1], v[2], v[3]);
                    to[1] = make_float4(v[4], v[5], v[6], v[7]);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int column = 32 * group + 8 * j + 2 * t;
                        if (column < columns) {  // widths are even: rows start on 16 bytes
                            *reinterpret_cast<float2*>(line + column) = make_float2(v[2 * j], v[2 * j + 1]);
                        }
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void store_colours(const WgradItem& item) const
    {
        const int lane = thread % 32, position = (rank * kConsumers + warpgroup) * 64 + thread / 32 * 16 + lane / 4;
        float* part = p.colour_parts + int64_t{item.colours} * kColourColumns * kWgradTile;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            part[(lane % 4 * 2 + i % 2) * kWgradTile + natural_channel(position + i / 2 * 8)] = sums.colours[i];
        }
    }

    __device__ __forceinline__ void run()
    {
        const int cluster = cluster_index(), end = __ldg(p.first_items + cluster + 1);
#pragma unroll 1
        for (int i = __ldg(p.first_items + cluster); i < end; ++i) {
            const WgradItem& item = p.items[i];
            const WgradRun& run = p.runs[item.run];
            sums.start();
            multiply(item);
            store(item, run);
            if (item.colours >= 0) store_colours(item);
        }
    }
};

/// Grid: at most the clusters that fit at once; first_items has an entry for each and one more.
template <typename T>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kStackThreads, 1)
    stack_wgrad_kernel(const __grid_constant__ WgradParams p, const __grid_constant__ WgradMaps maps)
{
    extern __shared__ __align__(1024) char memory[];
    const WgradShared at{shared_address(memory)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < kWgradStages; ++i) {
            mbarrier_init(at.full(i), 2);  // both producers
            mbarrier_init(at.empty(i), kConsumers * kCluster);
        }
        mbarrier_fence_init();
    }
    __syncthreads();
    cluster_sync();
    if (threadIdx.x >= 128 * kConsumers) {
        registers_give<40>();
        if (threadIdx.x == 128 * kConsumers) {
            produce_operands<false>(p, maps, at);
        } else if (threadIdx.x == 128 * kConsumers + 32) {
            produce_operands<true>(p, maps, at);
        }
    } else {
        registers_take<232>();
        WgradConsumer<T>(p, at).run();
    }
    // nobody leaves while the other block may still signal it
    __syncthreads();
    cluster_sync();
}

}  // namespace cips
