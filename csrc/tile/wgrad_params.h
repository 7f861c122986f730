// Arguments of the weight gradients' kernels, and the items of work that they are made of.
//
// N = scale u^T x of a matrix, a sum over the pixels of an image, goes by tiles of kWgradTile x kWgradTile, each of one
// cluster: a block takes half of the output channels, both share the input channels. Which cluster sums up what, from
// which block of kWgradPixels pixels to which, is a table that the host makes (cips_kernels/wgrad_plan.py).
#pragma once

#include <cstdint>

#include "tile/stack_params.h"

namespace cips {

constexpr int kWgradTile = 256;
constexpr int kWgradOutputs = kWgradTile / kCluster;  // of a block
constexpr int kWgradPixels = 64;                      // of a stage
constexpr int kWgradSteps = kWgradPixels / 16;        // products of a stage
constexpr int kWgradStages = 256 / kWgradPixels;
constexpr int kWgradRuns = 8;      // of layers with equal widths, in one launch
constexpr int kColourColumns = 8;  // of the colours' gradients as an operand, see StackGrads

// Shared memory of a stage: u's channels and x's in atoms of 64, kWgradPixels rows of 128 bytes, swizzled; the
// colours'.
constexpr int kAtomBytes = kWgradPixels * 64 * 2;
constexpr int kOutputBytes = kWgradOutputs / 64 * kAtomBytes;
constexpr int kInputBytes = kWgradTile / 64 * kAtomBytes;
constexpr int kColourBytes = kWgradPixels * kColourColumns * 2;
constexpr int kWgradColourOffset = kWgradStages * (kOutputBytes + kInputBytes);
constexpr int kWgradBarrierOffset = kWgradColourOffset + kWgradStages * kColourBytes;
static_assert(kWgradBarrierOffset + 2 * 8 * kWgradStages <= kStackSharedBytes);

/// A run of layers with equal widths, whose u and x have a plane for each layer and image.
struct WgradRun {
    int32_t out_features;
    int32_t in_features;
    int32_t row_stride;  // of a matrix, floats
    int32_t fragments;   // whether the channels of x lie in fragment order; those of u always do
    float scale;
};

/// A sum over some of an image's pixels. All but `place` are 32-bit: the host writes them as integers.
struct WgradItem {
    int32_t run;
    int32_t u_plane;
    int32_t x_plane;
    int32_t image;   // of the colours' gradients
    int32_t output;  // first channels of the tile
    int32_t input;
    int32_t begin;  // blocks of pixels
    int32_t end;
    int32_t piece;         // where the sum goes unless it is whole; -1: to the matrix
    int32_t colours;       // number of the sum for the ToRGB that reads x; -1: none
    int32_t colour_step;   // of the kWgradSteps of each block, the first that this item takes for it
    int32_t colour_steps;  // all of them or half
    int64_t place;         // of the matrix in n, floats
    int64_t unused;
};
static_assert(sizeof(WgradItem) == 64);

/// What is added up after them.
struct WgradSum {
    int32_t run;
    int32_t first;  // piece, or sum of colours
    int32_t count;
    int32_t output;  // first channels of the tile; -1: a ToRGB's
    int32_t input;
    int32_t row_stride;  // of a ToRGB's matrix
    int64_t place;
};
static_assert(sizeof(WgradSum) == 32);

struct WgradParams {
    const WgradItem* items;
    const int32_t* first_items;  // [clusters + 1]: a cluster's are first_items[c] to first_items[c + 1] - 1
    float* n;
    float* pieces;          // [pieces][kWgradTile][kWgradTile], channels in natural order
    float* colour_parts;    // [sums][kColourColumns][kWgradTile], likewise
    const char* colours;    // [images][pixels, a multiple of kWgradPixels][kColourColumns] 16-bit values
    int64_t colour_stride;  // bytes an image
    WgradRun runs[kWgradRuns];
};

struct WgradMaps {
    TensorMap u[kWgradRuns];
    TensorMap x[kWgradRuns];
};

struct WgradSumParams {
    const WgradSum* sums;
    float* n;
    const float* pieces;
    const float* colour_parts;
    int32_t channels;  // of the colours
    float colour_scale;
    WgradRun runs[kWgradRuns];
};

}  // namespace cips
