// stack_blend_pack_kernel, run on the host over real plans; called from test_blend_pack.py through ctypes.
#include "cuda_on_host.h"

// clang-format off
#include "kernels/stack_blend_pack.cuh"
#include "plain_stack.h"
// clang-format on

namespace {

constexpr int kStyles = 2;
constexpr float kEps = 1e-8f;

cips::StackPlan make_plan(const int64_t* widths, int depth, int64_t held, int64_t batch)
{
    return host::plain_stack(widths, depth, held, batch, kStyles);
}

}  // namespace

extern "C" void host_blend_sizes(const int64_t* widths, int depth, int64_t held, int64_t batch, int64_t* sizes)
{
    const cips::StackPlan plan = make_plan(widths, depth, held, batch);
    sizes[0] = plan.slab_bytes;
    sizes[1] = plan.record_bytes;
    for (int i = 0; i < depth; ++i) sizes[2 + i] = plan.layers[i].slab_offset;
}

extern "C" void host_blend_pack(const int64_t* widths, int depth, int64_t held, int64_t batch, const float* weights,
                                const float* styles, const float* biases, const float* strengths, void* slabs,
                                void* records, void* row_styles, float* rgb_bias, float fold, unsigned seed)
{
    const cips::StackPlan plan = make_plan(widths, depth, held, batch);
    int64_t style_width = widths[depth];
    for (int i = 0; i < depth; ++i) style_width += widths[i];
    cips::StackPackParams p{};
    p.weights = weights;
    p.styles = styles;
    p.style_stride = kStyles * style_width;
    p.kind_stride = style_width;
    p.kinds = kStyles;
    p.biases = biases;
    p.strengths = strengths;
    p.slabs = static_cast<char*>(slabs);
    p.slab_stride = plan.slab_bytes;
    p.records = static_cast<char*>(records);
    p.record_stride = plan.record_bytes;
    p.row_styles = row_styles;
    p.rgb_bias = rgb_bias;
    p.eps = kEps;
    p.fold = fold;
    p.batch = static_cast<int32_t>(batch);
    p.channels = 3;
    p.register_inputs = static_cast<int32_t>(held);
    p.register_slabs = static_cast<int32_t>(plan.register_slabs());
    p.streamed_slabs = static_cast<int32_t>(plan.streamed_slabs());
    p.image_records = static_cast<int32_t>(plan.image_records);
    p.row_blocks = static_cast<int32_t>(plan.image_records * cips::kChunk / (cips::kPackThreads / 32));
    p.depth = depth;
    p.rgb_count = 1;
    p.demodulate = true;
    for (int i = 0; i < depth; ++i) {
        const cips::StackLayer& l = plan.layers[i];
        const bool rows = (l.in_features | l.weight_offset | l.style_offset | style_width) % 4 == 0;
        p.vectors |= uint64_t{rows} << i;
    }
    std::copy(plan.layers.begin(), plan.layers.end(), p.layers);
    std::copy(plan.rgbs.begin(), plan.rgbs.end(), p.rgbs);
    float nothing[1];
    host::launch(static_cast<int>(cips::blend_pack_blocks(p)), cips::kPackThreads, nothing, 1, seed,
                 [&] { cips::stack_blend_pack_kernel<__nv_bfloat16, kStyles>(p); });
}
