// Launches of the on-chip stack.

#include "launch/stack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/stack_blend_pack.cuh"
#include "kernels/stack_pack.cuh"
#include "launch/cuda_guard.h"
#include "launch/overlapped.h"
#include "launch/requirements.h"
#include "launch/resident_clusters.h"
#include "launch/stack_kernels.h"
#include "launch/tensor_map.h"

namespace cips {
namespace {

constexpr int64_t kMaxMadePixels = int64_t{1} << 30;

template <typename T>
void launch_pack(const StackPackParams& params, cudaStream_t stream)
{
    if (params.kinds > 0) {
        launch_overlapped(stack_blend_pack_kernel<T, kMaxBlend>, blend_pack_blocks(params), kPackThreads, 0, stream,
                          params);
        return;
    }
    const int groups = (params.batch + kPackImages - 1) / kPackImages;
    const unsigned blocks = static_cast<unsigned>(params.row_blocks * groups + params.record_blocks + 1);
    launch_overlapped(stack_pack_kernel<T>, blocks, kPackThreads, 0, stream, params);
}

void launch_forward(const StackParams& params, const TensorMap& map, const StackSaved& saved, bool bfloat16, int device,
                    cudaStream_t stream)
{
    const auto blocks = [&](auto* kernel) {
        const void* function = reinterpret_cast<const void*>(kernel);
        return static_cast<unsigned>(std::min(resident_clusters(function, device), params.units) * kCluster);
    };
    if (saved.signs != nullptr) {
        const StackTrainKernel kernel = stack_train_kernel(bfloat16);
        launch_overlapped(kernel, blocks(kernel), kStackThreads, kStackSharedBytes, stream, params, map, saved);
    } else {
        const auto kernel = params.blend != nullptr ? stack_blend_kernel(bfloat16) : stack_kernel(bfloat16);
        launch_overlapped(kernel, blocks(kernel), kStackThreads, kStackSharedBytes, stream, params, map);
    }
}

int64_t made_row_bytes(int64_t streamed_inputs)
{
    return (streamed_inputs * 2 + 15) / 16 * 16;
}

/// Checks what rows are made of, and fills in what the kernel reads of it.
StackMade made_rows(const StackPlan& plan, const StackForward& a)
{
    const StackMadeRows& m = a.made;
    require_aligned(m.made, "made", 16);
    require_aligned(m.source, "made: source", 16);
    require(plan.streamed_inputs > 0, "made: expected a streamed input");
    const int64_t bytes = made_row_bytes(plan.streamed_inputs);
    const int64_t row = plan.styles > 0 ? bytes : plan.streamed_inputs * 4, step = plan.styles > 0 ? 16 : 8;
    require(m.source_row_stride >= row && m.source_row_stride % step == 0 && m.source_row_stride < int64_t{1} << 31,
            "made: source_row_stride: expected a multiple of " + std::to_string(step) + " bytes that holds a row");
    require(m.source_batch_stride % 16 == 0, "made: source_batch_stride: expected a multiple of 16 bytes");
    require(a.pixels <= kMaxMadePixels, "pixels: expected at most 2^30 where rows are made");
    StackMade p{};
    p.made = static_cast<char*>(m.made);
    p.row_bytes = static_cast<uint32_t>(bytes);
    p.row_stride = static_cast<uint32_t>(m.source_row_stride);
    p.last_pixel = static_cast<uint32_t>(a.pixels - 1);
    if (plan.styles > 0) {
        require_aligned(m.styles, "made: styles", 16);
        p.source = static_cast<const char*>(m.source);
        p.source_stride = m.source_batch_stride;
        p.styles = static_cast<const char*>(m.styles);
        return p;
    }
    constexpr int64_t kSide = 1 << 23;
    require(m.rows >= 1 && m.columns >= 1 && m.rows <= kSide && m.columns <= kSide && m.rows * m.columns < 1 << 30,
            "made: expected a table with sides of 1 to 2^23 and fewer than 2^30 entries");
    require(a.coords != nullptr || (a.grid_rows >= 1 && a.grid_columns >= 1), "coords: expected coords or a grid");
    require(a.coords != nullptr ||
                (a.grid_rows <= kSide && a.grid_columns <= kSide && a.first_pixel + a.pixels <= int64_t{1} << 31),
            "grid: expected sides of at most 2^23 and fewer than 2^31 pixels where rows are made");
    require(m.source_row_stride == row, "made: source_row_stride: expected a table without gaps");
    require(plan.streamed_inputs % kSlab == 0, "made: expected a table of a multiple of 64 channels");
    p.table = reinterpret_cast<uint64_t>(m.source) - 2 * reinterpret_cast<uint64_t>(m.made);
    p.source_stride = m.rows > 1 ? m.columns * m.source_row_stride : 0;
    p.rows = static_cast<int32_t>(m.rows);
    p.columns = static_cast<int32_t>(m.columns);
    p.exact = m.exact;
    return p;
}

template <typename T>
uint32_t pair_of(float value)
{
    return pack_pair(value, value, T());
}

}  // namespace

int64_t stack_kept_bytes(DType dtype, int device)
{
    require_half(dtype);
    const DeviceGuard guard(device);
    const int clusters =
        resident_clusters(reinterpret_cast<const void*>(stack_kernel(dtype == DType::kBFloat16)), device);
    return int64_t{clusters} * kCluster * kConsumers * kKeptBytes;
}

int64_t stack_made_bytes(int64_t streamed_inputs, DType dtype, int device)
{
    require_half(dtype);
    const DeviceGuard guard(device);
    const auto clusters = [&](StackForwardKernel kernel) {
        return resident_clusters(reinterpret_cast<const void*>(kernel), device);
    };
    const bool bfloat16 = dtype == DType::kBFloat16;
    const int64_t most = std::max(clusters(stack_kernel(bfloat16)), clusters(stack_blend_kernel(bfloat16)));
    return most * kMadeBuffers * kGroupPixels * made_row_bytes(streamed_inputs);
}

void stack_pack(const StackPlan& plan, const StackPack& a, Target target)
{
    require_half(a.dtype);
    require_aligned(a.slabs, "slabs", 128);
    require_aligned(a.records, "records", 16);
    for (const auto& [pointer, name] : {std::pair{a.weights, "weights"}, std::pair{a.styles, "styles"},
                                        std::pair{a.biases, "biases"}, std::pair{a.strengths, "strengths"}}) {
        require_aligned(pointer, name, 4);
    }
    require_aligned(a.rgb_bias, "rgb_bias", 4);
    const bool has_rows = plan.styles > 0 && plan.streamed_inputs > 0;
    require((a.row_styles != nullptr) == has_rows, "row_styles: expected if and only if a blend streams an input");
    if (has_rows) require_aligned(a.row_styles, "row_styles", 16);
    if (a.fourier_weight != nullptr) {
        require_aligned(a.fourier_bias, "fourier_bias", 4);
        require_aligned(a.fourier, "fourier", 16);
    }
    StackPackParams p{};
    p.weights = a.weights;
    p.styles = a.styles;
    p.style_stride = a.style_stride;
    p.kind_stride = a.kind_stride;
    p.kinds = static_cast<int32_t>(plan.styles);
    p.biases = a.biases;
    p.strengths = a.strengths;
    p.fourier_weight = a.fourier_weight;
    p.fourier_bias = a.fourier_bias;
    p.slabs = static_cast<char*>(a.slabs);
    p.slab_stride = plan.slab_bytes;
    p.records = static_cast<char*>(a.records);
    p.record_stride = plan.record_bytes;
    p.fourier = static_cast<float4*>(a.fourier);
    p.row_styles = a.row_styles;
    p.rgb_bias = a.rgb_bias;
    p.eps = a.eps;
    p.fold = static_cast<float>(static_cast<double>(a.gain) * (1.0 - a.negative_slope));
    p.batch = static_cast<int32_t>(plan.batch);
    p.channels = static_cast<int32_t>(plan.channels);
    p.register_inputs = static_cast<int32_t>(plan.register_inputs);
    p.register_slabs = static_cast<int32_t>(plan.register_slabs());
    p.streamed_slabs = static_cast<int32_t>(plan.streamed_slabs());
    p.image_records = static_cast<int32_t>(plan.image_records);
    p.row_blocks = static_cast<int32_t>(plan.image_records * kChunk / (kPackThreads / 32));
    p.record_blocks =
        static_cast<int32_t>((plan.image_records * plan.batch + kPackThreads / 32 - 1) / (kPackThreads / 32));
    p.depth = static_cast<int32_t>(plan.layers.size());
    p.rgb_count = static_cast<int32_t>(plan.rgbs.size());
    p.demodulate = a.demodulate;
    const bool aligned = (reinterpret_cast<uintptr_t>(a.weights) | reinterpret_cast<uintptr_t>(a.styles)) % 16 == 0;
    for (size_t i = 0; i < plan.layers.size(); ++i) {
        const StackLayer& l = plan.layers[i];
        const bool rows = (l.in_features | l.weight_offset | l.style_offset | a.style_stride | a.kind_stride) % 4 == 0;
        p.vectors |= uint64_t{aligned && rows} << i;
    }
    std::copy(plan.layers.begin(), plan.layers.end(), p.layers);
    std::copy(plan.rgbs.begin(), plan.rgbs.end(), p.rgbs);

    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    if (a.dtype == DType::kBFloat16) {
        launch_pack<__nv_bfloat16>(p, stream);
    } else {
        launch_pack<__half>(p, stream);
    }
}

void stack_forward(const StackPlan& plan, const StackForward& a, Target target)
{
    require_half(a.dtype);
    require_aligned(a.slabs, "slabs", 128);
    require_aligned(a.records, "records", 16);
    require(a.pixels >= 1 && a.pixels < int64_t{1} << 31, "pixels: expected 1 to 2^31 - 1");
    require((a.fourier == nullptr) != (a.x == nullptr), "x: expected either x or fourier");
    require(a.fourier == nullptr || a.coords != nullptr || a.grid_columns > 0, "coords: expected coords or a grid");
    require(a.negative_slope < 1.0f, "negative_slope: expected less than 1");
    require_aligned(a.rgb, "rgb", 4);
    const bool counted = a.noise_mode == NoiseMode::kIndex || a.noise_mode == NoiseMode::kCoords;
    if (counted) require_aligned(a.seed, "seed", 8);
    require(a.noise_mode != NoiseMode::kCoords || a.coords != nullptr || a.grid_columns > 0,
            "coords: expected coords or a grid");
    if (a.noise_mode == NoiseMode::kGiven) require_aligned(a.noise, "noise", 4);
    if (a.coords != nullptr) require_aligned(a.coords, "coords", 8);
    if (a.x != nullptr) {
        require_aligned(a.x, "x", 16);
        require(a.x_row_stride % 16 == 0 && a.x_batch_stride % 16 == 0, "x: expected strides of 16 bytes");
        require(a.x_row_stride >= plan.register_slabs() * kSlab * 2, "x: expected rows padded to 64 channels");
    }
    require((plan.styles > 0) == (a.blend != nullptr), "blend: expected weights if and only if the plan has styles");
    if (a.blend != nullptr) require_aligned(a.blend, "blend", 8);
    StackParams p{};
    p.slabs = static_cast<const char*>(a.slabs);
    p.slab_stride = plan.styles > 0 ? 0 : plan.slab_bytes;
    p.records = static_cast<const char*>(a.records);
    p.record_stride = plan.record_bytes;
    p.rgb_bias = a.rgb_bias;
    p.fourier = static_cast<const float4*>(a.fourier);
    p.fourier_stride = static_cast<int32_t>(plan.fourier_floats() / 4);
    p.blend = a.blend;
    p.blend_batch_stride = a.blend_batch_stride;
    p.x = static_cast<const char*>(a.x);
    p.x_batch_stride = a.x_batch_stride;
    p.x_row_stride = a.x_row_stride;
    require(!plan.has_blocks || a.kept != nullptr, "kept: expected memory for the inputs of residual blocks");
    if (a.kept != nullptr) require_aligned(a.kept, "kept", 16);
    p.kept = static_cast<char*>(a.kept);
    p.places = {a.coords, a.coords_batch_stride, a.grid_rows, a.grid_columns, a.first_pixel, a.pixels};
    p.seed = a.seed;
    p.noise = a.noise;
    p.noise_layer_stride = a.noise_layer_stride;
    p.noise_batch_stride = a.noise_batch_stride;
    p.rgb = a.rgb;
    p.rgb_batch_stride = a.rgb_batch_stride;
    p.rgb_pixel_stride = a.rgb_pixel_stride;
    p.rgb_channel_stride = a.rgb_channel_stride;
    const int64_t groups = (a.pixels + kGroupPixels - 1) / kGroupPixels;
    require(groups * plan.batch < int64_t{1} << 31, "pixels: more units of work than 2^31");
    p.groups = static_cast<int32_t>(groups);
    p.images = static_cast<int32_t>(plan.batch);
    p.units = static_cast<int32_t>(groups * plan.batch);
    p.noise_mode = static_cast<StackNoise>(a.noise_mode);
    p.first_image = static_cast<int32_t>(a.first_image);
    p.first_layer = static_cast<int32_t>(a.first_layer);
    p.channels = static_cast<int32_t>(plan.channels);
    p.depth = static_cast<int32_t>(plan.layers.size());
    p.register_slabs = static_cast<int32_t>(plan.register_slabs());
    p.streamed_slabs = static_cast<int32_t>(plan.streamed_slabs());
    p.image_slabs = static_cast<int32_t>(plan.image_slabs);
    p.image_records = static_cast<int32_t>(plan.image_records);
    p.input_per_image = a.made.made == nullptr && a.streamed_batch_stride != 0;
    std::copy(plan.layers.begin(), plan.layers.end(), p.layers);

    StackSaved saved{};
    if (a.signs != nullptr) {
        require(!plan.has_blocks && plan.styles == 0, "signs: a forward for training serves neither blocks nor blends");
        for (const StackLayer& l : plan.layers) {
            require(l.out_features % 32 == 0, "out_features: a forward for training takes multiples of 32");
        }
        require_aligned(a.signs, "signs", 8);
        require_aligned(a.features, "features", 16);
        if (plan.layers.size() > 1) require_aligned(a.activations, "activations", 16);
        saved.signs = static_cast<uint2*>(a.signs);
        saved.image_chunks = static_cast<int32_t>(plan.image_records);
    }

    if (a.made.made != nullptr) {
        require(a.signs == nullptr, "made: a forward for training makes no rows");
        p.made = made_rows(plan, a);
    } else {
        require(plan.styles == 0 || plan.streamed_inputs == 0,
                "made: expected memory for the streamed input times each pixel's style");
    }

    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    const bool bfloat16 = a.dtype == DType::kBFloat16;
    TensorMap map{};
    if (a.made.made != nullptr) {
        const auto kernel = plan.styles > 0 ? stack_blend_kernel(bfloat16) : stack_kernel(bfloat16);
        const int64_t rows = int64_t{kMadeBuffers} * kGroupPixels *
                             resident_clusters(reinterpret_cast<const void*>(kernel), target.device);
        map = make_tensor_map(a.made.made, 1, rows, plan.streamed_inputs, rows * p.made.row_bytes, p.made.row_bytes,
                              kWarpgroupPixels, bfloat16);
    } else if (plan.streamed_inputs > 0) {
        require_aligned(a.streamed, "streamed", 16);
        const bool shared = a.streamed_batch_stride == 0;
        map = make_tensor_map(a.streamed, shared ? 1 : plan.batch, a.pixels, plan.streamed_inputs,
                              shared ? a.pixels * a.streamed_row_stride : a.streamed_batch_stride,
                              a.streamed_row_stride, kWarpgroupPixels, bfloat16);
    }
    if (a.signs != nullptr) {
        for (const StackLayer& l : plan.layers) {
            char* output = static_cast<char*>(a.activations) + 2 * plan.batch * a.pixels * l.bias_offset;
            if (&l == &plan.layers.back()) output = static_cast<char*>(a.features);
            saved.outputs[l.number] = make_store_map(output, plan.batch, a.pixels, l.out_features, bfloat16);
        }
    }
    const float slope = a.negative_slope / (1.0f - a.negative_slope);
    p.slope_pair = bfloat16 ? pair_of<__nv_bfloat16>(slope) : pair_of<__half>(slope);
    p.half_pair = bfloat16 ? pair_of<__nv_bfloat16>(kSqrtHalf) : pair_of<__half>(kSqrtHalf);
    launch_forward(p, map, saved, bfloat16, target.device, stream);
}

}  // namespace cips
