// The weight gradients of the on-chip stack: plain structs in, launches out. No CUDA header, no Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "launch/stack.h"

namespace cips {

/// A run of layers with equal widths: gradients at their sums, and what they read, 16-bit, a plane [pixels, channels]
/// for each layer and image; strides in bytes, of x multiples of 16.
struct WgradOperands {
    const void* u;  // channels in fragment order, planes and rows side by side
    const void* x;
    int64_t u_planes;
    int64_t x_planes;
    int64_t x_plane_stride;
    int64_t x_row_stride;
    int64_t out_features;  // a multiple of 32
    int64_t in_features;   // of 32 with fragments, otherwise of 2
    int64_t row_stride;    // of a matrix in n, floats, a multiple of 4
    bool fragments;        // whether the channels of x are in fragment order too
    float scale;
};

struct Wgrad {
    std::vector<WgradOperands> runs;
    const void* items;  // WgradItem, on the device, 16-byte aligned
    const int32_t* first_items;
    int64_t clusters;  // entries of first_items but the last
    const void* sums;  // WgradSum, on the device, 16-byte aligned
    int64_t sum_count;
    float* n;
    float* pieces;
    float* colour_parts;
    const void* colours;    // [images][padded pixels][8], 16-byte aligned; null where no item asks for them
    int64_t padded_pixels;  // of an image's colours, whole units of the chain
    int64_t channels;
    float colour_scale;
    int64_t pixels;
    DType dtype;
};

/// Clusters that a launch may have, at most.
int64_t wgrad_clusters(DType dtype, int device);

/// Two launches, the second where there are sums; errors as stack_forward.
void stack_wgrad(const Wgrad& arguments, Target target);

}  // namespace cips
