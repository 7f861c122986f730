// Asks the driver, once, how many clusters fit.

#include "launch/resident_clusters.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "launch/cuda_guard.h"
#include "tile/stack_layout.h"

namespace cips {

int resident_clusters(const void* kernel, int device)
{
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find({kernel, device}); found != known.end()) return found->second;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStackSharedBytes),
               "cudaFuncSetAttribute of the on-chip stack");
    int multiprocessors = 0, clusters = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = multiprocessors / kCluster * kCluster;
    config.blockDim = kStackThreads;
    config.dynamicSmemBytes = kStackSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config),
               "cudaOccupancyMaxActiveClusters of the on-chip stack");
    if (clusters < 1) throw std::runtime_error("the on-chip stack: no cluster fits on the device");
    return known[{kernel, device}] = clusters;
}

}  // namespace cips
