// Transaction barriers in shared memory (PTX mbarrier): arrivals, bytes to come, waits by phase parity.
#pragma once

#include <cstdint>

namespace cips {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// After the inits, before anybody else (the copy engine, the cluster) uses the barriers.
__device__ __forceinline__ void mbarrier_fence_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Wait for the end of the phase of this parity. A fresh barrier is in phase 0: waiting for parity 1 passes.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

struct BarrierPhase {
    uint32_t barrier, parity;
};

/// Whether the phase has ended. The answer takes long: ask early.
__device__ __forceinline__ uint32_t mbarrier_test(const BarrierPhase& of)
{
    uint32_t ended;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(ended)
        : "r"(of.barrier), "r"(of.parity)
        : "memory");
    return ended;
}

/// Wait for three, asked together: an answer takes long where others fill shared memory's queue.
__device__ __forceinline__ void mbarrier_wait_all(const BarrierPhase& a, const BarrierPhase& b, const BarrierPhase& c)
{
    asm volatile(
        "{\n"
        ".reg .pred a, b, c;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 a, [%0], %1;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 b, [%2], %3;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 c, [%4], %5;\n"
        "and.pred a, a, b;\n"
        "and.pred a, a, c;\n"
        "@!a bra again;\n"
        "}" ::"r"(a.barrier),
        "r"(a.parity), "r"(b.barrier), "r"(b.parity), "r"(c.barrier), "r"(c.parity)
        : "memory");
}

/// mbarrier_wait for threads that wait long: they may sleep up to a millisecond at a time, instead of polling in the
/// issue slots of the warps that compute.
__device__ __forceinline__ void mbarrier_wait_long(uint32_t barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity), "r"(1000000)
        : "memory");
}

/// One arrival, and `bytes` more that copies have to bring before the phase ends.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// An arrival may overtake earlier loads from shared memory whose values nothing has used yet: consume first.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrive at the barrier of the same address in block `rank` of the cluster. (The form with .release.cluster
/// costs a full fence; what it would order here is done by the copy engine and wgmma.)
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank)
{
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

}  // namespace cips
