// The modulate kernels, run on the host over real plans; called from test_csrc_host.py through ctypes.
#include "cuda_on_host.h"

// clang-format off
#include "kernels/modulate_bwd_styles.cuh"
#include "kernels/modulate_bwd_weights.cuh"
#include "kernels/modulate_fwd.cuh"
#include "launch/modulate.h"
// clang-format on

namespace cips {
alignas(16) float4 shared_quads[kGradStages * kTileRows * kStageQuads];
}

namespace {

cips::ModulatePlan make_plan(const int64_t* shapes, int count, int batch)
{
    std::vector<cips::MatrixShape> matrices;
    for (int index = 0; index < count; ++index) {
        const int64_t* s = shapes + 7 * index;
        matrices.push_back({s[0], s[1], s[2], s[3], s[4], s[5], s[6] != 0});
    }
    return cips::make_modulate_plan(matrices, batch);
}

void launch(const cips::MatrixTable& table, unsigned seed, std::function<void()> body)
{
    constexpr int kFloats = 4 * cips::kGradStages * cips::kTileRows * cips::kStageQuads;
    host::launch(table.first_tile[table.count], cips::kTileThreads, &cips::shared_quads[0].x, kFloats, seed, body);
}

}  // namespace

extern "C" int64_t host_scratch_numel(const int64_t* shapes, int count, int batch)
{
    return make_plan(shapes, count, batch).scratch_numel;
}

extern "C" void host_modulate_forward(const int64_t* shapes, int count, int batch, const float* weights,
                                      const float* styles, int64_t style_stride, void* mods, int dtype, float eps,
                                      bool aligned, unsigned seed)
{
    const cips::ModulatePlan plan = make_plan(shapes, count, batch);
    launch(plan.forward, seed, [&] {
        const auto run = [&](auto* out) {
            cips::modulate_fwd_kernel(plan.forward, weights, styles, out, style_stride, batch, eps, aligned);
        };
        if (dtype == 0) run(static_cast<float*>(mods));
        if (dtype == 1) run(static_cast<__half*>(mods));
        if (dtype == 2) run(static_cast<__nv_bfloat16*>(mods));
    });
}

extern "C" void host_modulate_backward(const int64_t* shapes, int count, int batch, const float* grad_mods,
                                       const float* weights, const float* styles, int64_t style_stride, float* scratch,
                                       float* grad_weights, float* grad_styles, int64_t grad_style_stride, float eps,
                                       bool aligned, unsigned seed)
{
    const cips::ModulatePlan plan = make_plan(shapes, count, batch);
    launch(plan.backward_weights, seed, [&] {
        cips::modulate_bwd_kernel_weights(plan.backward_weights, weights, styles, grad_mods, grad_weights, scratch,
                                          style_stride, batch, eps, aligned);
    });
    launch(plan.backward_styles, seed, [&] {
        cips::modulate_bwd_kernel_styles(plan.backward_styles, scratch, grad_styles, grad_style_stride, batch);
    });
}
