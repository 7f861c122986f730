// The plan of a plain stack, for tests that pack one on the host.
#pragma once

#include "launch/stack.h"

namespace host {

/// `depth` layers with one ToRGB of three channels after the last; weights, styles and biases in order.
inline cips::StackPlan plain_stack(const int64_t* widths, int depth, int64_t held, int64_t batch, int64_t styles)
{
    std::vector<cips::StackMatrix> layers;
    int64_t weight = 0, style = 0, bias = 0;
    for (int i = 0; i < depth; ++i) {
        layers.push_back({widths[i + 1], widths[i], weight, style, bias});
        weight += widths[i] * widths[i + 1];
        style += widths[i];
        bias += widths[i + 1];
    }
    return cips::make_stack_plan(layers, {{3, widths[depth], weight, style, bias}}, {depth - 1}, {}, held, batch,
                                 styles);
}

}  // namespace host
