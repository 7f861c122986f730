// Modulated weights of a whole stack: plain structs in, launches out. No CUDA header, no Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "tile/matrix_table.h"

namespace cips {

/// One matrix as the caller's packing lays it out. Offsets and strides are in elements.
struct MatrixShape {
    int64_t out_features;
    int64_t in_features;
    int64_t weight_offset;  // in the flat weights, [O, I] without gaps
    int64_t style_offset;   // column in the styles [B, S]
    int64_t mod_offset;     // in mods and grad_mods, [B, O, row_stride]; a multiple of 16
    int64_t row_stride;     // in_features rounded up to a multiple of 16
    bool demodulate;
};

/// Everything that depends on shapes alone; made once for a stack and batch size.
struct ModulatePlan {
    int64_t batch;
    int64_t scratch_numel;  // floats of scratch that the backward needs
    MatrixTable forward;
    MatrixTable backward_weights;
    MatrixTable backward_styles;
};

/// Throws std::invalid_argument, naming the argument, for 0 or more than kMaxMatrices matrices, a batch or
/// size below 1, a stride or offset that breaks the rules above, or more tiles than one launch can hold.
ModulatePlan make_modulate_plan(const std::vector<MatrixShape>& matrices, int64_t batch);

enum class DType { kFloat32, kFloat16, kBFloat16 };

/// Where a launch runs: a device index and one of its streams (a cudaStream_t; 0 is the default stream).
struct Target {
    int device;
    uintptr_t stream;
};

struct ModulateForward {
    const float* weights;
    const float* styles;  // [B, style_stride]
    int64_t style_stride;
    void* mods;   // 16-byte aligned
    DType dtype;  // of mods
    float eps;
};

struct ModulateBackward {
    const float* grad_mods;  // 16-byte aligned
    const float* weights;
    const float* styles;
    int64_t style_stride;
    float* scratch;  // plan.scratch_numel floats, 16-byte aligned
    float* grad_weights;
    float* grad_styles;
    int64_t grad_style_stride;
    float eps;
};

/// Writes every row of every matrix, padding columns as zeros. One launch.
/// Throws std::invalid_argument for bad arguments, std::runtime_error with CUDA's words when CUDA refuses.
void modulate_forward(const ModulatePlan& plan, const ModulateForward& arguments, Target target);

/// Writes grad_weights and grad_styles wherever a matrix has elements. Two launches, no atomics: the same
/// bits always. Throws like modulate_forward.
void modulate_backward(const ModulatePlan& plan, const ModulateBackward& arguments, Target target);

}  // namespace cips
