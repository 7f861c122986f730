// Launch of the table lookup.

#include "launch/table_lookup.h"

#include "kernels/table_lookup.cuh"
#include "launch/cuda_guard.h"
#include "launch/requirements.h"

namespace cips {
namespace {

template <typename T, typename Out>
void launch(const TableLookupParams& params, int64_t images, cudaStream_t stream)
{
    constexpr int64_t kPixels = kLookupThreads / 32 * kLookupPixels;
    const dim3 grid(static_cast<unsigned>((params.places.pixels + kPixels - 1) / kPixels),
                    static_cast<unsigned>(images));
    table_lookup_kernel<T, Out><<<grid, kLookupThreads, 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "launch of table_lookup_kernel");
}

template <typename Out>
void launch(const TableLookupParams& params, DType table, int64_t images, cudaStream_t stream)
{
    if (table == DType::kFloat32) {
        launch<float, Out>(params, images, stream);
    } else {
        launch<Out, Out>(params, images, stream);
    }
}

}  // namespace

void table_lookup(const TableLookup& a, Target target)
{
    require(a.table != nullptr, "table: a null address came");
    require(a.rows >= 1 && a.columns >= 1 && a.features >= 1, "table: expected at least one entry of one channel");
    require(a.rows < 1 << 24 && a.columns < 1 << 24, "table: expected sides below 2^24, which float32 counts exactly");
    require(a.features < 1 << 30, "table: too many channels");
    require(a.out != nullptr && reinterpret_cast<uintptr_t>(a.out) % 16 == 0, "out: address is not a multiple of 16");
    require(a.row_stride % 8 == 0 && a.row_stride >= a.features,
            "row_stride: expected a multiple of 8 that holds a row");
    require(a.coords != nullptr || (a.grid_rows >= 1 && a.grid_columns >= 1), "coords: expected coords or a grid");
    require(a.images >= 1 && a.images <= 65535, "images: expected 1 to 65535");
    require(a.pixels >= 1 && a.pixels < int64_t{1} << 31, "pixels: expected 1 to 2^31 - 1");
    require(a.out_dtype != DType::kFloat32 && (a.table_dtype == DType::kFloat32 || a.table_dtype == a.out_dtype),
            "dtype: expected a table of float32 or of the result's 16-bit dtype");
    TableLookupParams p{};
    p.table = a.table;
    p.rows = a.rows;
    p.columns = a.columns;
    p.features = static_cast<int32_t>(a.features);
    p.vectors = a.features % 8 == 0 && reinterpret_cast<uintptr_t>(a.table) % 16 == 0;
    p.exact = a.exact;
    p.places = {a.coords, a.coords_batch_stride, a.grid_rows, a.grid_columns, a.first_pixel, a.pixels};
    p.out = a.out;
    p.row_stride = a.row_stride;
    p.batch_stride = a.row_stride * a.pixels;

    const DeviceGuard guard(target.device);
    const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
    if (a.out_dtype == DType::kBFloat16) {
        launch<__nv_bfloat16>(p, a.table_dtype, a.images, stream);
    } else {
        launch<__half>(p, a.table_dtype, a.images, stream);
    }
}

}  // namespace cips
