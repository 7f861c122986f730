// Launch of one matrix times a few vectors.

#include "launch/affine.h"

#include "kernels/affine_fwd.cuh"
#include "launch/cuda_guard.h"
#include "launch/overlapped.h"
#include "launch/requirements.h"

namespace cips {

void affine_forward(const Affine& a, Target target)
{
    require_aligned(a.x, "x", 16);
    require_aligned(a.weight, "weight", 16);
    require(a.bias != nullptr && a.y != nullptr, "bias, y: a null address came");
    require(a.dim >= 32 && a.dim <= kRowColumns && a.dim % 32 == 0,
            "dim: " + std::to_string(a.dim) + " came, expected a multiple of 32 up to 512");
    require(a.vectors >= 1 && a.vectors < int64_t{1} << 30,
            "vectors: " + std::to_string(a.vectors) + " came, expected 1 to 2^30");
    require(a.rows >= 1 && a.rows < int64_t{1} << 30, "rows: " + std::to_string(a.rows) + " came, expected 1 to 2^30");
    require(a.current_bytes >= 0 && (a.current_bytes == 0 || a.current != nullptr),
            "current_bytes: expected none of a null address");
    require(a.upcoming_bytes >= 0 && (a.upcoming_bytes == 0 || a.upcoming != nullptr),
            "upcoming_bytes: expected none of a null address");
    const DeviceGuard guard(target.device);
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, target.device),
               "cudaDeviceGetAttribute");
    const AffineParams p{a.x,
                         a.weight,
                         a.bias,
                         a.y,
                         static_cast<const char*>(a.current),
                         a.current_bytes,
                         static_cast<const char*>(a.upcoming),
                         a.upcoming_bytes,
                         static_cast<int32_t>(a.vectors),
                         static_cast<int32_t>(a.rows),
                         static_cast<int32_t>(a.dim),
                         kAffineResident * multiprocessors};
    const auto blocks = static_cast<unsigned>((a.rows + kAffineRows - 1) / kAffineRows);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    if (a.overlaps) {
        launch_overlapped(affine_fwd_kernel, blocks, kAffineThreads, 0, stream, p);
    } else {
        affine_fwd_kernel<<<blocks, kAffineThreads, 0, stream>>>(p);
        check_cuda(cudaGetLastError(), "launch of affine_fwd_kernel");
    }
}

}  // namespace cips
