// Launches of the chain of gradients.

#include "launch/stack_chain.h"

#include <algorithm>

#include "kernels/stack_chain_pack.cuh"
#include "launch/cuda_guard.h"
#include "launch/requirements.h"
#include "launch/resident_clusters.h"
#include "launch/stack_kernels.h"
#include "launch/tensor_map.h"

namespace cips {

int64_t chain_warps(DType dtype, int device)
{
    require_half(dtype);
    const DeviceGuard guard(device);
    const auto* kernel = reinterpret_cast<const void*>(stack_chain_kernel_of(dtype == DType::kBFloat16));
    return int64_t{resident_clusters(kernel, device)} * kCluster * kConsumers * 4;
}

void chain_pack(const ChainPlan& plan, const ChainPack& a, Target target)
{
    require_half(a.dtype);
    require_aligned(a.weights, "weights", 4);
    require_aligned(a.styles, "styles", 4);
    if (plan.slab_bytes > 0) require_aligned(a.slabs, "slabs", 128);
    require_aligned(a.records, "records", 16);
    ChainPackParams p = chain_pack_params(plan);
    p.weights = a.weights;
    p.styles = a.styles;
    p.style_stride = a.style_stride;
    p.slabs = static_cast<char*>(a.slabs);
    p.records = static_cast<char*>(a.records);
    p.eps = a.eps;
    p.gain = a.gain;
    p.demodulate = a.demodulate;

    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    const auto blocks = static_cast<unsigned>(chain_pack_blocks(p));
    if (a.dtype == DType::kBFloat16) {
        stack_chain_pack_kernel<__nv_bfloat16><<<blocks, kPackThreads, kChainPackBytes, stream>>>(p);
    } else {
        stack_chain_pack_kernel<__half><<<blocks, kPackThreads, kChainPackBytes, stream>>>(p);
    }
    check_cuda(cudaGetLastError(), "launch of stack_chain_pack_kernel");
}

void chain_backward(const ChainPlan& plan, const ChainBackward& a, Target target)
{
    require_half(a.dtype);
    if (plan.slab_bytes > 0) require_aligned(a.slabs, "slabs", 128);
    require_aligned(a.records, "records", 16);
    require_aligned(a.drgb, "drgb", 4);
    require_aligned(a.signs, "signs", 8);
    require_aligned(a.first, "first", 16);
    if (plan.layers.size() > 1) require_aligned(a.u, "u", 16);
    if (a.colours != nullptr) require_aligned(a.colours, "colours", 4);
    if (a.bias_parts != nullptr) require_aligned(a.bias_parts, "bias_parts", 16);
    require(a.pixels >= 1 && a.pixels < int64_t{1} << 31, "pixels: expected 1 to 2^31 - 1");
    require(a.images >= 1 && a.images <= plan.batch, "images: expected 1 to the plan's batch");
    const int64_t groups = (a.pixels + kGroupPixels - 1) / kGroupPixels;
    require(groups * a.images < int64_t{1} << 31, "pixels: more units of work than 2^31");
    StackParams p{};
    p.slabs = static_cast<const char*>(a.slabs);
    p.slab_stride = plan.slab_bytes;
    p.records = static_cast<const char*>(a.records);
    p.record_stride = plan.record_bytes;
    p.places.pixels = a.pixels;
    p.groups = static_cast<int32_t>(groups);
    p.images = static_cast<int32_t>(a.images);
    p.units = static_cast<int32_t>(groups * a.images);
    p.channels = static_cast<int32_t>(plan.channels);
    p.depth = static_cast<int32_t>(plan.layers.size());
    p.image_slabs = static_cast<int32_t>(plan.image_slabs);
    p.image_records = static_cast<int32_t>(plan.image_records);
    std::copy(plan.layers.begin(), plan.layers.end(), p.layers);
    StackGrads grads{};
    grads.drgb = a.drgb;
    grads.signs = static_cast<const uint2*>(a.signs);
    for (const StackLayer& l : plan.layers) {
        // bias_offset counts layer 0's, which has a place of its own
        const int64_t before = l.bias_offset - plan.layers.back().out_features;
        char* gradient = static_cast<char*>(a.u) + 2 * a.images * a.pixels * before;
        if (l.number == 0) gradient = static_cast<char*>(a.first);
        grads.gradients[l.number] =
            make_store_map(gradient, a.images, a.pixels, l.out_features, a.dtype == DType::kBFloat16);
    }
    grads.colours = static_cast<uint32_t*>(a.colours);
    grads.bias_parts = a.bias_parts;
    grads.noise_rows = a.noise_rows;
    grads.noise_stride = a.noise_stride;
    grads.part_stride = static_cast<int32_t>(plan.image_chunks * kChunk);
    grads.image_chunks = static_cast<int32_t>(plan.image_chunks);
    grads.gain = a.gain;
    grads.negative_slope = a.negative_slope;

    const DeviceGuard guard(target.device);
    const StackChainKernel kernel = stack_chain_kernel_of(a.dtype == DType::kBFloat16);
    const int clusters = resident_clusters(reinterpret_cast<const void*>(kernel), target.device);
    const auto blocks = static_cast<unsigned>(std::min(clusters, p.units) * kCluster);
    kernel<<<blocks, kStackThreads, kStackSharedBytes, reinterpret_cast<cudaStream_t>(target.stream)>>>(p, TensorMap{},
                                                                                                        grads);
    check_cuda(cudaGetLastError(), "launch of stack_chain_kernel");
}

}  // namespace cips
