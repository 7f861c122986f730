// Addresses in the shared window, as the instructions that bypass the generic address space take them.
#pragma once

#include <cstdint>

namespace cips {

__device__ __forceinline__ uint32_t shared_address(const void* pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace cips
