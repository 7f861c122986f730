// One matrix times a few vectors: a plain struct in, a launch out.
#pragma once

#include <cstdint>

#include "launch/modulate.h"

namespace cips {

struct Affine {
    const float* x;       // [vectors, dim], 16-byte aligned
    const float* weight;  // [rows, dim], 16-byte aligned
    const float* bias;    // [rows]
    float* y;             // [vectors, rows]
    int64_t vectors;
    int64_t rows;
    int64_t dim;          // a multiple of 32 up to 512
    const void* current;  // what the kernel before and the kernel behind read, to be brought to L2; may be null
    int64_t current_bytes;
    const void* upcoming;
    int64_t upcoming_bytes;
    bool overlaps;  // the launch may begin while the kernel before it, which writes neither weight nor bias, still runs
};

/// Throws std::invalid_argument for bad arguments, std::runtime_error with CUDA's words when CUDA refuses.
void affine_forward(const Affine& arguments, Target target);

}  // namespace cips
