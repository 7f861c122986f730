// The Python module cips_kernels._cuda: addresses as integers, shapes, stream and device in; exceptions out.
// The interpreter lock is released around every launch. std::invalid_argument becomes ValueError, CUDA's
// errors RuntimeError. Callers keep the tensors alive and check what an address cannot show: dtype, size,
// device.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "binding/stack.h"
#include "launch/modulate.h"

namespace py = pybind11;

cips::DType cips::parse_dtype(const std::string& name)
{
    if (name == "float32") return cips::DType::kFloat32;
    if (name == "float16") return cips::DType::kFloat16;
    if (name == "bfloat16") return cips::DType::kBFloat16;
    throw std::invalid_argument("dtype: '" + name + "' came, expected 'float32', 'float16' or 'bfloat16'");
}

namespace {

using cips::parse_dtype;

using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

cips::ModulatePlan make_plan(const std::vector<ShapeTuple>& tuples, int64_t batch)
{
    std::vector<cips::MatrixShape> matrices;
    for (const auto& [out, in, weight, style, mod, stride, demodulate] : tuples) {
        matrices.push_back({out, in, weight, style, mod, stride, demodulate});
    }
    return cips::make_modulate_plan(matrices, batch);
}

const float* input(uintptr_t address)
{
    return reinterpret_cast<const float*>(address);
}

float* output(uintptr_t address)
{
    return reinterpret_cast<float*>(address);
}

void modulate_forward(const cips::ModulatePlan& plan, uintptr_t weights, uintptr_t styles, int64_t style_stride,
                      uintptr_t mods, const std::string& dtype, float eps, int device, uintptr_t stream)
{
    const cips::ModulateForward arguments{
        input(weights), input(styles), style_stride, reinterpret_cast<void*>(mods), parse_dtype(dtype), eps};
    cips::modulate_forward(plan, arguments, {device, stream});
}

void modulate_backward(const cips::ModulatePlan& plan, uintptr_t grad_mods, uintptr_t weights, uintptr_t styles,
                       int64_t style_stride, uintptr_t scratch, uintptr_t grad_weights, uintptr_t grad_styles,
                       int64_t grad_style_stride, float eps, int device, uintptr_t stream)
{
    const cips::ModulateBackward arguments{input(grad_mods),    input(weights),    input(styles),
                                           style_stride,        output(scratch),   output(grad_weights),
                                           output(grad_styles), grad_style_stride, eps};
    cips::modulate_backward(plan, arguments, {device, stream});
}

int runtime_version()
{
    int version = 0;
    const cudaError_t code = cudaRuntimeGetVersion(&version);
    if (code != cudaSuccess) throw std::runtime_error(std::string("cudaRuntimeGetVersion: ") + cudaGetErrorName(code));
    return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, module)
{
    module.doc() = "Launches of the CUDA kernels in csrc/. Importing it needs no driver.";
    module.attr("architectures") = py::make_tuple(CIPS_ARCHITECTURES);
    module.attr("max_matrices") = cips::kMaxMatrices;
    module.def("runtime_version", &runtime_version, "Version of the CUDA runtime linked in, as 1000 major + 10 minor.");

    py::class_<cips::ModulatePlan>(module, "ModulatePlan", py::module_local(),
                                   "Tiles of one stack and batch size, made once.")
        .def(py::init(&make_plan), py::arg("matrices"), py::arg("batch"),
             "matrices: tuples (out_features, in_features, weight_offset, style_offset, mod_offset, "
             "row_stride, demodulate), offsets in elements.")
        .def_readonly("batch", &cips::ModulatePlan::batch)
        .def_readonly("scratch_numel", &cips::ModulatePlan::scratch_numel, "Floats of scratch for modulate_backward.");

    module.def("modulate_forward", &modulate_forward, py::arg("plan"), py::kw_only(), py::arg("weights"),
               py::arg("styles"), py::arg("style_stride"), py::arg("mods"), py::arg("dtype"), py::arg("eps"),
               py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
               "Write the modulated weights of every matrix. dtype: of mods.");
    module.def("modulate_backward", &modulate_backward, py::arg("plan"), py::kw_only(), py::arg("grad_mods"),
               py::arg("weights"), py::arg("styles"), py::arg("style_stride"), py::arg("scratch"),
               py::arg("grad_weights"), py::arg("grad_styles"), py::arg("grad_style_stride"), py::arg("eps"),
               py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
               "Write the gradients of the weights and styles from that of the modulated weights.");

    cips::bind_stack(module);
    cips::bind_chain(module);
    cips::bind_wgrad(module);
}
