// Binding of the chain of gradients of the on-chip stack.

#include "launch/stack_chain.h"

#include "binding/stack.h"

namespace py = pybind11;

namespace cips {
namespace {

void pack(const ChainPlan& plan, uintptr_t weights, uintptr_t styles, int64_t style_stride, uintptr_t slabs,
          uintptr_t records, const std::string& dtype, float eps, float gain, bool demodulate, int device,
          uintptr_t stream)
{
    chain_pack(plan,
               {pointer<const float>(weights), pointer<const float>(styles), style_stride, pointer<void>(slabs),
                pointer<void>(records), parse_dtype(dtype), eps, gain, demodulate},
               {device, stream});
}

void backward(const ChainPlan& plan, uintptr_t slabs, uintptr_t records, uintptr_t drgb, uintptr_t signs,
              uintptr_t first, uintptr_t u, uintptr_t colours, uintptr_t bias_parts, uintptr_t noise_rows,
              int64_t noise_stride, int64_t images, int64_t pixels, const std::string& dtype, float gain,
              float negative_slope, int device, uintptr_t stream)
{
    chain_backward(plan,
                   {pointer<const void>(slabs), pointer<const void>(records), pointer<const float>(drgb),
                    pointer<const void>(signs), pointer<void>(first), pointer<void>(u), pointer<void>(colours),
                    pointer<float>(bias_parts), pointer<float>(noise_rows), noise_stride, images, pixels,
                    parse_dtype(dtype), gain, negative_slope},
                   {device, stream});
}

}  // namespace

void bind_chain(py::module_& module)
{
    py::class_<ChainPlan>(module, "ChainPlan", py::module_local(), "The layers of a StackPlan from last to first.")
        .def(py::init(&make_chain_plan), py::arg("plan"), "plan: without residual blocks and blends.")
        .def_readonly("slab_bytes", &ChainPlan::slab_bytes, "Bytes of an image's slabs.")
        .def_readonly("record_bytes", &ChainPlan::record_bytes, "Bytes of an image's records.")
        .def_readonly("image_chunks", &ChainPlan::image_chunks, "Chunks of 128 channels of all layers.");
    module.def(
        "chain_warps", [](const std::string& dtype, int device) { return chain_warps(parse_dtype(dtype), device); },
        py::arg("dtype"), py::arg("device"), "Rows of chain_backward's bias_parts.");
    module.def("chain_pack", &pack, py::arg("plan"), py::kw_only(), py::arg("weights"), py::arg("styles"),
               py::arg("style_stride"), py::arg("slabs"), py::arg("records"), py::arg("dtype"), py::arg("eps"),
               py::arg("gain"), py::arg("demodulate"), py::arg("device"), py::arg("stream"),
               py::call_guard<py::gil_scoped_release>(), "Write what chain_backward reads of parameters and styles.");
    module.def("chain_backward", &backward, py::arg("plan"), py::kw_only(), py::arg("slabs"), py::arg("records"),
               py::arg("drgb"), py::arg("signs"), py::arg("first"), py::arg("u"), py::arg("colours"),
               py::arg("bias_parts"), py::arg("noise_rows"), py::arg("noise_stride"), py::arg("images"),
               py::arg("pixels"), py::arg("dtype"), py::arg("gain"), py::arg("negative_slope"), py::arg("device"),
               py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
               "Write the gradients at every layer's sums, over the gain, and the parts of bias and noise gradients.");
}

}  // namespace cips
