// Enough of CUDA's device side to run the kernels of csrc/ as ordinary C++: one block after the other, its
// threads as fibers that change over at barriers and shuffles, in an order drawn anew each round. A missing
// barrier, a read of shared memory before it was written or of a copy that was not waited for then shows as a
// wrong or changing result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define rsqrtf cips_host_rsqrtf
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

inline uint3 threadIdx, blockIdx, gridDim;

namespace host {

struct Copy {
    void* target;
    const void* source;
};

struct Barrier {
    int expected = 0, arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(96 * 1024);
    bool done = false;
    int shuffles = 0;
    std::vector<std::vector<Copy>> groups{{}};  // the last is still open
};

struct Warp {
    Barrier barrier;
    float values[2][32];
};

inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline std::function<void()> kernel;
inline std::mt19937 order;

inline Fiber& self()
{
    return *fibers[threadIdx.x];
}

inline void wait(Barrier& barrier)
{
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) swapcontext(&self().context, &scheduler);
}

inline void enter()
{
    kernel();
    self().done = true;
    swapcontext(&self().context, &scheduler);
}

/// Runs `body` for every thread of every block of a grid of `blocks` x `rows`; `shared` (floats) is NaN at the start of
/// each block.
inline void launch(int blocks, int threads, float* shared, int shared_floats, unsigned seed,
                   std::function<void()> body, int rows = 1)
{
    kernel = std::move(body);
    order.seed(seed);
    gridDim = {static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 1};
    for (int block = 0; block < blocks * rows; ++block) {
        std::fill_n(shared, shared_floats, std::numeric_limits<float>::quiet_NaN());
        block_barrier = Barrier{threads};
        warps.assign(threads / 32, Warp{Barrier{32}, {}});
        fibers.resize(threads);
        std::vector<int> turns(threads);
        std::iota(turns.begin(), turns.end(), 0);
        for (auto& fiber : fibers) {
            auto stack = fiber ? std::move(fiber->stack) : std::vector<char>(96 * 1024);
            fiber = std::make_unique<Fiber>();
            fiber->stack = std::move(stack);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            makecontext(&fiber->context, enter, 0);
        }
        blockIdx = {static_cast<unsigned>(block % blocks), static_cast<unsigned>(block / blocks), 0};
        for (bool alive = true; alive;) {
            alive = false;
            std::shuffle(turns.begin(), turns.end(), order);
            for (int turn : turns) {
                if (fibers[turn]->done) continue;
                alive = true;
                threadIdx = {static_cast<unsigned>(turn), 0, 0};
                swapcontext(&scheduler, &fibers[turn]->context);
            }
        }
    }
}

}  // namespace host

inline void __syncthreads()
{
    host::wait(host::block_barrier);
}

inline float __shfl_xor_sync(unsigned, float value, int distance)
{
    host::Warp& warp = host::warps[threadIdx.x / 32];
    float* values = warp.values[host::self().shuffles++ % 2];
    values[threadIdx.x % 32] = value;
    host::wait(warp.barrier);
    return values[threadIdx.x % 32 ^ distance];
}

inline float cips_host_rsqrtf(float value)
{
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}

template <typename T>
T __ldg(const T* address)
{
    return *address;
}

inline uint32_t __float_as_uint(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

namespace cips {
using std::max;
using std::min;
}  // namespace cips
