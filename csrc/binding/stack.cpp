// Binding of the on-chip stack: addresses as integers, strides as the launcher wants them.

#include "binding/stack.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "launch/affine.h"
#include "launch/mapping.h"
#include "launch/stack.h"
#include "launch/table_lookup.h"

namespace py = pybind11;

namespace cips {
namespace {

using BlockTuple = std::tuple<int64_t, int64_t, int64_t>;
using MadeTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t, bool>;
using MatrixTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

std::vector<StackMatrix> matrices(const std::vector<MatrixTuple>& tuples)
{
    std::vector<StackMatrix> result;
    for (const auto& [out, in, weight, style, bias] : tuples) result.push_back({out, in, weight, style, bias});
    return result;
}

NoiseMode parse_noise(const std::string& name)
{
    if (name == "off") return NoiseMode::kNone;
    if (name == "index") return NoiseMode::kIndex;
    if (name == "coords") return NoiseMode::kCoords;
    if (name == "given") return NoiseMode::kGiven;
    throw std::invalid_argument("noise_mode: '" + name + "' came, expected 'off', 'index', 'coords' or 'given'");
}

void pack(const StackPlan& plan, uintptr_t weights, uintptr_t styles, int64_t style_stride, int64_t kind_stride,
          uintptr_t biases, uintptr_t strengths, uintptr_t fourier_weight, uintptr_t fourier_bias, uintptr_t slabs,
          uintptr_t records, uintptr_t fourier, uintptr_t row_styles, uintptr_t rgb_bias, const std::string& dtype,
          float eps, float gain, float negative_slope, bool demodulate, int device, uintptr_t stream)
{
    StackPack a{};
    a.weights = pointer<const float>(weights);
    a.styles = pointer<const float>(styles);
    a.style_stride = style_stride;
    a.kind_stride = kind_stride;
    a.biases = pointer<const float>(biases);
    a.strengths = pointer<const float>(strengths);
    a.fourier_weight = pointer<const float>(fourier_weight);
    a.fourier_bias = pointer<const float>(fourier_bias);
    a.slabs = pointer<void>(slabs);
    a.records = pointer<void>(records);
    a.fourier = pointer<void>(fourier);
    a.row_styles = pointer<void>(row_styles);
    a.rgb_bias = pointer<float>(rgb_bias);
    a.dtype = parse_dtype(dtype);
    a.eps = eps;
    a.gain = gain;
    a.negative_slope = negative_slope;
    a.demodulate = demodulate;
    stack_pack(plan, a, {device, stream});
}

void forward(const StackPlan& plan, uintptr_t slabs, uintptr_t records, uintptr_t fourier, uintptr_t rgb_bias,
             uintptr_t blend, int64_t blend_batch_stride, uintptr_t x, std::tuple<int64_t, int64_t> x_strides,
             uintptr_t streamed, std::tuple<int64_t, int64_t> streamed_strides, const MadeTuple& made, uintptr_t coords,
             int64_t coords_batch_stride, std::tuple<int64_t, int64_t> grid, int64_t first_pixel,
             const std::string& noise_mode, uintptr_t seed, uintptr_t noise, std::tuple<int64_t, int64_t> noise_strides,
             int64_t first_image, int64_t first_layer, uintptr_t kept, uintptr_t activations, uintptr_t features,
             uintptr_t signs, uintptr_t rgb, std::tuple<int64_t, int64_t, int64_t> rgb_strides, int64_t pixels,
             const std::string& dtype, float negative_slope, int device, uintptr_t stream)
{
    StackForward a{};
    a.slabs = pointer<const void>(slabs);
    a.records = pointer<const void>(records);
    a.fourier = pointer<const void>(fourier);
    a.rgb_bias = pointer<const float>(rgb_bias);
    a.blend = pointer<const float>(blend);
    a.blend_batch_stride = blend_batch_stride;
    a.x = pointer<const void>(x);
    std::tie(a.x_batch_stride, a.x_row_stride) = x_strides;
    a.streamed = pointer<const void>(streamed);
    std::tie(a.streamed_batch_stride, a.streamed_row_stride) = streamed_strides;
    uintptr_t memory, source, styles;
    std::tie(memory, source, a.made.source_batch_stride, a.made.source_row_stride, styles, a.made.rows, a.made.columns,
             a.made.exact) = made;
    a.made.made = pointer<void>(memory);
    a.made.source = pointer<const void>(source);
    a.made.styles = pointer<const void>(styles);
    a.coords = pointer<const float>(coords);
    a.coords_batch_stride = coords_batch_stride;
    std::tie(a.grid_rows, a.grid_columns) = grid;
    a.first_pixel = first_pixel;
    a.noise_mode = parse_noise(noise_mode);
    a.seed = pointer<const int64_t>(seed);
    a.noise = pointer<const float>(noise);
    std::tie(a.noise_layer_stride, a.noise_batch_stride) = noise_strides;
    a.first_image = first_image;
    a.first_layer = first_layer;
    a.kept = pointer<void>(kept);
    a.activations = pointer<void>(activations);
    a.features = pointer<void>(features);
    a.signs = pointer<void>(signs);
    a.rgb = pointer<float>(rgb);
    std::tie(a.rgb_batch_stride, a.rgb_pixel_stride, a.rgb_channel_stride) = rgb_strides;
    a.pixels = pixels;
    a.dtype = parse_dtype(dtype);
    a.negative_slope = negative_slope;
    stack_forward(plan, a, {device, stream});
}

void lookup(uintptr_t table, const std::string& table_dtype, int64_t rows, int64_t columns, int64_t features,
            uintptr_t coords, int64_t coords_batch_stride, std::tuple<int64_t, int64_t> grid, int64_t first_pixel,
            bool exact, uintptr_t out, const std::string& out_dtype, int64_t row_stride, int64_t images, int64_t pixels,
            int device, uintptr_t stream)
{
    TableLookup a{};
    a.table = pointer<const void>(table);
    a.table_dtype = parse_dtype(table_dtype);
    a.rows = rows;
    a.columns = columns;
    a.features = features;
    a.coords = pointer<const float>(coords);
    a.coords_batch_stride = coords_batch_stride;
    std::tie(a.grid_rows, a.grid_columns) = grid;
    a.first_pixel = first_pixel;
    a.exact = exact;
    a.out = pointer<void>(out);
    a.out_dtype = parse_dtype(out_dtype);
    a.row_stride = row_stride;
    a.images = images;
    a.pixels = pixels;
    table_lookup(a, {device, stream});
}

void mapping(uintptr_t z, uintptr_t weights, uintptr_t biases, uintptr_t w, int64_t vectors, int64_t layers,
             int64_t dim, float negative_slope, int device, uintptr_t stream)
{
    mapping_forward({pointer<const float>(z), pointer<const float>(weights), pointer<const float>(biases),
                     pointer<float>(w), vectors, layers, dim, negative_slope},
                    {device, stream});
}

void affine(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, int64_t vectors, int64_t rows, int64_t dim,
            uintptr_t current, int64_t current_bytes, uintptr_t upcoming, int64_t upcoming_bytes, bool overlaps,
            int device, uintptr_t stream)
{
    affine_forward({pointer<const float>(x), pointer<const float>(weight), pointer<const float>(bias),
                    pointer<float>(y), vectors, rows, dim, pointer<const void>(current), current_bytes,
                    pointer<const void>(upcoming), upcoming_bytes, overlaps},
                   {device, stream});
}

}  // namespace

void bind_stack(py::module_& module)
{
    module.attr("stack_register_inputs") = kRegisterInputs;
    module.attr("stack_max_blend") = kMaxBlend;
    py::class_<StackPlan>(module, "StackPlan", py::module_local(), "Slabs and records of one stack and batch size.")
        .def(py::init([](const std::vector<MatrixTuple>& layers, const std::vector<MatrixTuple>& rgbs,
                         const std::vector<int64_t>& rgb_after, const std::vector<BlockTuple>& blocks,
                         int64_t register_inputs, int64_t batch, int64_t styles) {
                 std::vector<StackBlock> list;
                 for (const auto& [first, last, weight] : blocks) list.push_back({first, last, weight});
                 return make_stack_plan(matrices(layers), matrices(rgbs), rgb_after, list, register_inputs, batch,
                                        styles);
             }),
             py::arg("layers"), py::arg("rgbs"), py::arg("rgb_after"), py::arg("blocks"), py::arg("register_inputs"),
             py::arg("batch"), py::arg("styles") = 0,
             "layers, rgbs: tuples (out_features, in_features, weight_offset, style_offset, bias_offset) in elements. "
             "blocks: residual blocks (first layer, last layer, weight_offset of the skip or -1 for the identity). "
             "styles: "
             "how many a pixel's style is a blend of; 0: one an image.")
        .def_readonly("slab_bytes", &StackPlan::slab_bytes, "Bytes of an image's slabs.")
        .def_property_readonly("fourier_floats", &StackPlan::fourier_floats, "Floats of packed Fourier weights.")
        .def_readonly("record_bytes", &StackPlan::record_bytes, "Bytes of an image's records.")
        .def("sign_bytes", &StackPlan::sign_bytes, py::arg("pixels"), "Bytes of the signs that training keeps.");
    module.def("stack_pack", &pack, py::arg("plan"), py::kw_only(), py::arg("weights"), py::arg("styles"),
               py::arg("style_stride"), py::arg("kind_stride") = 0, py::arg("biases"), py::arg("strengths"),
               py::arg("fourier_weight"), py::arg("fourier_bias"), py::arg("slabs"), py::arg("records"),
               py::arg("fourier"), py::arg("row_styles") = 0, py::arg("rgb_bias"), py::arg("dtype"), py::arg("eps"),
               py::arg("gain"), py::arg("negative_slope"), py::arg("demodulate"), py::arg("device"), py::arg("stream"),
               py::call_guard<py::gil_scoped_release>(), "Write what stack_forward reads of parameters and styles.");
    module.def(
        "stack_kept_bytes",
        [](const std::string& dtype, int device) { return stack_kept_bytes(parse_dtype(dtype), device); },
        py::arg("dtype"), py::arg("device"), "Bytes that stack_forward needs for the inputs of residual blocks.");
    module.def(
        "stack_made_bytes",
        [](int64_t streamed_inputs, const std::string& dtype, int device) {
            return stack_made_bytes(streamed_inputs, parse_dtype(dtype), device);
        },
        py::arg("streamed_inputs"), py::arg("dtype"), py::arg("device"),
        "Bytes that stack_forward needs for rows of a streamed input that it makes itself.");
    module.def("stack_forward", &forward, py::arg("plan"), py::kw_only(), py::arg("slabs"), py::arg("records"),
               py::arg("fourier"), py::arg("rgb_bias"), py::arg("blend") = 0, py::arg("blend_batch_stride") = 0,
               py::arg("x"), py::arg("x_strides"), py::arg("streamed"), py::arg("streamed_strides"),
               py::arg("made") = MadeTuple(), py::arg("coords"), py::arg("coords_batch_stride"), py::arg("grid"),
               py::arg("first_pixel"), py::arg("noise_mode"), py::arg("seed"), py::arg("noise"),
               py::arg("noise_strides"), py::arg("first_image"), py::arg("first_layer"), py::arg("kept"),
               py::arg("activations") = 0, py::arg("features") = 0, py::arg("signs") = 0, py::arg("rgb"),
               py::arg("rgb_strides"), py::arg("pixels"), py::arg("dtype"), py::arg("negative_slope"),
               py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
               "The RGB sums of every pixel. made: (memory, source, bytes of an image and of a row, styles, rows, "
               "columns, exact) of "
               "streamed input that the kernel makes itself.");
    module.def("table_lookup", &lookup, py::kw_only(), py::arg("table"), py::arg("table_dtype"), py::arg("rows"),
               py::arg("columns"), py::arg("features"), py::arg("coords"), py::arg("coords_batch_stride"),
               py::arg("grid"), py::arg("first_pixel"), py::arg("exact"), py::arg("out"), py::arg("out_dtype"),
               py::arg("row_stride"), py::arg("images"), py::arg("pixels"), py::arg("device"), py::arg("stream"),
               py::call_guard<py::gil_scoped_release>(), "Write the interpolated vectors of every pixel.");
    module.def("mapping_forward", &mapping, py::kw_only(), py::arg("z"), py::arg("weights"), py::arg("biases"),
               py::arg("w"), py::arg("vectors"), py::arg("layers"), py::arg("dim"), py::arg("negative_slope"),
               py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
               "Write w, the output of the mapping network.");
    module.def("affine_forward", &affine, py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
               py::arg("vectors"), py::arg("rows"), py::arg("dim"), py::arg("current"), py::arg("current_bytes"),
               py::arg("upcoming"), py::arg("upcoming_bytes"), py::arg("overlaps"), py::arg("device"),
               py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
               "Write y = W x + b of a few vectors, and bring what the next kernel reads to L2.");
}

}  // namespace cips
