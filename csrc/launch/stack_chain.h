// The chain of gradients of the on-chip stack: plain structs in, launches out. No CUDA header, no Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "launch/stack.h"

namespace cips {

/// A stack's layers from last to first, as stack_chain_kernel walks them. A layer's in_features are the channels of
/// the gradient that comes from the layer above (0 for the last layer: the colours' alone), its out_features those of
/// the output whose gradient it makes.
struct ChainPlan {
    int64_t batch;
    int64_t channels;
    int64_t slab_bytes;    // an image's slabs
    int64_t record_bytes;  // an image's records
    int64_t image_slabs;
    int64_t image_records;
    int64_t image_chunks;
    std::vector<StackLayer> layers;
    std::vector<StackRgb> rgbs;
};

/// Throws std::invalid_argument for residual blocks and blends.
ChainPlan make_chain_plan(const StackPlan& plan);

struct ChainPack {
    const float* weights;
    const float* styles;  // [B, style_stride]
    int64_t style_stride;
    void* slabs;    // [B, plan.slab_bytes], 128-byte aligned
    void* records;  // [B, plan.record_bytes], 16-byte aligned
    DType dtype;    // bfloat16 or float16
    float eps;
    float gain;
    bool demodulate;
};

/// Some of the call's images: addresses are of the first.
struct ChainBackward {
    const void* slabs;
    const void* records;
    const float* drgb;     // [images, P, C]
    const void* signs;     // as stack_forward left them
    void* first;           // 16-bit [images, P, width of layer 0], over the gain as all of u, 16-byte aligned
    void* u;               // 16-bit [images, P, width] for each layer from first to last, 16-byte aligned
    void* colours;         // 16-bit [images, P padded to 256, 8], see StackGrads, 4-byte aligned; null: not wanted
    float* bias_parts;     // [chain_warps(dtype, device), 128 image_chunks], added to; null: not wanted
    float* noise_rows;     // [L, B, P]; null: not wanted
    int64_t noise_stride;  // floats from layer to layer
    int64_t images;
    int64_t pixels;
    DType dtype;
    float gain;
    float negative_slope;
};

/// Warps that add to parts of bias gradients, at most.
int64_t chain_warps(DType dtype, int device);

/// One launch each; errors as stack_forward.
void chain_pack(const ChainPlan& plan, const ChainPack& arguments, Target target);
void chain_backward(const ChainPlan& plan, const ChainBackward& arguments, Target target);

}  // namespace cips
