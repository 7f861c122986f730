// Launches of the weight gradients.

#include "launch/stack_wgrad.h"

#include <algorithm>

#include "kernels/stack_wgrad.cuh"
#include "kernels/stack_wgrad_sum.cuh"
#include "launch/cuda_guard.h"
#include "launch/requirements.h"
#include "launch/resident_clusters.h"
#include "launch/tensor_map.h"

namespace cips {
namespace {

using WgradKernel = void (*)(WgradParams, WgradMaps);

WgradKernel kernel_of(DType dtype)
{
    return dtype == DType::kBFloat16 ? stack_wgrad_kernel<__nv_bfloat16> : stack_wgrad_kernel<__half>;
}

}  // namespace

int64_t wgrad_clusters(DType dtype, int device)
{
    require_half(dtype);
    const DeviceGuard guard(device);
    return resident_clusters(reinterpret_cast<const void*>(kernel_of(dtype)), device);
}

void stack_wgrad(const Wgrad& a, Target target)
{
    require_half(a.dtype);
    require(!a.runs.empty() && a.runs.size() <= kWgradRuns,
            "runs: expected 1 to " + std::to_string(kWgradRuns) + ", " + std::to_string(a.runs.size()) + " came");
    require_aligned(a.items, "items", 16);
    require_aligned(a.first_items, "first_items", 4);
    if (a.sum_count > 0) require_aligned(a.sums, "sums", 16);
    require_aligned(a.n, "n", 16);
    if (a.pieces != nullptr) require_aligned(a.pieces, "pieces", 16);
    if (a.colours != nullptr) require_aligned(a.colours, "colours", 16);
    require(a.pixels >= 1 && a.pixels < int64_t{1} << 31, "pixels: expected 1 to 2^31 - 1");
    require(a.padded_pixels % kGroupPixels == 0 && a.padded_pixels >= a.pixels,
            "padded_pixels: expected whole units of " + std::to_string(kGroupPixels));
    require(a.channels >= 1 && a.channels <= kMaxRgbChannels, "channels: expected 1 to 3");

    WgradParams p{};
    WgradMaps maps{};
    for (size_t i = 0; i < a.runs.size(); ++i) {
        const WgradOperands& run = a.runs[i];
        require_aligned(run.u, "u", 16);
        require_aligned(run.x, "x", 16);
        require(run.out_features % 32 == 0, "out_features: expected a multiple of 32");
        require(run.in_features % (run.fragments ? 32 : 2) == 0,
                "in_features: expected a multiple of 32, or 2 of x as it came");
        require(run.row_stride % 4 == 0, "row_stride: expected a multiple of 4");
        p.runs[i] = {static_cast<int32_t>(run.out_features), static_cast<int32_t>(run.in_features),
                     static_cast<int32_t>(run.row_stride), run.fragments, run.scale};
        const bool bfloat16 = a.dtype == DType::kBFloat16;
        maps.u[i] = make_tensor_map(run.u, run.u_planes, a.pixels, run.out_features, a.pixels * run.out_features * 2,
                                    run.out_features * 2, kWgradPixels, bfloat16);
        maps.x[i] = make_tensor_map(run.x, run.x_planes, a.pixels, run.in_features, run.x_plane_stride,
                                    run.x_row_stride, kWgradPixels, bfloat16);
    }
    p.items = static_cast<const WgradItem*>(a.items);
    p.first_items = a.first_items;
    p.n = a.n;
    p.pieces = a.pieces;
    p.colour_parts = a.colour_parts;
    p.colours = static_cast<const char*>(a.colours);
    p.colour_stride = a.padded_pixels * kColourColumns * 2;

    const DeviceGuard guard(target.device);
    const WgradKernel kernel = kernel_of(a.dtype);
    const int clusters = resident_clusters(reinterpret_cast<const void*>(kernel), target.device);
    require(a.clusters >= 1 && a.clusters <= clusters, "clusters: expected 1 to " + std::to_string(clusters));
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    kernel<<<static_cast<unsigned>(a.clusters * kCluster), kStackThreads, kStackSharedBytes, stream>>>(p, maps);
    check_cuda(cudaGetLastError(), "launch of stack_wgrad_kernel");
    if (a.sum_count == 0) return;
    WgradSumParams s{};
    s.sums = static_cast<const WgradSum*>(a.sums);
    s.n = a.n;
    s.pieces = a.pieces;
    s.colour_parts = a.colour_parts;
    s.channels = static_cast<int32_t>(a.channels);
    s.colour_scale = a.colour_scale;
    std::copy(std::begin(p.runs), std::end(p.runs), s.runs);
    const dim3 grid(static_cast<unsigned>(a.sum_count), kWgradTile / kWgradSumRows);
    stack_wgrad_sum_kernel<<<grid, kWgradSumThreads, 0, stream>>>(s);
    check_cuda(cudaGetLastError(), "launch of stack_wgrad_sum_kernel");
}

}  // namespace cips
