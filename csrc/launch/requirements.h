// What launches ask of their arguments.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch/modulate.h"

namespace cips {

inline void require(bool holds, const std::string& message)
{
    if (!holds) throw std::invalid_argument(message);
}

inline void require_aligned(const void* pointer, const char* name, uintptr_t bytes)
{
    require(pointer != nullptr, std::string(name) + ": a null address came");
    require(reinterpret_cast<uintptr_t>(pointer) % bytes == 0,
            std::string(name) + ": address is not a multiple of " + std::to_string(bytes));
}

inline void require_half(DType dtype)
{
    require(dtype == DType::kBFloat16 || dtype == DType::kFloat16, "dtype: expected bfloat16 or float16");
}

}  // namespace cips
