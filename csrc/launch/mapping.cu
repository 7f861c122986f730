// Launch of the mapping network.

#include "launch/mapping.h"

#include <map>
#include <mutex>

#include "kernels/mapping_fwd.cuh"
#include "launch/cuda_guard.h"
#include "launch/requirements.h"

namespace cips {
namespace {

template <typename Kernel>
void allow_shared(Kernel* kernel)
{
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMappingSharedBytes),
               "cudaFuncSetAttribute(mapping_fwd_kernel)");
}

/// Whether a device has place for a cluster of kMappingLargeCluster blocks, asked once; the kernel may be launched with
/// such from then on. The device is the current one.
template <int kDim>
bool holds_large_clusters(int device)
{
    static std::mutex mutex;
    static std::map<int, bool> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(device); found != known.end()) return found->second;
    const auto kernel = mapping_fwd_kernel<kMappingLargeCluster, kDim>;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "cudaFuncSetAttribute(mapping_fwd_kernel)");
    allow_shared(kernel);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kMappingLargeCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = kMappingLargeCluster;
    config.blockDim = kMappingThreads;
    config.dynamicSmemBytes = kMappingSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
               "cudaOccupancyMaxActiveClusters(mapping_fwd_kernel)");
    return known[device] = clusters > 0;
}

template <int kDim>
void launch_mapping(const MappingParams& p, int device, cudaStream_t stream)
{
    const auto clusters = static_cast<unsigned>((p.vectors + kMappingVectors - 1) / kMappingVectors);
    const size_t shared = 2 * kMappingVectors * p.dim * sizeof(float);
    if (holds_large_clusters<kDim>(device)) {
        mapping_fwd_kernel<kMappingLargeCluster, kDim>
            <<<clusters * kMappingLargeCluster, kMappingThreads, shared, stream>>>(p);
    } else {
        allow_shared(mapping_fwd_kernel<kMappingCluster, kDim>);
        mapping_fwd_kernel<kMappingCluster, kDim><<<clusters * kMappingCluster, kMappingThreads, shared, stream>>>(p);
    }
    check_cuda(cudaGetLastError(), "launch of mapping_fwd_kernel");
}

}  // namespace

void mapping_forward(const Mapping& a, Target target)
{
    require_aligned(a.z, "z", 16);
    require(a.biases != nullptr && a.w != nullptr, "biases, w: a null address came");
    require_aligned(a.weights, "weights", 16);
    require(a.dim >= 32 && a.dim <= kRowColumns && a.dim % 32 == 0,
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
    if (p.dim == kRowColumns) {
        launch_mapping<kRowColumns>(p, target.device, stream);
    } else {
        launch_mapping<0>(p, target.device, stream);
    }
}

}  // namespace cips
