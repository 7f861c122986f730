// Launches that may begin while the kernel before them still runs, see grid_dependency.cuh. Only for kernels that wait.
#pragma once

#include <cuda_runtime.h>

#include "launch/cuda_guard.h"

namespace cips {

/// Whether a stream may be captured with such launches in it: since CUDA 12.3.
inline bool driver_captures_overlaps()
{
    static const bool does = [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
    }();
    return does;
}

template <typename... Params, typename... Arguments>
void launch_overlapped(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared, cudaStream_t stream,
                       const Arguments&... arguments)
{
    cudaLaunchAttribute overlaps{};
    overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlaps.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlaps;
    config.numAttrs = driver_captures_overlaps() ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

}  // namespace cips
