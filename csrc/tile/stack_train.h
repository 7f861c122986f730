// What training adds to the on-chip stacks' arguments: where a forward keeps what the backward reads, and where the
// chain of gradients finds and leaves its own.
//
// Activations and gradients lie pixel by pixel, the channels of every 32 in the order in which a quad's threads hold
// them: position 8 t + 2 n + e is channel 8 n + 2 t + e (t, n < 4, e < 2). A thread then moves 16 bytes at a time, a
// quad 64, with neither shuffles nor staging, and a weight gradient over pixels does not mind. Signs, a bit a number,
// lie in the order of the registers: for each image, 64 pixels and chunk 128 threads' two words.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "tile/stack_params.h"

namespace cips {

/// A map of each layer's rows, [B][P][width] of 16-bit values, for boxes of a warp's rows and a chunk's channels.
using StackRowMaps = TensorMap[kMaxStackLayers];

struct StackSaved {
    StackRowMaps outputs;  // of the layers, over g (1 - s)
    uint2* signs;          // whether an output is positive
    int32_t image_chunks;  // chunks of all layers
};

struct StackGrads {
    const float* drgb;  // [images][P][C]
    const uint2* signs;
    StackRowMaps gradients;  // at the layers' sums, over g
    // For the weight gradients of ToRGBs, which read it as an operand: [images][whole units of pixels][8] 16-bit
    // values, the colours' gradients rounded, what that left, and zeros; null: not wanted
    uint32_t* colours;
    float* bias_parts;     // [warps of the grid][part_stride], added to; null: not wanted
    float* noise_rows;     // [L][B][P], sums over channels of u; null: not wanted
    int64_t noise_stride;  // from layer to layer
    int32_t part_stride;   // floats: kChunk for each chunk
    int32_t image_chunks;
    float gain;
    float negative_slope;
};

}  // namespace cips
