// Which matrix a block works on.
#pragma once

#include "tile/matrix_table.h"

namespace cips {

/// Index of the matrix that `tile` belongs to: at most six dependent loads from the constant bank.
__device__ __forceinline__ int find_matrix(const MatrixTable& table, int tile)
{
    int low = 0;
    int high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.first_tile[middle] <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace cips
