// Tensor maps of the copy engine, encoded by the driver, which is looked up when first needed: nothing links it.
#pragma once

#include <cstdint>

#include "tile/stack_params.h"

namespace cips {

/// Of [planes, rows, columns] 16-bit values with strides in bytes, read in boxes [1, box_rows, 64], 128-byte swizzled;
/// what lies outside is zero. Throws std::invalid_argument where the driver refuses an address or stride.
TensorMap make_tensor_map(const void* base, int64_t planes, int64_t rows, int64_t columns, int64_t plane_stride,
                          int64_t row_stride, int box_rows, bool bfloat16);

/// Of [planes, rows, channels] 16-bit values without gaps, written in boxes [kWarpPixels, kChunk]; what lies outside is
/// left out. channels: a multiple of 8.
TensorMap make_store_map(const void* base, int64_t planes, int64_t rows, int64_t channels, bool bfloat16);

}  // namespace cips
