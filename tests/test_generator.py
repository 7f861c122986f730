"""The generator against the official formulas written out with grouped convolutions, and its promises about
points."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from cips import Generator, GeneratorConfig, grids, presets

TINY = GeneratorConfig(
    size=(6, 5),
    style_dim=12,
    mapping_layers=3,
    fourier_features=7,
    table_features=9,
    widths=(10, 8, 8, 6, 6),
)


def make(config: GeneratorConfig = TINY, seed: int = 0, noise_strength: float = 0.0) -> Generator:
    """A generator in which no parameter is at its initial zero or one, so that each matters."""
    torch.manual_seed(seed)
    generator = Generator(config).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if name.endswith("noise_strength"):
                parameter.fill_(noise_strength)
        generator.w_mean.normal_()
    return generator


def official_mapping(g: Generator, z: torch.Tensor) -> torch.Tensor:
    x = z * torch.rsqrt((z**2).mean(1, keepdim=True) + 1e-8)
    for layer in list(g.mapping)[1:]:
        scale = 0.01 / math.sqrt(layer.weight.shape[1])
        x = F.linear(x, layer.weight * scale) + layer.bias * 0.01
        x = F.leaky_relu(x, 0.2) * math.sqrt(2)
    return x


def official_styled(layer, x, w, noise):
    x = official_modulated(x, layer.weight, layer.affine, w, demodulate=True)
    if noise is not None:
        x = x + layer.noise_strength * noise[:, None]
    return F.leaky_relu(x + layer.bias[:, None, None], 0.2) * math.sqrt(2)


def official_residual(g: Generator, w: torch.Tensor, coords: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """CIPSres as published: a styled layer, blocks of two with a skip, one projection; coords `[B, H, W, 2]`."""
    fourier, table = g.encoding.fourier, g.encoding.table.weight.permute(2, 0, 1)[None]
    f = torch.sin(F.conv2d(coords.permute(0, 3, 1, 2), fourier.weight[:, :, None, None], fourier.bias))
    e = F.grid_sample(table.expand(len(coords), -1, -1, -1), coords, padding_mode="border", align_corners=True)
    layers = list(g.synthesis.layers)
    x = official_styled(layers[0], torch.cat((f, e), 1), w, noise[0])
    for block in range((len(layers) - 1) // 2):
        entered = x
        for number in (2 * block + 1, 2 * block + 2):
            x = official_styled(layers[number], x, w, noise[number])
        if x.shape[1] != entered.shape[1]:
            skip = g.synthesis.skips[str(block)]
            entered = F.conv2d(entered, skip[:, :, None, None] / math.sqrt(entered.shape[1]))
        x = (x + entered) / math.sqrt(2)
    (to_rgb,) = g.synthesis.to_rgbs
    return official_modulated(x, to_rgb.weight, to_rgb.affine, w, demodulate=False) + to_rgb.bias[:, None, None]


def official_modulated(x, weight, affine, w, demodulate):
    """A modulated 1x1 convolution with one group an image: x `[B, I, H, W]`, weight `[O, I]`."""
    batch, channels, height, width = x.shape
    style = F.linear(w, affine.weight / math.sqrt(w.shape[1]), affine.bias)
    kernel = weight[None, :, :, None, None] * style[:, None, :, None, None] / math.sqrt(channels)
    if demodulate:
        kernel = kernel * torch.rsqrt(kernel.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
    kernel = kernel.reshape(-1, channels, 1, 1)
    out = F.conv2d(x.reshape(1, -1, height, width), kernel, groups=batch)
    return out.reshape(batch, -1, height, width)


def official_synthesis(
    g: Generator, w: torch.Tensor, coords: torch.Tensor, lookup: str, noise=None
) -> torch.Tensor:
    """CIPS-skips as published: coords `[B, H, W, 2]`, w `[B, D]` or one w for every layer and ToRGB `[B, L +
    K, D]`."""
    fourier, table = g.encoding.fourier, g.encoding.table.weight.permute(2, 0, 1)[None]
    planes = coords.permute(0, 3, 1, 2)
    f = torch.sin(F.conv2d(planes, fourier.weight[:, :, None, None], fourier.bias))
    e = F.grid_sample(
        table.expand(len(coords), -1, -1, -1), coords, padding_mode="border", align_corners=lookup == "exact"
    )
    x, rgb = torch.cat((f, e), 1), 0
    layers, to_rgbs = g.synthesis.layers, g.synthesis.to_rgbs
    ws = w if w.dim() == 3 else w[:, None].expand(-1, len(layers) + len(to_rgbs), -1)
    done = 0
    for number, layer in enumerate(layers):
        x = official_modulated(x, layer.weight, layer.affine, ws[:, number], demodulate=True)
        if noise is not None:
            x = x + layer.noise_strength * noise[number][:, None]
        x = F.leaky_relu(x + layer.bias[:, None, None], 0.2) * math.sqrt(2)
        # one projection after every second layer, counted back from the last; none after the first
        if number > 0 and (len(layers) - 1 - number) % 2 == 0:
            to_rgb = to_rgbs[done]
            style = ws[:, len(layers) + done]
            rgb = rgb + official_modulated(x, to_rgb.weight, to_rgb.affine, style, demodulate=False)
            rgb = rgb + to_rgb.bias[:, None, None]
            done += 1
    assert done == len(to_rgbs)
    return rgb


@pytest.mark.parametrize("lookup", ["exact", "compat"])
@pytest.mark.parametrize("points", ["own grid", "other size", "each image its own"])
def test_images_are_those_of_the_official_formulas(lookup, points):
    g = make(noise_strength=0.7).double()
    z = torch.randn(3, 12, dtype=torch.float64)
    noise = None
    if points == "own grid":
        coords, call = grids.full(6, 5).double().expand(3, -1, -1, -1), {}
        noise = torch.randn(5, 3, 6, 5, dtype=torch.float64)
    elif points == "other size":
        coords, call = grids.full(9, 4).double().expand(3, -1, -1, -1), {"size": (9, 4)}
    else:
        coords = (torch.rand(3, 4, 7, 2) * 2 - 1).double()
        call = {"coords": coords}
    ours = g(z, lookup=lookup, noise="off" if noise is None else noise, **call)
    w = official_mapping(g, z)
    theirs = official_synthesis(g, w, coords, lookup, noise)
    # a coordinate is a float32 number, which is what bounds the agreement of the interpolation
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.dtype == torch.float64 and theirs.std() > 0.5


def test_gradients_are_those_of_the_official_formulas():
    g = make(noise_strength=0.3).double()
    z = torch.randn(2, 12, dtype=torch.float64)
    coords = grids.full(6, 5).double().expand(2, -1, -1, -1)
    noise = torch.randn(5, 2, 6, 5, dtype=torch.float64)
    weight = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    names, parameters = zip(*g.named_parameters())
    ours = torch.autograd.grad((g(z, noise=noise) * weight).sum(), parameters)
    w = official_mapping(g, z)
    theirs = torch.autograd.grad(
        (official_synthesis(g, w, coords, "exact", noise) * weight).sum(), parameters
    )
    for name, a, b in zip(names, ours, theirs):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item(), msg=name)


def test_parameters_of_the_paper():
    # the breakdown: mapping, Fourier features, table, first layer, 14 more, 7 ToRGB (CIPS supplement, table
    # 1: 45.9 M)
    with torch.device("meta"):
        g = Generator("paper")

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(g.mapping) == 8 * (512 * 512 + 512)
    assert count(g.encoding.fourier) == 1_536
    assert count(g.encoding.table) == 512 * 256 * 256
    assert [count(layer) for layer in g.synthesis.layers] == [1_050_113] + 14 * [525_313]
    assert [count(to_rgb) for to_rgb in g.synthesis.to_rgbs] == 7 * [264_195]
    assert count(g) == 45_911_076
    assert presets["paper"].flops() == pytest.approx(551e9, rel=1e-3)


def test_residual_images_and_gradients_are_those_of_the_official_formulas():
    g = make(dataclasses.replace(TINY, residual=True), noise_strength=0.7).double()
    assert g.config.blocks == ((1, 2), (3, 4)) and g.config.rgb_layers == (4,)
    assert [tuple(skip.shape) for skip in g.synthesis.skips.values()] == [(8, 10), (6, 8)]
    z, noise = torch.randn(3, 12, dtype=torch.float64), torch.randn(5, 3, 6, 5, dtype=torch.float64)
    coords = grids.full(6, 5).double().expand(3, -1, -1, -1)
    ours, theirs = g(z, noise=noise), official_residual(g, official_mapping(g, z), coords, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.5
    names, parameters = zip(*g.named_parameters())
    sent = torch.randn_like(theirs)
    pairs = zip(names, torch.autograd.grad(ours, parameters, sent), torch.autograd.grad(theirs, parameters, sent))
    for name, a, b in pairs:
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item(), msg=name)


# CIPSres at 256 as published: 512 down to the sixth block, which goes to 256, and the seventh, which goes to 128
OFFICIAL_RESIDUAL = (512,) * 11 + (256, 256, 128, 128)


@pytest.mark.parametrize(
    "config, parameters, skips",
    [
        (presets["residual"], 44_325_906, {}),
        (GeneratorConfig(residual=True, widths=OFFICIAL_RESIDUAL), 43_027_858, {"5": (256, 512), "6": (128, 256)}),
    ],
    ids=["flat", "tapered"],
)
def test_parameters_of_the_residual_generators(config, parameters, skips):
    with torch.device("meta"):
        g = Generator(config)
    assert sum(p.numel() for p in g.parameters()) == parameters
    assert {name: tuple(skip.shape) for name, skip in g.synthesis.skips.items()} == skips
    assert g.config.blocks == tuple((k, k + 1) for k in range(1, 15, 2)) and g.config.rgb_layers == (14,)
    assert g.n_styles == 16
    widths = (1024, *config.layer_widths)
    products = sum(i * o for i, o in zip(widths, widths[1:])) + 3 * widths[-1] + sum(o * i for o, i in skips.values())
    assert config.flops(1) == 2 * products


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_point_is_the_same_in_the_image_in_a_tile_in_a_patch_and_alone(backend):
    torch.manual_seed(0)
    g = Generator(dataclasses.replace(TINY, size=(24, 20)), backend=backend).double().eval()
    with torch.no_grad():
        for layer in g.synthesis.layers:
            layer.noise_strength.fill_(1.0)
    z = torch.randn(2, 12, dtype=torch.float64)
    seed = 7
    with torch.no_grad():
        image = g(z, noise=seed)
        # noise of strength 1 moves every pixel by far more than rounding
        assert ((g(z, noise=seed + 1) - image).abs() > 1e-3).double().mean() > 0.95
        tile = g(z, grids.tile((24, 20), 5, 3, 11, 8), noise=seed)
        torch.testing.assert_close(tile, image[:, :, 5:16, 3:11], rtol=1e-12, atol=1e-12)
        patch = g(z, grids.patch((24, 20), 6, 3, (2, 4)), noise=seed)
        torch.testing.assert_close(patch, image[:, :, 2:18:3, 4:20:3], rtol=1e-12, atol=1e-12)
        dense = g(z, grids.dense(24, 20, 2), noise=seed)
        torch.testing.assert_close(dense[:, :, ::2, ::2], image, rtol=1e-12, atol=1e-12)
        order = torch.randperm(480)[:50]
        points = grids.full(24, 20).flatten(0, 1)[order]
        alone = g(z, points, noise=seed)
        assert alone.shape == (2, 50, 3)
        torch.testing.assert_close(alone, image.flatten(2).mT[:, order], rtol=1e-12, atol=1e-12)
        each = g(z, torch.stack((points, points.flip(0))), per_image=True, noise=seed)
        torch.testing.assert_close(each[0], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each[1], alone[1].flip(0), rtol=1e-12, atol=1e-12)


def test_noise_modes():
    g = make(noise_strength=0.5)
    z = torch.randn(2, 12)
    off = g(z, noise="off")
    assert torch.equal(off, g(z, noise="off"))
    torch.manual_seed(3)
    first, second = g(z), g(z)
    torch.manual_seed(3)
    assert torch.equal(first, g(z)), "torch's seed replays fresh noise"
    assert not torch.equal(first, second)
    assert torch.equal(g(z, noise=5), g(z, noise=5)) and not torch.equal(g(z, noise=5), g(z, noise=6))
    zeros = torch.zeros(5, 2, 30)
    torch.testing.assert_close(g(z, noise=zeros), off)


def test_truncation_moves_w_towards_its_mean():
    g = make()
    z = torch.randn(4, 12)
    w = g.mapping(z)
    for truncation in (0.0, 0.3, 0.7, 1.0):
        expected = g.w_mean + truncation * (w - g.w_mean)
        torch.testing.assert_close(g.styles(z, truncation=truncation), expected)
        image = g(z, truncation=truncation, noise="off")
        torch.testing.assert_close(image, g(expected, input_is_w=True, noise="off"), rtol=1e-4, atol=1e-5)
    images = g(z, truncation=0.0, noise="off")
    torch.testing.assert_close(images, images[:1].expand_as(images))


def test_mean_w():
    g = make().double()
    random = torch.Generator().manual_seed(4)
    z = torch.randn(2500, 12, generator=random)
    expected = official_mapping(g, z.double()).mean(0)
    torch.testing.assert_close(g.estimate_w_mean(2500, seed=4), expected)
    assert "w_mean" in g.state_dict()
    g.train()
    before, z = g.w_mean.clone(), torch.randn(64, 12, dtype=torch.float64)
    g(z)
    torch.testing.assert_close(g.w_mean, before * 0.998 + 0.002 * official_mapping(g, z).mean(0))
    g.eval()
    kept = g.w_mean.clone()
    g(z)
    assert torch.equal(g.w_mean, kept)


def test_w_plus_gives_every_layer_its_own_style():
    g = make().double()
    styles = torch.randn(2, g.n_styles, 12, dtype=torch.float64)
    coords = grids.full(6, 5).double().expand(2, -1, -1, -1)
    ours = g(styles, input_is_w=True, noise="off")
    torch.testing.assert_close(ours, official_synthesis(g, styles, coords, "exact"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("points", ["grid", "points", "each image its own"])
def test_blended_styles_are_the_w_of_each_pixel(points, residual):
    g = make(dataclasses.replace(TINY, residual=residual), noise_strength=0.5).double()
    z = torch.randn(2, 3, 12, dtype=torch.float64)
    shape = {"grid": (6, 5), "points": (4,), "each image its own": (2, 3, 2)}[points]
    call = {"noise": 5, "truncation": 0.7}
    if points == "points":
        call["coords"] = torch.rand(4, 2) * 2 - 1
    elif points == "each image its own":
        call["coords"] = torch.rand(2, 3, 2, 2) * 2 - 1
    blend = torch.randn(*shape, 3, dtype=torch.float64).softmax(-1)
    ours = g(z, blend=blend, **call)
    w = g.styles(z.flatten(0, 1), truncation=0.7).unflatten(0, (2, 3))
    call["truncation"] = 1.0
    weights = (blend if len(shape) == 3 else blend.expand(2, *shape, 3)).flatten(1, -2)
    pixels = ours if ours.dim() == 3 else ours.flatten(2).mT
    for p in range(pixels.shape[1]):
        own = g((weights[:, p, :, None] * w).sum(1), input_is_w=True, **call)
        own = own if own.dim() == 3 else own.flatten(2).mT
        torch.testing.assert_close(pixels[:, p], own[:, p], rtol=1e-11, atol=1e-11)
    again = g(w, blend=blend, input_is_w=True, **call)
    torch.testing.assert_close(again, ours)
    plus = w[:, :, None].expand(-1, -1, g.n_styles, -1)
    torch.testing.assert_close(g(plus, blend=blend, input_is_w=True, **call), ours)
    with torch.no_grad():
        torch.testing.assert_close(g(w, blend=blend, input_is_w=True, **call), ours)


def test_a_panorama_goes_over_from_one_image_to_the_next():
    g = make(noise_strength=0.5)
    z = torch.randn(1, 2, 12)
    left = torch.linspace(1, 0, 5).expand(6, 5)
    blend = torch.stack((left, 1 - left), -1)
    with torch.no_grad():
        image = g(z, blend=blend, noise=3)
        ends = [g(z[:, k], noise=3) for k in range(2)]
    torch.testing.assert_close(image[..., 0], ends[0][..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image[..., -1], ends[1][..., -1], rtol=1e-4, atol=1e-5)
    assert ((image[..., 2] - ends[0][..., 2]).abs() > 1e-3).any()


def test_the_mean_w_follows_all_of_a_blend():
    g = make().double().train()
    before, z = g.w_mean.clone(), torch.randn(4, 3, 12, dtype=torch.float64)
    g(z, blend=torch.full((6, 5, 3), 1 / 3))
    w = official_mapping(g, z.flatten(0, 1))
    torch.testing.assert_close(g.w_mean, before * 0.998 + 0.002 * w.mean(0))


@pytest.mark.parametrize("how", ["argument", "autocast"])
def test_bfloat16_is_close_and_keeps_float32_parameters(how):
    config = dataclasses.replace(presets["small"], size=(16, 16))
    torch.manual_seed(0)
    g = Generator(config, dtype=torch.bfloat16 if how == "argument" else None)
    z = torch.randn(4, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        narrow = g(z, noise=1)
    narrow.square().mean().backward()
    assert narrow.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in g.parameters())
    g.dtype = None
    exact = g.double()(z.double(), noise=1)
    error = ((narrow - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 1e-4 < error < 3e-2, "bfloat16 keeps 8 bits: neither exact nor far off"


def test_one_encoding_serves_all_images(monkeypatch):
    g = make()
    seen = []
    forward = g.synthesis.forward
    monkeypatch.setattr(
        g.synthesis,
        "forward",
        lambda x, *a, **k: seen.append((x.images, x.pixels, x.features)) or forward(x, *a, **k),
    )
    g(torch.randn(3, 12))
    g(torch.randn(3, 12), torch.zeros(3, 4, 2), per_image=True)
    assert seen == [(1, 30, 16), (3, 4, 16)]


def test_a_config_survives_json():
    import json

    config = dataclasses.replace(TINY, rgb_after=(1, 4), table_size=(3, 4), residual=True)
    assert GeneratorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(TINY, size=8).size == (8, 8)
    with pytest.raises(ValueError, match="unknown fields colour"):
        GeneratorConfig.from_dict({"colour": 1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": (4, 0)}, "size"),
        ({"width": 0, "widths": None}, "width"),
        ({"widths": ()}, "widths"),
        ({"rgb_after": (5,)}, "rgb_after: expected layers from 0 to 4"),
        ({"mapping_layers": 1.5}, "mapping_layers"),
        ({"residual": 1}, "residual: expected True or False, got 1"),
        ({"residual": True, "widths": (8, 8)}, "residual: .* an odd number of layers, got 2"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    "z, options, error, message",
    [
        (torch.zeros(2, 11), {}, ValueError, r"z: expected \[B, 12\], got float32 \[2, 11\]"),
        (torch.zeros(12), {}, ValueError, "z: expected"),
        (torch.zeros(2, 12, dtype=torch.int64), {}, TypeError, "z: .* int64"),
        (torch.zeros(2, 3, 12), {"input_is_w": True}, ValueError, r"or \[B, 7, 12\]"),
        (torch.zeros(2, 12), {"coords": torch.zeros(4, 3)}, ValueError, r"coords: expected \[P, 2\]"),
        (torch.zeros(2, 12), {"coords": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "coords"),
        (torch.zeros(2, 12), {"coords": torch.zeros(3, 4, 4, 2)}, ValueError, "coords: .* each of 2 images"),
        (torch.zeros(2, 12), {"coords": torch.zeros(4, 2), "per_image": True}, ValueError, r"\[B, P, 2\]"),
        (torch.zeros(2, 12), {"coords": torch.zeros(4, 2), "size": 4}, ValueError, "size: expected None"),
        (torch.zeros(2, 12), {"size": 0}, ValueError, "size"),
        (torch.zeros(2, 12), {"noise": "loud"}, ValueError, "noise: .* 'loud'"),
        (torch.zeros(2, 12), {"noise": torch.zeros(5, 2, 29)}, ValueError, "noise"),
        (torch.zeros(2, 12), {"lookup": "nearest"}, ValueError, "lookup"),
        (torch.zeros(2, 12), {"blend": torch.zeros(6, 5, 2)}, ValueError, r"z: expected \[B, K, 12\]"),
        (torch.zeros(2, 3, 12), {"blend": torch.zeros(6, 5, 2)}, ValueError, r"\[6, 5, 3\] or \[2, 6, 5, 3\]"),
        (torch.zeros(2, 3, 12), {"blend": torch.zeros(30, 3)}, ValueError, r"blend: expected \[6, 5, 3\] or"),
        (torch.zeros(2, 3, 12), {"blend": torch.zeros(6, 5, 3).long()}, TypeError, "blend: expected a floating-point"),
        (torch.zeros(2, 3, 12), {"blend": torch.zeros(6, 5, 3, device="meta")}, ValueError, "blend: is on meta"),
        (torch.zeros(2, 12, device="meta"), {}, ValueError, "z: is on meta but the generator is on cpu"),
    ],
)
def test_call_errors_name_the_argument(z, options, error, message):
    with pytest.raises(error, match=message):
        make()(z, **options)


def test_no_images_and_no_points():
    g = make()
    assert g(torch.zeros(0, 12)).shape == (0, 3, 6, 5)
    assert g(torch.zeros(2, 12), torch.zeros(0, 2)).shape == (2, 0, 3)
    g.train()(torch.zeros(0, 12))
    assert g.w_mean.isfinite().all()


def test_unknown_preset():
    with pytest.raises(ValueError, match="one of paper, official, base, ne, no-fourier, residual, sine, stylegan2, small, got 'huge'"):
        Generator("huge")
