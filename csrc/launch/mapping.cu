// Launch of the mapping network.

#include "launch/mapping.h"

#include "kernels/mapping_fwd.cuh"
#include "launch/cuda_guard.h"
#include "launch/requirements.h"

namespace cips {

void mapping_forward(const Mapping& a, Target target)
{
    require(a.z != nullptr && a.biases != nullptr && a.w != nullptr, "z, biases, w: a null address came");
    require(a.weights != nullptr && reinterpret_cast<uintptr_t>(a.weights) % 16 == 0,
            "weights: address is null or not a multiple of 16");
    require(a.dim >= 32 && a.dim <= kMappingMaxDim && a.dim % 32 == 0,
            "dim: " + std::to_string(a.dim) + " came, expected a multiple of 32 up to 512");
    require(a.layers >= 1 && a.layers <= 1 << 20, "layers: " + std::to_string(a.layers) + " came, expected at least 1");
    require(a.vectors >= 1 && a.vectors < int64_t{1} << 30,
            "vectors: " + std::to_string(a.vectors) + " came, expected 1 to 2^30");
    const MappingParams p{a.z,
                          a.weights,
                          a.biases,
                          a.w,
                          static_cast<int32_t>(a.vectors),
                          static_cast<int32_t>(a.layers),
                          static_cast<int32_t>(a.dim),
                          a.negative_slope};
    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    check_cuda(
        cudaFuncSetAttribute(mapping_fwd_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMappingSharedBytes),
        "cudaFuncSetAttribute(mapping_fwd_kernel)");
    const auto clusters = static_cast<unsigned>((a.vectors + kMappingVectors - 1) / kMappingVectors);
    const size_t shared = 2 * kMappingVectors * a.dim * sizeof(float);
    mapping_fwd_kernel<<<clusters * kMappingCluster, kMappingThreads, shared, stream>>>(p);
    check_cuda(cudaGetLastError(), "launch of mapping_fwd_kernel");
}

}  // namespace cips
