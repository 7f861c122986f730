// What every consumer warpgroup of an on-chip stack has: the layer's input and accumulators in registers, the parking
// area, the record in hand.
#pragma once

#include "epilogue/stack_pixels.cuh"
#include "ptx/wgmma.cuh"
#include "tile/stack_input.cuh"
#include "tile/stack_ring.cuh"

namespace cips {

/// ShapeT: what lies in shared memory, StackShape or ChainShape.
template <typename T, typename ShapeT>
struct StackParts : StackPixels {
    using Type = T;
    using Shape = ShapeT;

    const StackBarriers<Shape> bars;
    uint32_t chunks = 0;  // worked off so far, over all tiles: the number of the record in hand
    StackInput a;         // the layer's input, 16 registers a position
    float acc[64];

    __device__ __forceinline__ StackParts(const StackParams& params, uint32_t base)
        : StackPixels(params, base), bars(base)
    {
    }

    /// ahead: of the record so many after that in hand.
    __device__ __forceinline__ BarrierPhase record_phase(int ahead = 0) const
    {
        const uint32_t number = chunks + ahead;
        return {bars.record_full + 8 * (number % Shape::kRecords), number / Shape::kRecords & 1};
    }

    __device__ __forceinline__ void wait_for_record() const
    {
        const BarrierPhase full = record_phase();
        mbarrier_wait(full.barrier, full.parity);
    }

    /// Where four of this thread's registers wait. A warp's places are side by side.
    __device__ __forceinline__ uint32_t parked(int step) const
    {
        return shared + threadIdx.x / 32 * (Shape::kParkBytes / 4) + lane * 16 + step * 512;
    }

    __device__ __forceinline__ uint32_t record() const
    {
        return shared + Shape::kRecordOffset + chunks % Shape::kRecords * Shape::kRecordBytes;
    }

    __device__ __forceinline__ void end_chunk()
    {
        ++chunks;
        // worked out anew rather than kept, or spilled, since the wait: of the number after
        if (lane == 0) mbarrier_arrive(bars.record_empty + 8 * ((chunks + 1) % Shape::kRecords));
    }

    __device__ __forceinline__ void park(int step, const uint32_t* v) const
    {
        store_shared(parked(step), v[0], v[1], v[2], v[3]);
    }

    __device__ __forceinline__ static void store_shared(uint32_t to, uint32_t x, uint32_t y, uint32_t z, uint32_t w)
    {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
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

    /// Slabs of the input of layer 0, into the parking area. A loop cannot number registers; unrolled, the instructions
    /// that a tile needs once would have to come from L2 each time, and took 16,000 cycles.
    __device__ __forceinline__ void park_input(int first, int end, const RowBlend<Shape::kStyles> (&blend)[2])
    {
#pragma unroll 1
        for (int slab = first; slab < end; ++slab) {
            uint32_t v[16];
            if (p.fourier != nullptr) {
                encode_slab<T, Shape::kStyles>(v, slab, p, image(), lane % 4, place_of(0), place_of(1), blend);
            } else {
                load_slab(v, slab, p, lane % 4, image(), pixel());
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) park(4 * (slab - first) + k, v + 4 * k);
        }
    }

    /// The input of layer 0 that registers hold.
    __device__ __forceinline__ void make_input(const RowBlend<Shape::kStyles> (&blend)[2])
    {
        park_input(0, min(kParked, p.register_slabs), blend);
#pragma unroll
        for (int i = 0; i < kParked; ++i) reload(i, i);
        park_input(kParked, p.register_slabs, blend);
#pragma unroll
        for (int i = kParked; i < kRegisterSlabs; ++i) reload(i, i - kParked);
    }

    /// Products of 16 channels with 128 outputs of a slab. x: an A fragment.
    __device__ __forceinline__ void multiply(const uint32_t* x, uint32_t b)
    {
        wgmma_registers<T>(acc, x[0], x[1], x[2], x[3], matrix_descriptor(b));
    }

    /// The same of an input in shared memory.
    __device__ __forceinline__ void multiply_shared(uint32_t x, uint32_t b)
    {
        wgmma_shared<T>(acc, matrix_descriptor(x), matrix_descriptor(b));
    }

    /// Four floats of the record in hand.
    __device__ __forceinline__ float4 of_record(uint32_t offset) const
    {
        float4 v;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "r"(record() + offset)
                     : "memory");
        return v;
    }

    __device__ __forceinline__ float noise_strength() const
    {
        float strength;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(strength) : "r"(record() + Shape::kStrength) : "memory");
        return strength;
    }

    /// Before the block ends.
    __device__ __forceinline__ void settle() const {}

    /// Adds R x' of a record's channels, whose A fragments are `q`, for 8 colours. By ordinary arithmetic, 350
    /// instructions, it made the tail longer than the other warpgroup's products.
    __device__ __forceinline__ void add_colours(float (&rgb)[4], const uint32_t* q)
    {
        send_colours(rgb, q);
        wgmma_wait<0>();
    }

    __device__ __forceinline__ void send_colours(float (&rgb)[4], const uint32_t* q)
    {
        const uint32_t weights = descriptor_start(record() + Shape::kRgb, Shape::kRgbStep);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < Shape::kOutputs / 16; ++s) {
            const uint32_t* f = q + 4 * s;
            wgmma_narrow<T>(rgb, f[0], f[1], f[2], f[3], narrow_descriptor(weights + (s * 2 * Shape::kRgbStep >> 4)));
        }
        wgmma_commit();
    }
};

}  // namespace cips
