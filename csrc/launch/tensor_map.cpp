// Tensor maps, by the driver's encoder.

#include "launch/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launch/cuda_guard.h"

namespace cips {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encoder()
{
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
        throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    return reinterpret_cast<Encode>(function);
}

constexpr int kRank = 3;

/// The innermost stride is that of neighbours; steps, in bytes, are those of the others.
TensorMap encode(const void* base, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&steps)[kRank - 1],
                 const cuuint32_t (&box)[kRank], CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                 bool bfloat16)
{
    static const Encode encoder = find_encoder();
    cuuint32_t each[kRank];
    std::fill(each, each + kRank, 1);
    CUtensorMap map;
    const CUresult code = encoder(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                  kRank, const_cast<void*>(base), sizes, steps, box, each,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) {
        std::string text = "cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(code)) + " for sizes";
        for (const cuuint64_t size : sizes) text += " " + std::to_string(size);
        text += ", strides";
        for (const cuuint64_t step : steps) text += " " + std::to_string(step);
        throw std::invalid_argument(text + " bytes, innermost first");
    }
    TensorMap result;
    static_assert(sizeof(result) == sizeof(map), "a tensor map has 128 bytes");
    std::memcpy(&result, &map, sizeof(map));
    return result;
}

cuuint64_t size(int64_t value)
{
    return static_cast<cuuint64_t>(value);
}

}  // namespace

TensorMap make_tensor_map(const void* base, int64_t planes, int64_t rows, int64_t columns, int64_t plane_stride,
                          int64_t row_stride, int box_rows, bool bfloat16)
{
    return encode(base, {size(columns), size(rows), size(planes)}, {size(row_stride), size(plane_stride)},
                  {kSlab, static_cast<cuuint32_t>(box_rows), 1}, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_128B, bfloat16);
}

TensorMap make_store_map(const void* base, int64_t planes, int64_t rows, int64_t channels, bool bfloat16)
{
    return encode(base, {size(channels), size(rows), size(planes)}, {size(2 * channels), size(2 * channels * rows)},
                  {kChunk, kWarpPixels, 1}, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, bfloat16);
}

}  // namespace cips
