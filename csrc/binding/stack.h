// The part of cips_kernels._cuda that launches the on-chip stack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "launch/modulate.h"

namespace cips {

/// float32, float16 or bfloat16; throws std::invalid_argument for another name.
DType parse_dtype(const std::string& name);

/// An address as Python has it.
template <typename T>
T* pointer(uintptr_t address)
{
    return reinterpret_cast<T*>(address);
}

void bind_stack(pybind11::module_& module);
void bind_chain(pybind11::module_& module);
void bind_wgrad(pybind11::module_& module);

}  // namespace cips
