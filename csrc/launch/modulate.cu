// Launches of the modulate kernels.

#include "launch/modulate.h"

#include <algorithm>

#include "kernels/modulate_bwd_styles.cuh"
#include "kernels/modulate_bwd_weights.cuh"
#include "kernels/modulate_fwd.cuh"
#include "launch/cuda_guard.h"

namespace cips {
namespace {

bool on_16_bytes(const void* pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

void require_pointer(const void* pointer, const char* name, bool aligned)
{
    if (pointer == nullptr) throw std::invalid_argument(std::string(name) + ": a null address came");
    if (reinterpret_cast<uintptr_t>(pointer) % (aligned ? 16 : 4) != 0) {
        throw std::invalid_argument(std::string(name) + ": address is not a multiple of " + (aligned ? "16" : "4"));
    }
}

void require_stride(const ModulatePlan& plan, int64_t stride, const char* name)
{
    int64_t width = 0;
    for (int index = 0; index < plan.forward.count; ++index) {
        const MatrixEntry& matrix = plan.forward.entries[index];
        width = std::max(width, int64_t{matrix.style_offset} + matrix.in_features);
    }
    if (plan.batch > 1 && stride < width) {
        throw std::invalid_argument(std::string(name) + ": " + std::to_string(stride) + " came, expected at least " +
                                    std::to_string(width));
    }
}

unsigned tiles(const MatrixTable& table)
{
    return static_cast<unsigned>(table.first_tile[table.count]);
}

template <typename T>
void launch_forward(const ModulatePlan& plan, const ModulateForward& arguments, bool aligned, cudaStream_t stream)
{
    modulate_fwd_kernel<T><<<tiles(plan.forward), kTileThreads, 0, stream>>>(
        plan.forward, arguments.weights, arguments.styles, static_cast<T*>(arguments.mods), arguments.style_stride,
        static_cast<int>(plan.batch), arguments.eps, aligned);
}

}  // namespace

void modulate_forward(const ModulatePlan& plan, const ModulateForward& arguments, Target target)
{
    require_pointer(arguments.weights, "weights", false);
    require_pointer(arguments.styles, "styles", false);
    require_pointer(arguments.mods, "mods", true);
    require_stride(plan, arguments.style_stride, "style_stride");

    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    const bool aligned =
        on_16_bytes(arguments.weights) && on_16_bytes(arguments.styles) && arguments.style_stride % 4 == 0;
    switch (arguments.dtype) {
        case DType::kFloat32: launch_forward<float>(plan, arguments, aligned, stream); break;
        case DType::kFloat16: launch_forward<__half>(plan, arguments, aligned, stream); break;
        case DType::kBFloat16: launch_forward<__nv_bfloat16>(plan, arguments, aligned, stream); break;
    }
    check_cuda(cudaGetLastError(), "launch of modulate_fwd_kernel");
}

void modulate_backward(const ModulatePlan& plan, const ModulateBackward& arguments, Target target)
{
    require_pointer(arguments.grad_mods, "grad_mods", true);
    require_pointer(arguments.weights, "weights", false);
    require_pointer(arguments.styles, "styles", false);
    require_pointer(arguments.scratch, "scratch", true);
    require_pointer(arguments.grad_weights, "grad_weights", false);
    require_pointer(arguments.grad_styles, "grad_styles", false);
    require_stride(plan, arguments.style_stride, "style_stride");
    require_stride(plan, arguments.grad_style_stride, "grad_style_stride");

    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    const int batch = static_cast<int>(plan.batch);
    const bool aligned = on_16_bytes(arguments.weights) && on_16_bytes(arguments.styles) &&
                         on_16_bytes(arguments.grad_weights) && arguments.style_stride % 4 == 0;

    constexpr size_t kStageBytes = kGradStages * kTileRows * kStageQuads * sizeof(float4);
    static_assert(kStageBytes <= 48 * 1024, "more shared memory needs cudaFuncSetAttribute");
    modulate_bwd_kernel_weights<<<tiles(plan.backward_weights), kTileThreads, kStageBytes, stream>>>(
        plan.backward_weights, arguments.weights, arguments.styles, arguments.grad_mods, arguments.grad_weights,
        arguments.scratch, arguments.style_stride, batch, arguments.eps, aligned);
    check_cuda(cudaGetLastError(), "launch of modulate_bwd_kernel_weights");

    modulate_bwd_kernel_styles<<<tiles(plan.backward_styles), kTileThreads, kTileThreads * sizeof(float4), stream>>>(
        plan.backward_styles, arguments.scratch, arguments.grad_styles, arguments.grad_style_stride, batch);
    check_cuda(cudaGetLastError(), "launch of modulate_bwd_kernel_styles");
}

}  // namespace cips
