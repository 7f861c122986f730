// Lookup of coordinates in a table of vectors: a plain struct in, a launch out.
#pragma once

#include <cstdint>

#include "launch/modulate.h"

namespace cips {

struct TableLookup {
    const void* table;  // [rows, columns, features], contiguous
    DType table_dtype;
    int64_t rows;
    int64_t columns;
    int64_t features;
    const float* coords;  // [images or 1, P, 2]; null: the full grid
    int64_t coords_batch_stride;
    int64_t grid_rows;
    int64_t grid_columns;
    int64_t first_pixel;
    bool exact;
    void* out;           // [images, P, row_stride], 16-byte aligned
    DType out_dtype;     // bfloat16 or float16
    int64_t row_stride;  // elements, a multiple of 8
    int64_t images;
    int64_t pixels;
};

/// Throws std::invalid_argument for bad arguments, std::runtime_error with CUDA's words when CUDA refuses.
void table_lookup(const TableLookup& arguments, Target target);

}  // namespace cips
