"""StyleGAN2's generator: its filters against scipy, its layers and images against the published formula written out in
another way, and the same tools around it as around every generator."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cips import (
    Generator,
    GeneratorConfig,
    StyleGAN2,
    StyleGAN2Config,
    UsageError,
    load_generator,
    make_generator,
    presets,
    save_generator,
)
from cips.cli import main
from cips.stylegan2_layers import ModulatedConv, Smooth, Upsample
from cips.training import TrainConfig, train

TINY = StyleGAN2Config(size=16, style_dim=6, mapping_layers=2, width=8)


def make(config: StyleGAN2Config = TINY, wide: torch.dtype = torch.float64, **options) -> StyleGAN2:
    """With every parameter at a value that is seen."""
    torch.manual_seed(0)
    g = StyleGAN2(config, **options)
    with torch.no_grad():
        for name, p in g.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                p.add_(torch.randn_like(p) * 0.3)
        g.w_mean.normal_()
    return g.to(wide).eval()


# --- numbers of parameters and of operations --------------------------------------------------------------------------


def test_parameters_are_the_papers_thirty_million():
    with torch.device("meta"):
        g = make_generator("stylegan2")
    assert isinstance(g, StyleGAN2) and g.config == presets["stylegan2"]

    def conv(i: int, o: int) -> int:
        return 9 * i * o + (512 * i + i) + 1 + o  # weight, affine, noise, bias

    def to_rgb(i: int) -> int:
        return 3 * i + (512 * i + i) + 3

    channels = [512, 512, 512, 512, 512, 256, 128]  # at 4, 8, ..., 256 pixels
    doublings = [conv(i, o) + conv(o, o) for i, o in zip(channels, channels[1:])]
    count = 8 * (512 * 512 + 512) + 512 * 4 * 4 + conv(512, 512) + sum(doublings) + sum(map(to_rgb, channels))
    assert sum(p.numel() for p in g.parameters()) == count == 30_034_338
    assert [c.weight.shape[0] for c in g.convs] == [512] * 9 + [256] * 2 + [128] * 2
    assert g.n_styles == 13 + 7


def test_operations_are_the_83_7_billion_that_are_told_of_it_less_the_zeros():
    config = presets["stylegan2"]
    channels, products, zeros = [512, 512, 512, 512, 512, 256, 128], 0, 0
    for k, (i, o) in enumerate(zip([0, *channels], channels)):
        pixels = (4 << k) ** 2
        products += pixels * (9 * o * o + 3 * o + 9 * i * o)
        zeros += pixels * 9 * i * o * 3 // 4
    assert products == pytest.approx(83.7e9, rel=1e-3)
    assert config.flops() == 2 * (products - zeros)
    # the authors of CIPS: it takes 3.3 times as many
    assert presets["paper"].flops() / (2 * products) == pytest.approx(3.29, abs=0.01)


# --- filters ----------------------------------------------------------------------------------------------------------


def doubled(image: np.ndarray) -> np.ndarray:
    """A plane `[H, W]` at twice its size: scipy's zeros between samples and taps, along rows, then columns."""
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 4
    for axis in (0, 1):
        wide = scipy.signal.upfirdn(taps, image, up=2, axis=axis)  # begins 3 places before the first sample's last tap
        image = np.take(wide, range(1, 1 + 2 * image.shape[axis]), axis)
    return image


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 2)])
def test_doubling_is_scipys(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ours = Upsample().double()(x)
    for b in range(2):
        for c in range(3):
            np.testing.assert_allclose(ours[b, c], doubled(x[b, c].numpy()), atol=1e-12)


def test_doubling_interpolates_between_pixel_centres_inside_and_fades_at_the_border():
    x = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    ours = Upsample().double()(x)
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours[..., 1:-1, 1:-1], bilinear[..., 1:-1, 1:-1])
    ones = Upsample()(torch.ones(1, 1, 4, 4))
    assert ones[0, 0, 3, 3] == 1 and ones[0, 0, 0, 3] == 0.75


def test_smoothing_is_scipys():
    x = torch.randn(1, 2, 9, 7, dtype=torch.float64)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16
    for c in range(2):
        want = scipy.signal.convolve2d(np.pad(x[0, c].numpy(), 1), kernel, mode="valid")
        np.testing.assert_allclose(Smooth().double()(x)[0, c], want, atol=1e-12)


@pytest.mark.parametrize("up", [False, True])
def test_a_modulated_convolution_is_one_kernel_an_image(up):
    torch.manual_seed(0)
    layer = ModulatedConv(3, 4, 5, up=up).double()
    with torch.no_grad():
        layer.bias.normal_()
        layer.noise_strength.fill_(0.7)
    x, w = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    size = (12, 10) if up else (6, 5)
    noise = torch.randn(2, 1, *size, dtype=torch.float64)
    ours = layer(x, w, noise).detach()
    style = w @ layer.affine.weight.T / math.sqrt(5) + layer.affine.bias
    blur = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16
    for b in range(2):
        kernel = (layer.weight / math.sqrt(27) * style[b][None, :, None, None]).detach()
        kernel = (kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()).numpy()
        for o in range(4):
            total = np.zeros(size)
            for i in range(3):
                plane = x[b, i].numpy()
                if up:
                    spread = np.zeros((11, 9))
                    spread[::2, ::2] = plane  # zeros between the pixels, and a true convolution with the kernel
                    full = scipy.signal.convolve2d(scipy.signal.convolve2d(spread, kernel[o, i]), blur)
                    total += full[2:-2, 2:-2]
                else:
                    total += scipy.signal.correlate2d(plane, kernel[o, i], mode="same")
            y = total + 0.7 * noise[b, 0].numpy() + layer.bias[o].item()
            np.testing.assert_allclose(ours[b, o], np.where(y > 0, y, 0.2 * y) * math.sqrt(2), atol=1e-12)


# --- images -----------------------------------------------------------------------------------------------------------


def published(g: StyleGAN2, w_plus: Tensor) -> Tensor:
    """The images without noise, of W+ `[B, n_styles, style_dim]`: a kernel an image, one after the other."""

    def modulated(x: Tensor, layer, w: Tensor, demodulate: bool) -> Tensor:
        weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
        style = w @ layer.affine.weight.T / math.sqrt(len(w)) + layer.affine.bias
        kernel = weight / math.sqrt(weight[0].numel()) * style[:, None, None]
        if demodulate:
            kernel = kernel * (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        if getattr(layer, "smooth", None) is None:
            return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        spread = torch.zeros(1, x.shape[1], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1, dtype=x.dtype)
        spread[..., ::2, ::2] = x
        y = F.conv2d(spread, kernel.flip(2, 3), padding=2)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 4
        return F.conv2d(y.transpose(0, 1), torch.outer(taps, taps)[None, None], padding=1).transpose(0, 1)

    images = []
    for each in w_plus:
        x, rgb = g.constant[None], None
        for k, layer in enumerate(g.convs):
            x = modulated(x, layer, each[k], True) + layer.bias[:, None, None]
            x = F.leaky_relu(x, 0.2) * math.sqrt(2)
            if k % 2 == 0:
                to_rgb = g.to_rgbs[k // 2]
                colour = modulated(x, to_rgb, each[len(g.convs) + k // 2], False) + to_rgb.bias[:, None, None]
                if rgb is not None:
                    planes = [torch.from_numpy(doubled(plane.detach().numpy())) for plane in rgb[0]]
                    colour = colour + torch.stack(planes)
                rgb = colour
        images.append(rgb)
    return torch.cat(images)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", [16, (8, 12)])
@torch.no_grad()
def test_images_are_the_published_ones(size, backend):
    g = make(dataclasses.replace(TINY, size=size), backend=backend)
    z = torch.randn(2, 6, dtype=torch.float64)
    w = g.mapping(z)
    images = g(z, noise="off")
    assert images.shape == (2, 3, *g.config.size) and g.constant.shape[1:] == g.config.sizes[0]
    torch.testing.assert_close(images, published(g, w[:, None].expand(-1, g.n_styles, -1)), rtol=1e-9, atol=1e-9)
    w_plus = torch.randn(2, g.n_styles, 6, dtype=torch.float64)
    torch.testing.assert_close(g(w_plus, input_is_w=True, noise="off"), published(g, w_plus), rtol=1e-9, atol=1e-9)
    truncated = g(g.w_mean + 0.5 * (w - g.w_mean), input_is_w=True, noise="off")
    torch.testing.assert_close(g(z, truncation=0.5, noise="off"), truncated)


@torch.no_grad()
def test_noise_is_drawn_for_every_layer_and_pixel():
    g, z = make(), torch.randn(2, 6, dtype=torch.float64)
    seeded, again, other, silent = (g(z, noise=n) for n in (3, 3, 4, "off"))
    assert torch.equal(seeded, again) and not torch.equal(seeded, other) and not torch.equal(seeded, silent)
    assert not torch.equal(g(z), g(z))
    assert not torch.equal(g._noise(3, 1, 2, 8, 8), g._noise(3, 2, 2, 8, 8)), "no two layers have the same"
    for k in range(len(g.convs)):
        for j, conv in enumerate(g.convs):
            conv.noise_strength.fill_(0.5 if j == k else 0.0)
        change = (g(z, noise=3) - silent).abs().amax(1)
        assert (change > 0).float().mean() > 0.9, f"layer {k}"
        assert not torch.equal(change[0], change[1])


def test_a_path_length_penalty_can_be_trained():
    g = make(dataclasses.replace(TINY, size=8, width=3))
    w = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    weight = g.convs[1].weight
    value = weight.detach().clone().requires_grad_()

    def images(w: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(g, {"convs.1.weight": weight}, (w,), {"input_is_w": True, "noise": "off"})

    assert torch.autograd.gradcheck(images, (w, value), fast_mode=True)
    assert torch.autograd.gradgradcheck(images, (w, value), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("how", ["argument", "autocast"])
def test_bfloat16_is_close_and_keeps_float32_parameters(how):
    g = make(dataclasses.replace(TINY, width=64), torch.float32, dtype=torch.bfloat16 if how == "argument" else None)
    z = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        narrow = g(z, noise=1)
    assert narrow.dtype == torch.float32 and {p.dtype for p in g.parameters()} == {torch.float32}
    g.dtype = None
    exact = g.double()(z.double(), noise=1)
    error = ((narrow - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 1e-4 < error < 3e-2, "bfloat16 keeps 8 bits: neither exact nor far off"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"coords": torch.zeros(4, 2)}, ValueError, "coords: expected None, since convolutions draw whole images"),
        ({"size": 32}, ValueError, "size: expected 16x16, the only size of this StyleGAN2, got 32"),
        ({"noise": "loud"}, ValueError, "noise: expected 'fresh', 'off' or an int seed, got 'loud'"),
        ({"noise": True}, ValueError, "noise: .* got True"),
    ],
)
def test_call_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        make()(torch.zeros(2, 6, dtype=torch.float64), **options)
    with pytest.raises(ValueError, match=r"z: expected \[B, 6\], got float64 \[2, 5\]"):
        make()(torch.zeros(2, 5, dtype=torch.float64))
    assert make()(torch.zeros(1, 6), size=16, lookup="compat").shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 4}, "size: expected a power of two of at least 8 .*, got 4x4"),
        ({"size": (24, 48)}, "size: .* got 24x48"),
        ({"size": (16, 22)}, "size: .* got 16x22"),
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_configs_of_both_kinds_from_json():
    again = StyleGAN2Config.from_dict(json.loads(json.dumps(TINY.to_dict())))
    assert again == TINY and again.sizes == ((4, 4), (8, 8), (16, 16)) and again.layer_widths == (8, 8, 8, 8, 8)
    with pytest.raises(ValueError, match="unknown fields colour"):
        StyleGAN2Config.from_dict({**TINY.to_dict(), "colour": 1})
    with pytest.raises(ValueError, match="expected architecture 'stylegan2', got 'stylegan3'"):
        StyleGAN2Config.from_dict({**TINY.to_dict(), "architecture": "stylegan3"})


def test_each_class_makes_its_own_kind():
    with pytest.raises(TypeError, match="config: expected a GeneratorConfig, got StyleGAN2Config; see cips.make_generator"):
        Generator("stylegan2")
    for config in ("paper", GeneratorConfig()):
        with pytest.raises(TypeError, match="config: expected a StyleGAN2Config or 'stylegan2'"):
            StyleGAN2(config)
    with pytest.raises(ValueError, match="config: expected one of paper, .*, stylegan2, small, got 'huge'"):
        make_generator("huge")


# --- the tools around it ----------------------------------------------------------------------------------------------


def test_a_file_brings_back_the_same_images(tmp_path):
    g, z = make(wide=torch.float32), torch.randn(2, 6)
    save_generator(tmp_path / "g.safetensors", g)
    loaded = load_generator(tmp_path / "g.safetensors")
    assert isinstance(loaded, StyleGAN2) and loaded.config == TINY
    assert torch.equal(loaded(z, truncation=0.5, noise=1), g(z, truncation=0.5, noise=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    for k in range(8):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    options = ["--size=16", "--width=8", "--batch=4", "--d-width=0.002", "--samples=4", "--device=cpu", "--seed=1"]
    command = ["train", "--preset=stylegan2", "--data", str(folder), "--out", str(folder / "out"), *options]
    assert main([*command, "--steps=2"]) == 0
    assert main([*command, "--steps=4", "--resume=auto"]) == 0
    return str(folder / "out")


def test_the_trainer_trains_it(run, capsys):
    g = load_generator(run)
    assert g.config == StyleGAN2Config(size=16, width=8)
    torch.manual_seed(1)
    start = StyleGAN2(g.config)  # what the run began with
    for (name, now), then in zip(g.named_parameters(), start.parameters()):
        assert not torch.equal(now, then), f"{name} was never moved"
    assert main(["info", run]) == 0
    out = capsys.readouterr().out
    assert "16x16, style 512, 8 mapping layers" in out and "8 at 4x4, 8 at 8x8, 8 at 16x16" in out
    assert f"{sum(p.numel() for p in g.parameters()):,d} parameters" in out


def test_it_is_sampled_and_its_pixels_are_not_asked_for(run, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main(["sample", run, "--out", str(out), "--count=3", "--batch=2", "--seed=5", "--noise=off", "--device=cpu"]) == 0
    z = torch.randn(3, 512, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        images = load_generator(run)(z, noise="off")
    for k in range(3):
        drawn = np.asarray(Image.open(out / f"{k:06d}.png")).astype(float)
        want = ((images[k].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
        assert np.abs(drawn - want).max() <= 1
    for arguments, message in (
        (["sample", run, "--size=32"], "size: expected none for a StyleGAN2, which draws 16x16 pixels"),
        (["upscale", run], "a StyleGAN2, which draws whole images only: cips sample and cips info take it"),
        (["convert", run, str(tmp_path / "g.pt")], "a StyleGAN2, for which there is no official form of CIPS"),
    ):
        assert main([*arguments, *([] if arguments[0] == "convert" else ["--out", str(tmp_path / "a.png")])]) == 2
        assert message in capsys.readouterr().err


def test_options_that_it_has_not_are_named():
    for name in ("n_layers", "table_init_std"):
        with pytest.raises(UsageError, match=f"{name}: expected none with preset 'stylegan2', which has no such thing"):
            TrainConfig(preset="stylegan2", device="cpu", **{name: 1}).resolve().generator_config()
    with pytest.raises(UsageError, match="save: expected 'all' with preset 'stylegan2'"):
        TrainConfig(preset="stylegan2", device="cpu", save="none").resolve().generator_config()


def test_info_of_the_preset(capsys):
    assert main(["info", "stylegan2"]) == 0
    out = capsys.readouterr().out
    assert "30,034,338 parameters" in out and "90.24 GFLOP" in out and "128 at 256x256" in out


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@torch.no_grad()
def test_error_on_a_gpu_is_that_of_sixteen_bits():
    g = make(dataclasses.replace(TINY, size=64, width=64), torch.float32, dtype=torch.bfloat16).cuda()
    z = torch.randn(4, 6, device="cuda")
    narrow = g(z, noise=1)
    g.dtype = None
    exact = g.double()(z.double(), noise=1)
    error = ((narrow - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 1e-4 < error < 3e-2


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["stylegan2", "sine"])
def test_a_run_on_a_gpu_in_cuda_graphs(preset, tmp_path):
    random = np.random.default_rng(0)
    for k in range(8):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{k}.png")
    options = dict(data=str(tmp_path), out=str(tmp_path / "out"), size=16, width=16, batch=4, d_width=0.01, samples=4)
    train(TrainConfig(preset=preset, steps=12, r1_every=2, log_every=1, device="cuda", **options), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(math.isfinite(line["g_loss"]) and math.isfinite(line["d_loss"]) for line in lines)
    assert main(["sample", str(tmp_path / "out"), "--out", str(tmp_path / "a.png"), "--count=4", "--dtype=bfloat16"]) == 0
