// Lays a stack out as slabs and records. Plain C++: tested without a GPU.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch/stack_chain.h"

namespace cips {
namespace {

void require(bool holds, const std::string& name, int64_t came, const std::string& expected)
{
    if (!holds) throw std::invalid_argument(name + ": " + std::to_string(came) + " came, expected " + expected);
}

int64_t divide_up(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

int32_t offset(const std::string& name, int64_t elements)
{
    require(elements >= 0 && elements < int64_t{1} << 31, name + ": offset of its weights", elements, "0 to 2^31 - 1");
    return static_cast<int32_t>(elements);
}

/// Where an output of so many chunks of a layer's width lands: see StackLayer.
uint8_t positions_of(int64_t width, int64_t chunks)
{
    const int64_t in_last = divide_up(width - kChunk * (chunks - 1), kSlab);
    const int64_t low = (1 << 2 * (chunks - 1)) - 1;
    return static_cast<uint8_t>(low | ((1 << in_last) - 1) << (kRegisterSlabs - 2));
}

}  // namespace

StackPlan make_stack_plan(const std::vector<StackMatrix>& layers, const std::vector<StackMatrix>& rgbs,
                          const std::vector<int64_t>& rgb_after, const std::vector<StackBlock>& blocks,
                          int64_t register_inputs, int64_t batch, int64_t styles)
{
    const auto depth = static_cast<int64_t>(layers.size());
    require(depth >= 1 && depth <= kMaxStackLayers, "layers", depth, "1 to " + std::to_string(kMaxStackLayers));
    require(rgbs.size() == rgb_after.size(), "rgb_after", static_cast<int64_t>(rgb_after.size()), "one a ToRGB");
    require(batch >= 1 && batch <= 65535, "batch", batch, "1 to 65535");
    require(register_inputs >= 1 && register_inputs <= kRegisterInputs, "register_inputs", register_inputs,
            "1 to " + std::to_string(kRegisterInputs));
    require(styles == 0 || styles == kMaxBlend, "styles", styles, "0 or " + std::to_string(kMaxBlend));
    require(styles == 0 || blocks.empty(), "blocks", static_cast<int64_t>(blocks.size()), "none with blended styles");
    StackPlan plan{};
    plan.batch = batch;
    plan.styles = styles;
    plan.register_inputs = register_inputs;
    plan.streamed_inputs = layers[0].in_features - register_inputs;
    require(plan.streamed_inputs >= 0 && plan.streamed_inputs <= kRegisterInputs, "in_features of layer 0",
            layers[0].in_features,
            "at least register_inputs, and at most " + std::to_string(kRegisterInputs) + " more");
    for (const StackBlock& b : blocks) {
        require(b.first >= 1 && b.first <= b.last && b.last < depth, "blocks: first layer", b.first,
                "1 to the block's last, which is a layer");
        require(b.weight_offset >= 0 || layers[b.first].in_features == layers[b.last].out_features,
                "blocks: out_features of the last layer", layers[b.last].out_features,
                "the block's in_features, or a matrix");
    }
    const auto after_block = [&](int64_t index) {
        return std::any_of(blocks.begin(), blocks.end(), [&](const StackBlock& b) { return b.last + 1 == index; });
    };
    plan.has_blocks = !blocks.empty();
    int64_t slabs = 0, records = 0;
    uint8_t positions = static_cast<uint8_t>((1 << plan.register_slabs()) - 1);
    for (int64_t index = 0; index < depth; ++index) {
        const StackMatrix& m = layers[index];
        const std::string name = "layer " + std::to_string(index);
        require(m.out_features >= 1 && m.out_features <= kRegisterInputs, name + ": out_features", m.out_features,
                "1 to " + std::to_string(kRegisterInputs));
        require(index == 0 || m.in_features == layers[index - 1].out_features, name + ": in_features", m.in_features,
                "the layer before's out_features");
        StackLayer l{};
        l.in_features = static_cast<int32_t>(m.in_features);
        l.out_features = static_cast<int32_t>(m.out_features);
        l.weight_offset = offset(name, m.weight_offset);
        l.style_offset = static_cast<int32_t>(m.style_offset);
        l.bias_offset = static_cast<int32_t>(m.bias_offset);
        l.chunks = static_cast<uint8_t>(divide_up(m.out_features, kChunk));
        l.positions = positions;
        l.slabs = static_cast<uint8_t>(index == 0 ? plan.register_slabs() + plan.streamed_slabs()
                                                  : divide_up(m.in_features, kSlab));
        l.slots = static_cast<uint8_t>(styles > 0 && index > 0 ? kHalves * divide_up(l.slabs, 2) : l.slabs);
        for (const StackBlock& b : blocks) {
            if (b.first == index && b.weight_offset >= 0) {
                require(b.last < depth, "blocks: last layer", b.last, "a layer");
                l.skip_chunks = static_cast<uint8_t>(divide_up(layers[b.last].out_features, kChunk));
                l.skip_offset = offset("blocks", b.weight_offset);
            }
            if (b.first == index && b.weight_offset < 0) l.keeps_input = 1;
            if (b.last == index) l.adds_skip = b.weight_offset < 0 && after_block(b.first) ? kHalved : kAsItIs;
        }
        l.after_block = after_block(index);
        l.number = static_cast<uint8_t>(index);
        l.slab_offset = slabs * kSlabBytes;
        l.first_record = static_cast<int32_t>(records);
        slabs += int64_t{l.chunks + l.skip_chunks} * l.slots;
        records += l.skip_chunks + l.chunks;
        positions = positions_of(m.out_features, l.chunks);
        plan.layers.push_back(l);
    }
    for (size_t k = 0; k < rgbs.size(); ++k) {
        const int64_t after = rgb_after[k];
        require(after >= 0 && after < depth, "rgb_after", after, "a layer");
        require(rgbs[k].in_features == layers[after].out_features, "ToRGB: in_features", rgbs[k].in_features,
                "the out_features of the layer it reads");
        require(k == 0 || rgbs[k].out_features == plan.channels, "ToRGB: channels", rgbs[k].out_features,
                "as many as the others");
        plan.channels = rgbs[k].out_features;
        require(plan.channels >= 1 && plan.channels <= kMaxRgbChannels, "ToRGB: channels", plan.channels,
                "1 to " + std::to_string(kMaxRgbChannels));
        plan.layers[after].rgb = 1;
        plan.rgbs.push_back({rgbs[k].weight_offset, static_cast<int32_t>(rgbs[k].style_offset),
                             static_cast<int32_t>(rgbs[k].bias_offset), static_cast<int32_t>(after)});
    }
    require(!rgbs.empty() && rgbs.size() <= 24, "ToRGBs", static_cast<int64_t>(rgbs.size()), "1 to 24");
    require(plan.layers.back().rgb != 0, "depth", depth, "no layers after the last that a ToRGB reads");
    plan.image_slabs = slabs;
    plan.image_records = records;
    plan.slab_bytes = slabs * kSlabBytes;
    plan.record_bytes = records * (styles > 0 ? kHalves * BlendShape::kRecordBytes : StackShape<1>::kRecordBytes);
    return plan;
}

ChainPlan make_chain_plan(const StackPlan& plan)
{
    require(!plan.has_blocks && plan.styles == 0, "blocks", plan.has_blocks, "neither residual blocks nor blends");
    ChainPlan chain{};
    chain.batch = plan.batch;
    chain.channels = plan.channels;
    chain.rgbs = plan.rgbs;
    const StackLayer* above = nullptr;
    for (auto layer = plan.layers.rbegin(); layer != plan.layers.rend(); ++layer) {
        StackLayer l{};
        l.out_features = layer->out_features;
        l.bias_offset = layer->bias_offset;
        l.first_record = layer->first_record;
        l.chunks = layer->chunks;
        l.rgb = layer->rgb;
        l.number = layer->number;
        if (above != nullptr) {
            l.in_features = above->out_features;
            l.weight_offset = above->weight_offset;
            l.style_offset = above->style_offset;
            l.positions = positions_of(above->out_features, above->chunks);
            l.slabs = l.slots = static_cast<uint8_t>(divide_up(above->out_features, kSlab));
        }
        l.slab_offset = chain.image_slabs * kSlabBytes;
        chain.image_slabs += int64_t{l.chunks} * l.slabs;
        if (l.rgb) chain.image_records += l.chunks;
        chain.image_chunks += l.chunks;
        chain.layers.push_back(l);
        above = &*layer;
    }
    chain.slab_bytes = chain.image_slabs * kSlabBytes;
    chain.record_bytes = chain.image_records * ChainShape::kRecordBytes;
    return chain;
}

}  // namespace cips
