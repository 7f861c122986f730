// Asynchronous 16-byte copies from global to shared memory (PTX cp.async). They bypass registers and L1.
#pragma once

#include <cstdint>

namespace cips {

/// Start copying 16 bytes; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global)
{
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

/// Close the group of the copies this thread started since the last call; the group may be empty.
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Wait until at most `kPending` of this thread's groups are under way. Only this thread then sees what they
/// brought.
template <int kPending>
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace cips
