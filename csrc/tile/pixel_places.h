// Where the pixels of a call lie: a list of points, or the full grid.
#pragma once

#include <cstdint>

namespace cips {

struct PixelPlaces {
    const float* coords;          // [B or 1][P][2] (x, y); null: the full grid, or none
    int64_t coords_batch_stride;  // floats; 0: shared
    int64_t grid_rows;            // of the full grid; 0: none
    int64_t grid_columns;
    int64_t first_pixel;  // number of pixel 0 in the grid, and in a counter by index
    int64_t pixels;       // P
};

}  // namespace cips
