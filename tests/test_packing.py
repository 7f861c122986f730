"""The plan of the flat tensors: nothing overlaps, matrices are aligned, and every view shows its own numbers."""

from __future__ import annotations

import pytest
import torch

from cips_kernels import packing
from cips_kernels.spec import StackSpec
from cips_kernels.testing import poisoned_empty

PLANS = {
    "paper-like": ((24, 17, 33, 16), (0, 2), 3, 2),
    "odd": ((1, 2, 3, 5, 7), (-1, 1, 3, 3), 4, 3),
    "one-layer": ((16, 16), (), 3, 1),
    "one-rgb": ((10,), (-1,), 3, 5),
}


def plan(name: str, demodulate: bool = True) -> packing.Packing:
    widths, rgb_after, channels, batch = PLANS[name]
    return packing.pack(widths, rgb_after, channels, demodulate, batch)


@pytest.mark.parametrize("name", PLANS)
def test_matrices_are_layers_then_rgbs(name):
    widths, rgb_after, channels, batch = PLANS[name]
    found = plan(name)
    assert [(m.in_features, m.out_features) for m in found.layers] == list(zip(widths[:-1], widths[1:]))
    assert [(m.in_features, m.out_features) for m in found.rgbs] == [
        (widths[a + 1], channels) for a in rgb_after
    ]
    assert found.matrices == found.layers + found.rgbs and found.batch == batch
    assert all(m.demodulate for m in found.layers) and not any(m.demodulate for m in found.rgbs)
    assert not any(m.demodulate for m in plan(name, demodulate=False).matrices)
    assert found == StackSpec(widths, rgb_after, channels).packing(batch)


@pytest.mark.parametrize("name", PLANS)
def test_weights_styles_and_biases_are_dense(name):
    found = plan(name)
    weight = style = bias = 0
    for m in found.matrices:
        assert (m.weight_offset, m.style_offset, m.bias_offset) == (weight, style, bias)
        weight, style, bias = (
            weight + m.out_features * m.in_features,
            style + m.in_features,
            bias + m.out_features,
        )
    assert (found.weight_numel, found.style_width, found.bias_numel) == (weight, style, bias)


@pytest.mark.parametrize("name", PLANS)
def test_mods_are_aligned_and_apart(name):
    found, end = plan(name), 0
    for m in found.matrices:
        assert m.row_stride % 16 == 0 and m.in_features <= m.row_stride < m.in_features + 16
        assert m.mod_offset % 128 == 0 and end <= m.mod_offset < end + 128
        end = m.mod_offset + found.batch * m.out_features * m.row_stride
    assert end <= found.mod_numel < end + 128 and found.mod_numel % 128 == 0


@pytest.mark.parametrize("name", PLANS)
def test_views_show_their_own_numbers(name):
    found = plan(name)
    weights, biases = torch.zeros(found.weight_numel), torch.zeros(found.bias_numel)
    styles, mods = torch.zeros(found.batch, found.style_width), torch.zeros(found.mod_numel)
    for k, m in enumerate(found.matrices, start=1):
        views = found.weight(weights, m), found.style(styles, m), found.bias(biases, m), found.mod(mods, m)
        shapes = [(m.out_features, m.in_features), (found.batch, m.in_features), (m.out_features,)]
        assert [tuple(v.shape) for v in views] == [*shapes, (found.batch, m.out_features, m.in_features)]
        for view in views:
            assert (view == 0).all()  # nobody else's
            view.fill_(k)
    # every element of the dense ones belongs to a view; of the padded one, exactly the matrices' elements
    assert (weights > 0).all() and (styles > 0).all() and (biases > 0).all()
    assert int((mods > 0).sum()) == found.batch * found.weight_numel
    last = found.matrices[-1]
    assert mods[last.mod_offset].item() == len(found.matrices)
    assert found.mod(mods, last).stride() == (last.out_features * last.row_stride, last.row_stride, 1)


def test_flatten_joins_in_the_order_of_the_views():
    found = plan("odd")
    parts = [torch.randn(m.out_features, m.in_features) for m in found.matrices]
    flat = packing.flatten(parts, torch.float32)
    for m, part in zip(found.matrices, parts):
        assert torch.equal(found.weight(flat, m), part)
    styles = [torch.randn(3, m.in_features, dtype=torch.float64) for m in found.matrices]
    joined = packing.flatten(styles, torch.float32, dim=1)
    assert joined.dtype == torch.float32
    for m, part in zip(found.matrices, styles):
        assert torch.equal(found.style(joined, m), part.float())


def test_flatten_carries_gradients():
    parts = [torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    flat = packing.flatten(parts, torch.float64)
    sent = torch.arange(10, dtype=torch.float64)
    first, second = torch.autograd.grad(flat, parts, sent)
    assert first.flatten().tolist() == list(range(6)) and second.tolist() == [6, 7, 8, 9]
    (alone,) = torch.autograd.grad(packing.flatten(parts[:1], torch.float32), parts[0], torch.ones(6))
    assert torch.equal(alone, torch.ones(2, 3))


@pytest.mark.parametrize("batch, pixels", [(1, 1), (2, 64), (3, 7), (2, 0)])
@pytest.mark.parametrize("name", PLANS)
def test_activations_are_apart_and_gaps_are_zero(name, batch, pixels):
    widths = PLANS[name][0]
    offsets = packing.activation_offsets(widths, batch, pixels)
    saved = max(len(widths) - 2, 0)  # the last layer's output is kept apart
    assert len(offsets) == saved + 1 and all(offset % 128 == 0 for offset in offsets)
    x = torch.empty(batch, pixels, widths[0])
    with poisoned_empty():
        flat = packing.empty_activations(x, widths, batch, pixels)
    assert flat.numel() == offsets[-1] and flat.dtype == x.dtype
    views = [packing.activation(flat, widths, batch, pixels, layer) for layer in range(saved)]
    for layer, view in enumerate(views):
        assert view.shape == (batch, pixels, widths[layer + 1]) and view.is_contiguous()
        view.fill_(layer + 1)
    for layer, view in enumerate(views):
        assert (view == layer + 1).all()
    written = sum(batch * pixels * width for width in widths[1:-1])
    assert int((flat != 0).sum()) == written
