// What a modulate kernel knows of its matrices: a table passed by value, with all arguments 4 KB at most.
#pragma once

#include <cstdint>

namespace cips {

constexpr int kMaxMatrices = 64;

// One work tile is kTileRows output rows, a warp each, by kTileColumns input channels, which the warp keeps
// in registers. Wider rows are cut into several tiles, each of which sums the whole row for itself.
constexpr int kTileRows = 8;
constexpr int kTileThreads = 32 * kTileRows;
constexpr int kTileColumns = 512;
// Forward: images that a warp modulates with one copy of its row in registers. More images save reads of W
// from L2, fewer give more blocks.
constexpr int kForwardImages = 4;
// Style reduction: columns of one block, four for each lane.
constexpr int kStyleColumns = 128;

/// One matrix [O, I]. Offsets are in elements of the flat tensors.
struct MatrixEntry {
    int64_t weight_offset;
    int64_t mod_offset;
    int64_t partial_offset;  // in the scratch: [row_blocks, B, row_stride] float32
    int32_t style_offset;
    int32_t out_features;
    int32_t in_features;
    int32_t row_stride;
    int32_t row_blocks;     // of kTileRows rows
    int32_t column_blocks;  // of kTileColumns columns
    float scale;            // 1 / sqrt(in_features)
    bool demodulate;
    bool vectorizable;  // rows of W and s start on 16 bytes if the flat tensors do
};

/// All matrices of one launch; block `t` serves the matrix m with first_tile[m] <= t < first_tile[m + 1].
/// How the tiles of a matrix are ordered is each kernel's own affair, and the plan counts them alike.
struct MatrixTable {
    int32_t count;
    int32_t first_tile[kMaxMatrices + 1];
    MatrixEntry entries[kMaxMatrices];
};

static_assert(sizeof(MatrixTable) <= 4096 - 128, "kernel arguments must fit 4 KB: leave room for the pointers");

}  // namespace cips
