// Checks a packing and lays its matrices out as tiles. Plain C++: tested without a GPU.

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "launch/modulate.h"

namespace cips {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

int64_t divide_up(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

void require(bool holds, const std::string& name, int64_t came, const std::string& expected)
{
    if (!holds) throw std::invalid_argument(name + ": " + std::to_string(came) + " came, expected " + expected);
}

void check(const MatrixShape& m, const std::string& name)
{
    require(m.out_features >= 1 && m.out_features <= kMaxInt, name + ".out_features", m.out_features, "1 to 2^31 - 1");
    require(m.in_features >= 1 && m.in_features <= kMaxInt - 16, name + ".in_features", m.in_features,
            "1 to 2^31 - 17");
    require(m.row_stride >= m.in_features && m.row_stride % 16 == 0 && m.row_stride <= kMaxInt, name + ".row_stride",
            m.row_stride, "a multiple of 16, at least in_features = " + std::to_string(m.in_features));
    // Wider padding would lie outside the last column tile, and nobody would write it.
    require(m.row_stride < m.in_features + 16, name + ".row_stride", m.row_stride,
            "in_features rounded up to a multiple of 16");
    require(m.weight_offset >= 0, name + ".weight_offset", m.weight_offset, "at least 0");
    require(m.style_offset >= 0 && m.style_offset <= kMaxInt, name + ".style_offset", m.style_offset, "0 to 2^31 - 1");
    require(m.mod_offset >= 0 && m.mod_offset % 16 == 0, name + ".mod_offset", m.mod_offset,
            "a multiple of 16, at least 0");
}

MatrixEntry make_entry(const MatrixShape& m, int64_t partial_offset)
{
    MatrixEntry entry{};
    entry.weight_offset = m.weight_offset;
    entry.mod_offset = m.mod_offset;
    entry.partial_offset = partial_offset;
    entry.style_offset = static_cast<int32_t>(m.style_offset);
    entry.out_features = static_cast<int32_t>(m.out_features);
    entry.in_features = static_cast<int32_t>(m.in_features);
    entry.row_stride = static_cast<int32_t>(m.row_stride);
    entry.row_blocks = static_cast<int32_t>(divide_up(m.out_features, kTileRows));
    entry.column_blocks = static_cast<int32_t>(divide_up(m.in_features, kTileColumns));
    entry.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(m.in_features)));
    entry.demodulate = m.demodulate;
    entry.vectorizable = m.in_features % 4 == 0 && m.weight_offset % 4 == 0 && m.style_offset % 4 == 0;
    return entry;
}

/// Counts tiles into first_tile; a launch has at most 2^31 - 1 blocks.
template <typename Tiles>
void number_tiles(MatrixTable& table, Tiles tiles_of)
{
    int64_t total = 0;
    for (int index = 0; index < table.count; ++index) {
        table.first_tile[index] = static_cast<int32_t>(total);
        total += tiles_of(table.entries[index]);
        require(total <= kMaxInt, "matrices: tiles", total, "at most 2^31 - 1 for all matrices and images together");
    }
    table.first_tile[table.count] = static_cast<int32_t>(total);
}

}  // namespace

ModulatePlan make_modulate_plan(const std::vector<MatrixShape>& matrices, int64_t batch)
{
    const auto count = static_cast<int64_t>(matrices.size());
    require(count >= 1 && count <= kMaxMatrices, "matrices", count, "1 to " + std::to_string(kMaxMatrices));
    require(batch >= 1 && batch <= kMaxInt - kForwardImages, "batch", batch, "at least 1 and less than 2^31 - 4");

    ModulatePlan plan{};
    plan.batch = batch;
    plan.forward.count = static_cast<int32_t>(count);
    for (int64_t index = 0; index < count; ++index) {
        const MatrixShape& shape = matrices[index];
        check(shape, "matrices[" + std::to_string(index) + "]");
        const MatrixEntry entry = make_entry(shape, plan.scratch_numel);
        plan.forward.entries[index] = entry;
        plan.scratch_numel += entry.row_blocks * batch * entry.row_stride;
    }
    plan.backward_weights = plan.forward;
    plan.backward_styles = plan.forward;
    number_tiles(plan.forward, [&](const MatrixEntry& m) {
        return int64_t{m.row_blocks} * m.column_blocks * divide_up(batch, kForwardImages);
    });
    number_tiles(plan.backward_weights, [&](const MatrixEntry& m) { return int64_t{m.row_blocks} * m.column_blocks; });
    number_tiles(plan.backward_styles,
                 [&](const MatrixEntry& m) { return batch * divide_up(m.in_features, kStyleColumns); });
    return plan;
}

}  // namespace cips
