// stack_chain_pack_kernel, run on the host over real plans; called from test_chain_pack.py through ctypes.
#include "cuda_on_host.h"

// clang-format off
#include "kernels/stack_chain_pack.cuh"
#include "launch/stack_chain.h"
#include "plain_stack.h"
// clang-format on

namespace cips {
alignas(16) uint4 chain_units[kChainPackBytes / sizeof(uint4)];
}

namespace {

constexpr float kEps = 1e-8f;

cips::ChainPlan make_plan(const int64_t* widths, int depth, int64_t batch)
{
    return cips::make_chain_plan(host::plain_stack(widths, depth, widths[0], batch, 0));
}

}  // namespace

extern "C" void host_chain_sizes(const int64_t* widths, int depth, int64_t batch, int64_t* sizes)
{
    const cips::ChainPlan plan = make_plan(widths, depth, batch);
    sizes[0] = plan.slab_bytes;
    sizes[1] = plan.record_bytes;
    for (int i = 0; i < depth; ++i) sizes[2 + i] = plan.layers[i].slab_offset;
}

extern "C" void host_chain_pack(const int64_t* widths, int depth, int64_t batch, const float* weights,
                                const float* styles, void* slabs, void* records, float gain, int demodulate,
                                unsigned seed)
{
    const cips::ChainPlan plan = make_plan(widths, depth, batch);
    cips::ChainPackParams p = cips::chain_pack_params(plan);
    p.weights = weights;
    p.styles = styles;
    for (int i = 0; i <= depth; ++i) p.style_stride += widths[i];
    p.slabs = static_cast<char*>(slabs);
    p.records = static_cast<char*>(records);
    p.eps = kEps;
    p.gain = gain;
    p.demodulate = demodulate != 0;
    host::launch(cips::chain_pack_blocks(p), cips::kPackThreads, reinterpret_cast<float*>(cips::chain_units),
                 cips::kChainPackBytes / sizeof(float), seed, [&] { cips::stack_chain_pack_kernel<__nv_bfloat16>(p); });
}
