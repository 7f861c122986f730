// The on-chip stack: plain structs in, launches out. No CUDA header, no Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "launch/modulate.h"
#include "tile/stack_layout.h"

namespace cips {

/// Where one matrix lies in the caller's flat tensors, in elements.
struct StackMatrix {
    int64_t out_features;
    int64_t in_features;
    int64_t weight_offset;
    int64_t style_offset;
    int64_t bias_offset;
};

/// A residual block: its output is (output of layer `last` + skip(input of layer `first`)) / sqrt(2).
struct StackBlock {
    int64_t first;
    int64_t last;
    int64_t weight_offset;  // of the skip's matrix; negative: the identity
};

/// Everything that depends on shapes alone; made once for a stack and batch size.
struct StackPlan {
    int64_t batch;
    int64_t styles;  // that a pixel's style is a blend of, kMaxBlend; 0: one an image
    int64_t channels;
    int64_t register_inputs;
    int64_t streamed_inputs;
    int64_t slab_bytes;    // an image's slabs
    int64_t record_bytes;  // an image's records
    int64_t image_slabs;
    int64_t image_records;
    bool has_blocks;
    std::vector<StackLayer> layers;
    std::vector<StackRgb> rgbs;

    int64_t register_slabs() const { return (register_inputs + kSlab - 1) / kSlab; }
    int64_t fourier_floats() const
    {
        return 4 * register_slabs() * (styles > 0 ? BlendShape::kFourierSlab : StackShape<1>::kFourierSlab);
    }
    /// Bytes of the signs that a forward for training keeps of so many pixels.
    int64_t sign_bytes(int64_t pixels) const
    {
        const int64_t tiles = (pixels + kGroupPixels - 1) / kGroupPixels * (kGroupPixels / kWarpgroupPixels);
        return batch * tiles * image_records * 128 * 8;
    }
    int64_t streamed_slabs() const { return (streamed_inputs + kSlab - 1) / kSlab; }
};

/// rgb_after[k]: the layer that rgbs[k] reads; blocks in order and apart. register_inputs: channels of the first
/// layer's input that are held in registers; the rest is streamed. Throws std::invalid_argument, naming what the kernel
/// cannot serve.
StackPlan make_stack_plan(const std::vector<StackMatrix>& layers, const std::vector<StackMatrix>& rgbs,
                          const std::vector<int64_t>& rgb_after, const std::vector<StackBlock>& blocks,
                          int64_t register_inputs, int64_t batch, int64_t styles);

struct StackPack {
    const float* weights;
    const float* styles;  // [B, style_stride], blends [B, styles] with strides style_stride and kind_stride
    int64_t style_stride;
    int64_t kind_stride;
    const float* biases;
    const float* strengths;       // [L]
    const float* fourier_weight;  // [register_inputs, 2], or null
    const float* fourier_bias;    // [register_inputs]
    void* slabs;                  // [B, plan.slab_bytes], of blends [plan.slab_bytes]; 128-byte aligned
    void* records;                // [B, plan.record_bytes], 16-byte aligned
    void* fourier;                // [plan.fourier_floats] an image of a blend, otherwise once; 16-byte aligned
    // of blends that stream an input, [B, kMaxBlend, streamed_inputs] of its styles, rows of whole 16 bytes, of the
    // dtype
    void* row_styles;
    float* rgb_bias;  // [kMaxRgbChannels]
    DType dtype;      // bfloat16 or float16
    float eps;
    float gain;
    float negative_slope;
    bool demodulate;
};

/// Rows of the streamed input that the kernel makes itself, a unit ahead, in `made`: of blends times each pixel's
/// style, otherwise looked up in a table as table_lookup does.
struct StackMadeRows {
    void* made;                   // stack_made_bytes bytes, 16-byte aligned; null: the streamed input comes as it is
    const void* source;           // 16-bit [images or 1, P, T], or a float32 table [rows, columns, T]; 16-byte aligned
    int64_t source_batch_stride;  // bytes; 0: shared
    int64_t source_row_stride;    // bytes of T, a multiple of 16, of a table of 8
    const void* styles;  // of blends, [B, kMaxBlend, T] of the stack's dtype, rows of whole 16 bytes; otherwise null
    int64_t rows;        // of a table
    int64_t columns;
    bool exact;  // see TableLookup
};

enum class NoiseMode { kNone, kIndex, kCoords, kGiven };

struct StackForward {
    const void* slabs;
    const void* records;
    const void* fourier;         // null: x is given; with blends x comes times the pixel's style
    const float* blend;          // [B or 1, P, plan.styles]; null without blends
    int64_t blend_batch_stride;  // floats; 0: shared
    const float* rgb_bias;
    const void* x;           // [B or 1, P, register_inputs or more], 16-byte aligned rows; null with fourier
    int64_t x_batch_stride;  // bytes, as all strides of 16-bit tensors
    int64_t x_row_stride;
    const void* streamed;  // [B or 1, P, streamed_inputs], 16-byte aligned rows
    int64_t streamed_batch_stride;
    int64_t streamed_row_stride;
    StackMadeRows made;
    const float* coords;          // [B or 1, P, 2], or null
    int64_t coords_batch_stride;  // floats
    int64_t grid_rows;
    int64_t grid_columns;
    int64_t first_pixel;
    NoiseMode noise_mode;
    const int64_t* seed;
    const float* noise;  // [L, B, P] with strides in floats
    int64_t noise_layer_stride;
    int64_t noise_batch_stride;
    int64_t first_image;
    int64_t first_layer;
    void* kept;  // stack_kept_bytes(device) bytes, 16-byte aligned; null without residual blocks
    // For training, where signs is not null, see tile/stack_train.h
    void* activations;  // 16-byte aligned
    void* features;     // 16-byte aligned
    void* signs;        // plan.sign_bytes(pixels) bytes, 8-byte aligned
    float* rgb;         // [B, P, C] with strides in floats
    int64_t rgb_batch_stride;
    int64_t rgb_pixel_stride;
    int64_t rgb_channel_stride;
    int64_t pixels;
    DType dtype;
    float negative_slope;
};

/// Bytes of memory that a launch on a device needs for the inputs of residual blocks.
int64_t stack_kept_bytes(DType dtype, int device);

/// Bytes that it needs for rows of `streamed_inputs` channels that it makes itself.
int64_t stack_made_bytes(int64_t streamed_inputs, DType dtype, int device);

/// One launch each. Throw std::invalid_argument for bad arguments, std::runtime_error with CUDA's words when CUDA
/// refuses.
void stack_pack(const StackPlan& plan, const StackPack& arguments, Target target);
void stack_forward(const StackPlan& plan, const StackForward& arguments, Target target);

}  // namespace cips
