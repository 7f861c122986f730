// The mapping network: a plain struct in, a launch out.
#pragma once

#include <cstdint>

#include "launch/modulate.h"

namespace cips {

struct Mapping {
    const float* z;        // [vectors, dim], 16-byte aligned
    const float* weights;  // [layers, dim, dim], 16-byte aligned
    const float* biases;   // [layers, dim]
    float* w;              // [vectors, dim]
    int64_t vectors;
    int64_t layers;
    int64_t dim;  // a multiple of 32 up to 512
    float negative_slope;
};

/// Throws std::invalid_argument for bad arguments, std::runtime_error with CUDA's words when CUDA refuses.
void mapping_forward(const Mapping& arguments, Target target);

}  // namespace cips
