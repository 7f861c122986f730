// Arguments of the on-chip stacks' forward kernels: a plain struct by value.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "tile/pixel_places.h"
#include "tile/stack_layout.h"

namespace cips {

enum class StackNoise : int32_t {
    kNone,
    kIndex,   // counter: the pixel's index
    kCoords,  // counter: the bits of its coordinates
    kGiven,   // a tensor
};

/// A CUtensorMap, which the driver encodes: opaque here, so that nothing needs the driver's header.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

/// Rows of the first layer's streamed input that the kernel makes itself, see stack_made.cuh; made is null where they
/// come as they are.
struct StackMade {
    char* made;             // [kMadeBuffers][blocks][kBlockPixels][row_bytes]
    uint32_t row_bytes;     // a multiple of 16
    uint32_t row_stride;    // bytes of T channels of the source
    const char* source;     // blends: 16-bit values [images or 1][P][T]
    uint64_t table;         // otherwise a float32 table [rows][columns][T]: its address less twice that of made
    int64_t source_stride;  // bytes of an image (0: shared), or of a row of the table (0: it has one)
    const char* styles;     // blends: 16-bit values [B][kMaxBlend][row_bytes]
    uint32_t last_pixel;    // P - 1
    int32_t rows, columns;  // of a table
    bool exact;             // see TableLookupParams
};

struct StackParams {
    const char* slabs;       // [B][slab_stride]
    int64_t slab_stride;     // bytes an image
    const char* records;     // [B][record_stride]
    int64_t record_stride;   // bytes an image
    const float* rgb_bias;   // [kMaxRgbChannels], summed over ToRGBs
    const float4* fourier;   // [register_slabs][kFourierSlab], with blends [B][the same]; null: x is given
    int32_t fourier_stride;  // float4s an image
    const char* x;           // [B or 1][P][>= 64 register_slabs] of 16-bit values; rows on 16 bytes
    int64_t x_batch_stride;  // bytes; 0: shared
    int64_t x_row_stride;    // bytes
    PixelPlaces places;
    const int64_t* seed;
    const float* noise;  // [L][B][P] with the strides below
    int64_t noise_layer_stride;
    int64_t noise_batch_stride;
    float* rgb;  // [B][P][C] with the strides below, in floats
    int64_t rgb_batch_stride;
    int64_t rgb_pixel_stride;
    int64_t rgb_channel_stride;
    int32_t groups;  // of kGroupPixels pixels
    int32_t images;
    int32_t units;  // groups x images
    StackNoise noise_mode;
    int32_t first_image;  // number of image 0 in the noise's counter
    int32_t first_layer;  // number of layer 0 in the noise's counter
    int32_t channels;     // C
    int32_t depth;
    int32_t register_slabs;
    int32_t streamed_slabs;
    int32_t image_slabs;  // slabs of weights an image
    int32_t image_records;
    int32_t input_per_image;  // whether the tensor map's outermost index is the image
    char* kept;          // [blocks][kConsumers][kKeptBytes]: inputs of residual blocks, each thread its own registers
    const float* blend;  // [B or 1][P][kMaxBlend]; null: one style an image, whose weights are modulated
    int64_t blend_batch_stride;  // floats; 0: shared
    StackMade made;
    uint32_t half_pair;   // sqrt(1/2) twice, in the kernel's type
    uint32_t slope_pair;  // s / (1 - s) twice, in the kernel's type
    StackLayer layers[kMaxStackLayers];
};

static_assert(sizeof(StackParams) <= 4096 - 128, "kernel arguments must fit 4 KB: leave room for the tensor map");

}  // namespace cips
