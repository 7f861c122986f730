// Binding of the weight gradients of the on-chip stack.

#include <pybind11/stl.h>

#include <tuple>

#include "binding/stack.h"
#include "launch/stack_wgrad.h"
#include "tile/wgrad_params.h"

namespace py = pybind11;

namespace cips {
namespace {

/// u, its planes, out_features; x, its planes, plane and row stride in bytes, in_features; row_stride, fragments, scale
using RunTuple =
    std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, float>;

void wgrad(const std::vector<RunTuple>& runs, uintptr_t items, uintptr_t first_items, int64_t clusters, uintptr_t sums,
           int64_t sum_count, uintptr_t n, uintptr_t pieces, uintptr_t colour_parts, uintptr_t colours,
           int64_t padded_pixels, int64_t channels, float colour_scale, int64_t pixels, const std::string& dtype,
           int device, uintptr_t stream)
{
    Wgrad arguments{};
    for (const auto& [u, u_planes, out, x, x_planes, plane, row, in, stride, fragments, scale] : runs) {
        arguments.runs.push_back({pointer<const void>(u), pointer<const void>(x), u_planes, x_planes, plane, row, out,
                                  in, stride, fragments, scale});
    }
    arguments.items = pointer<const void>(items);
    arguments.first_items = pointer<const int32_t>(first_items);
    arguments.clusters = clusters;
    arguments.sums = pointer<const void>(sums);
    arguments.sum_count = sum_count;
    arguments.n = pointer<float>(n);
    arguments.pieces = pointer<float>(pieces);
    arguments.colour_parts = pointer<float>(colour_parts);
    arguments.colours = pointer<const void>(colours);
    arguments.padded_pixels = padded_pixels;
    arguments.channels = channels;
    arguments.colour_scale = colour_scale;
    arguments.pixels = pixels;
    arguments.dtype = parse_dtype(dtype);
    stack_wgrad(arguments, {device, stream});
}

}  // namespace

void bind_wgrad(py::module_& module)
{
    module.attr("WGRAD_RUNS") = kWgradRuns;
    module.attr("WGRAD_TILE") = kWgradTile;
    module.attr("WGRAD_PIXELS") = kWgradPixels;
    module.attr("WGRAD_STEPS") = kWgradSteps;
    module.def(
        "wgrad_clusters",
        [](const std::string& dtype, int device) { return wgrad_clusters(parse_dtype(dtype), device); },
        py::arg("dtype"), py::arg("device"), "Clusters that fit at once.");
    module.def(
        "stack_wgrad", &wgrad, py::kw_only(), py::arg("runs"), py::arg("items"), py::arg("first_items"),
        py::arg("clusters"), py::arg("sums"), py::arg("sum_count"), py::arg("n"), py::arg("pieces"),
        py::arg("colour_parts"), py::arg("colours"), py::arg("padded_pixels"), py::arg("channels"),
        py::arg("colour_scale"), py::arg("pixels"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Write the gradients of the modulated weights that the items name. A run is (u, planes, out_features, x, "
        "planes, plane and row stride in bytes, in_features, row_stride, fragments, scale).");
}

}  // namespace cips
