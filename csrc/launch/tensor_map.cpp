// Tensor maps, by the driver's encoder.

#include "launch/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

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

}  // namespace

TensorMap make_tensor_map(const void* base, int64_t planes, int64_t rows, int64_t columns, int64_t plane_stride,
                          int64_t row_stride, int box_rows, bool bfloat16)
{
    static const Encode encode = find_encoder();
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                 static_cast<cuuint64_t>(planes)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride), static_cast<cuuint64_t>(plane_stride)};
    const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1};
    const cuuint32_t steps[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult code =
        encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
               const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS)
        throw std::invalid_argument("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(code)) +
                                    " for [" + std::to_string(planes) + ", " + std::to_string(rows) + ", " +
                                    std::to_string(columns) + "], strides " + std::to_string(plane_stride) + ", " +
                                    std::to_string(row_stride) + " bytes");
    TensorMap result;
    static_assert(sizeof(result) == sizeof(map), "a tensor map has 128 bytes");
    std::memcpy(&result, &map, sizeof(map));
    return result;
}

}  // namespace cips
