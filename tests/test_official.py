"""Checkpoints of the official code: bit for bit there and back, and the same images and gradients as its formulas."""

from __future__ import annotations

import argparse
import dataclasses
import os

import pytest
import torch
from torch import Tensor

from cips import Generator, GeneratorConfig, UsageError, grids, official, official_config
from official_formulas import OfficialGenerator, full_grid

TINY = dict(fourier=7, table=9, style_dim=12, mapping=3)
SIZE = 8


def make(residual: bool = False, seed: int = 0, **options) -> OfficialGenerator:
    torch.manual_seed(seed)  # of the latents to come
    # widths that change and that stay, so that both kinds of skips are there
    made = OfficialGenerator(SIZE, (10, 10, 8, 6), residual=residual, **{**TINY, **options})
    return made.randomise(seed).eval()


def state_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected), "keys, in their order"
    for key, value in expected.items():
        assert found[key].shape == value.shape and found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value) and found[key].is_contiguous(), key


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual", [False, True])
def test_a_state_dict_comes_back_bit_for_bit(residual, dtype):
    state = state_of(make(residual), dtype)
    g = Generator.from_official(state)
    config = GeneratorConfig(
        size=8, style_dim=12, mapping_layers=3, fourier_features=7, table_features=9, residual=residual,
        widths=(10, 10, 10, 8, 8, 6, 6),
    )  # fmt: skip
    assert g.config == config and not g.training and g.w_mean.dtype == dtype
    assert {p.dtype for p in g.parameters()} == {dtype}
    before = {key: value.clone() for key, value in state.items()}
    written = g.to_official()
    assert_same(written, state)
    for value in written.values():
        value.zero_()
    assert_same(g.to_official(), before)
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.zero_()
    assert_same(state, before)  # nothing is shared


@pytest.mark.parametrize("activation", [None, "sin", "sinrelu"])
@pytest.mark.parametrize("residual, keys", [(False, 122), (True, 100)])
def test_the_released_architectures(residual, keys, activation):
    widths = (512, 512, 512, 512, 512, 512, 256, 128)
    with torch.device("meta"):
        state = OfficialGenerator(256, widths, residual=residual, activation=activation).state_dict()
        ours = Generator(official_config(256, residual=residual, activation=activation or "lrelu")).to_official()
    assert len(state) == keys
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in state.items()]
    if residual:
        assert [key for key in state if "skip" in key] == ["linears.6.skip.0.weight", "linears.7.skip.0.weight"]


def test_equal_widths_are_the_papers_config():
    model = OfficialGenerator(4, (6, 6, 6), **TINY)
    expected = GeneratorConfig(
        size=4, style_dim=12, mapping_layers=3, fourier_features=7, table_features=9, width=6, n_layers=5
    )
    assert Generator.from_official(model.state_dict()).config == expected


def test_every_place_a_checkpoint_keeps_a_generator_in(tmp_path):
    averaged, current = state_of(make(seed=1)), state_of(make(seed=2))
    optimiser = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    parallel = {f"module.{key}": value for key, value in current.items()}
    both = {"g": parallel, "d": {"x": torch.zeros(1)}, "g_ema": averaged, "g_optim": optimiser, "d_optim": optimiser}
    for name, source in {"bare": averaged, "several": both, "parallel": {f"module.{k}": v for k, v in averaged.items()}}.items():
        torch.save(source, tmp_path / f"{name}.pt")
        torch.save(source, tmp_path / f"{name}-old.pt", _use_new_zipfile_serialization=False)
        for given in (source, tmp_path / f"{name}.pt", str(tmp_path / f"{name}-old.pt")):
            assert_same(Generator.from_official(given).to_official(), averaged)
    assert_same(Generator.from_official(both, which="g").to_official(), current)
    assert_same(Generator.from_official({"g": parallel}).to_official(), current)


def test_half_precision_is_widened():
    state = state_of(make(), torch.float16)
    assert_same(Generator.from_official(state).to_official(), {key: value.float() for key, value in state.items()})


def test_an_image_larger_than_its_table_keeps_both_sizes(tmp_path):
    model = make()
    g = Generator.from_official(model.state_dict(), size=20)
    assert g.config.size == (20, 20) and g.config.table_size == (8, 8)
    assert_same(g.to_official(), model.state_dict())
    z = torch.randn(2, 12)
    theirs = model(full_grid(20, 20).expand(2, -1, -1, -1), z)
    torch.testing.assert_close(g(z, lookup="compat", noise="off"), theirs, rtol=1e-4, atol=1e-4)
    assert Generator.from_official(model.state_dict(), size=8).config.table_size is None
    with pytest.raises(ValueError, match="size"):
        Generator.from_official(model.state_dict(), size=0)


def test_loading_draws_nothing_from_the_global_generator():
    state = state_of(make())
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    Generator.from_official(state)
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fourier_features": 0}, "fourier_features: the official classes have at least 1, got 0"),
        ({"table_features": 0}, "table_features: the official classes have at least 1, got 0"),
        ({"n_layers": 4}, "n_layers: the official classes have one layer and then pairs, at least 3, got 4"),
        ({"n_layers": 1}, "n_layers: .* got 1"),
        ({"rgb_after": (-1,)}, r"rgb_after: the official classes have \(2, 4\), got \(4,\)"),
        ({"rgb_after": (2, 4), "residual": True}, r"rgb_after: the official classes have \(4,\), got \(2, 4\)"),
    ],
)
def test_what_has_no_official_form(change, message):
    config = GeneratorConfig(size=4, style_dim=4, mapping_layers=1, fourier_features=2, table_features=2, width=4, n_layers=5)
    with pytest.raises(ValueError, match=message):
        Generator(dataclasses.replace(config, **change)).to_official()


# --- the same images --------------------------------------------------------------------------------------------------


def points(kind: str) -> tuple[Tensor, dict]:
    """Official coordinates `[2, 2, H, W]`, and how the generator is asked for the same."""
    if kind == "full":
        return full_grid(8, 8).expand(2, -1, -1, -1), {}
    if kind == "dense":
        coords = full_grid(24, 17).expand(2, -1, -1, -1)
        return coords, {"size": (24, 17)}
    torch.manual_seed(4)
    coords = torch.rand(2, 1, 40, 2) * 2.4 - 1.2  # some outside, where the border goes on
    return coords.permute(0, 3, 1, 2), {"coords": coords}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", ["full", "dense", "irregular"])
@pytest.mark.parametrize("residual", [False, True])
def test_images_are_the_official_ones_in_eval_mode(residual, kind, dtype, tolerance, backend):
    model = make(residual).to(dtype)
    g = Generator.from_official(model.state_dict(), backend=backend)
    coords, call = points(kind)
    z = torch.randn(2, 12, dtype=dtype)
    with torch.no_grad():
        theirs = model(coords.to(dtype), z)
        ours = g(z, lookup="compat", noise="off", **call)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert ours.dtype == dtype and theirs.std() > 0.2
        noise = torch.randn(7, 2, 1, *theirs.shape[2:], dtype=dtype)
        noisy = model(coords.to(dtype), z, noise)
        torch.testing.assert_close(g(z, lookup="compat", noise=noise[:, :, 0], **call), noisy, rtol=tolerance, atol=tolerance)
        assert (noisy - theirs).std() > 0.02


@pytest.mark.parametrize("activation", ["sin", "sinrelu"])
@pytest.mark.parametrize("kind", ["full", "irregular"])
@pytest.mark.parametrize("residual", [False, True])
def test_sines_are_the_official_ones(residual, kind, activation):
    model = make(residual, activation=activation).double()
    g = Generator.from_official(model.state_dict(), activation=activation)
    assert g.config.activation == activation
    assert_same(g.to_official(), model.state_dict())
    coords, call = points(kind)
    z, noise = torch.randn(2, 12, dtype=torch.float64), torch.randn(7, 2, 1, *coords.shape[2:], dtype=torch.float64)
    theirs = model(coords.double(), z, noise)
    ours = g(z, lookup="compat", noise=noise[:, :, 0], **call)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(g(z, lookup="compat", noise=noise[:, :, 0], **call), theirs, rtol=1e-9, atol=1e-9)
    sent = torch.randn_like(theirs)
    (theirs * sent).sum().backward()
    (ours * sent).sum().backward()
    for entry in official.entries(g.config):
        mine, want = g.get_parameter(entry.parameter).grad, model.get_parameter(entry.key).grad
        torch.testing.assert_close(entry.to_official(mine), want, rtol=1e-8, atol=1e-8, msg=lambda text, key=entry.key: f"{key}: {text}")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("residual", [False, True])
def test_exact_images_are_the_official_ones_in_training(residual, dtype, tolerance):
    model = make(residual).to(dtype).train()
    g = Generator.from_official(model.state_dict())
    z = torch.randn(2, 12, dtype=dtype)
    with torch.no_grad():
        theirs = model(full_grid(8, 8).to(dtype).expand(2, -1, -1, -1), z)
        ours = g(z, lookup="exact", noise="off")
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        at = grids.full(8, 8)
        torch.testing.assert_close(g(z, at, lookup="exact", noise="off"), theirs, rtol=tolerance, atol=tolerance)
        assert (g(z, lookup="compat", noise="off") - theirs).abs().mean() > 0.02, "the two lookups differ"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", ["full", "dense", "irregular"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_are_the_official_ones(residual, kind, dtype, tolerance):
    model = make(residual).to(dtype)
    g = Generator.from_official(model.state_dict())
    coords, call = points(kind)
    z, noise = torch.randn(2, 12, dtype=dtype), torch.randn(7, 2, 1, *coords.shape[2:], dtype=dtype)
    theirs = model(coords.to(dtype), z, noise)
    sent = torch.randn_like(theirs)
    theirs.backward(sent)
    g(z, lookup="compat", noise=noise[:, :, 0], **call).backward(sent)
    with torch.no_grad():
        # put in place of the parameters, the gradients are written in the official form
        for parameter in g.parameters():
            parameter.copy_(parameter.grad)
    ours = g.to_official()
    for key, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        assert largest > 0, key
        torch.testing.assert_close(ours[key], parameter.grad, rtol=tolerance, atol=tolerance * largest, msg=key)


@pytest.mark.parametrize("residual", [False, True])
def test_truncation_is_the_official_one_of_w(residual):
    model = make(residual).double()
    g = Generator.from_official(model.state_dict())
    z = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        w = model.style(z)
        drawn = torch.Generator().manual_seed(0)  # in thousands, as the generator draws them
        many = torch.cat([torch.randn(1000, 12, generator=drawn) for _ in range(10)])
        mean = model.style(many.double()).mean(0, keepdim=True)
        torch.testing.assert_close(g.w_mean, mean[0])
        coords = full_grid(8, 8).double().expand(3, -1, -1, -1)
        theirs = model(coords, w, truncation=0.6, truncation_latent=mean, input_is_latent=True)
        torch.testing.assert_close(g(z, truncation=0.6, lookup="compat", noise="off"), theirs, rtol=1e-9, atol=1e-9)
        ours = g(w, input_is_w=True, truncation=0.6, lookup="compat", noise="off")
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert (theirs - model(coords, z)).std() > 0.02


def test_another_rate_of_the_mapping_network():
    model = make().double()
    for layer in list(model.style)[1:]:
        layer.lr_mul = 0.02
    g = Generator.from_official(model.state_dict(), mapping_lr_mul=0.02)
    z = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(g.mapping(z), model.style(z), rtol=1e-9, atol=1e-9)


# --- what is refused ----------------------------------------------------------------------------------------------------


def rename(state: dict, old: str, new: str, shape: tuple | None = None) -> None:
    value = state.pop(old)
    state[new] = value if shape is None else value.reshape(shape)


SINE = "activation is 'sin' or 'sinrelu': give activation="
CHANGES = {
    "missing": (lambda s: s.pop("linears.3.noise.weight"), "key 'linears.3.noise.weight' is missing"),
    "missing weight": (lambda s: s.pop("linears.3.conv.weight"), "key 'linears.3.conv.weight' is missing"),
    "missing first": (lambda s: s.pop("conv1.conv.weight"), "key 'conv1.conv.weight' is missing"),
    "missing last": (lambda s: [s.pop(k) for k in list(s) if k.startswith("linears.5.")], "key 'linears.5.conv.weight' is missing"),
    "missing rgb": (lambda s: [s.pop(k) for k in list(s) if k.startswith("to_rgbs.2.")], "key 'to_rgbs.2.bias' is missing"),
    "missing all": (lambda s: [s.pop(k) for k in list(s) if k.startswith(("linears", "to_rgbs"))], "key 'linears.0.conv.weight' is missing"),
    "missing style": (lambda s: s.pop("style.1.weight"), "key 'style.1.weight' is missing"),
    "missing table": (lambda s: s.pop("emb.input"), "key 'emb.input' is missing"),
    "extra": (lambda s: s.update({"noises.0": torch.zeros(1)}), "key 'noises.0' is not expected"),
    "far away": (lambda s: s.update({"linears.999999999999.x": torch.zeros(1)}), "key 'linears.6.conv.weight' is missing"),
    "prefix of some": (lambda s: rename(s, "emb.input", "module.emb.input"), "key 'emb.input' is missing"),
    "table": (lambda s: s.update({"emb.input": torch.zeros(9, 8, 8)}), r"key 'emb.input': expected shape \[1, T, S, S\], got \[9, 8, 8\]"),
    "3x3": (lambda s: s.update({"conv1.conv.weight": torch.zeros(1, 10, 16, 3, 3)}), r"key 'conv1.conv.weight': expected shape \[1, O, I, 1, 1\], got \[1, 10, 16, 3, 3\]"),
    "width": (lambda s: s.update({"linears.2.conv.weight": torch.zeros(1, 8, 11, 1, 1)}), r"key 'linears.2.conv.weight': expected shape \[1, 8, 10, 1, 1\], got \[1, 8, 11, 1, 1\]"),
    "affine": (lambda s: s.update({"to_rgbs.1.conv.modulation.weight": torch.zeros(8, 13)}), r"key 'to_rgbs.1.conv.modulation.weight': expected shape \[8, 12\], got \[8, 13\]"),
    "four colours": (lambda s: s.update({"to_rgbs.0.bias": torch.zeros(1, 4, 1, 1)}), r"key 'to_rgbs.0.bias': expected shape \[1, 3, 1, 1\]"),
    "nothing wide": (lambda s: s.update({"lff.ffm.conv.weight": torch.zeros(0, 2, 1, 1)}), r"key 'lff.ffm.conv.weight': expected shape \[F, 2, 1, 1\], got \[0, 2, 1, 1\]"),
    "integers": (lambda s: s.update({"conv1.noise.weight": torch.zeros(1, dtype=torch.int64)}), "key 'conv1.noise.weight': expected a floating-point tensor, got a tensor of torch.int64"),
    "number": (lambda s: s.update(step=3), "key 'step': expected a floating-point tensor, got int"),
    "two dtypes": (lambda s: s.update({"emb.input": s["emb.input"].double()}), "tensors of one dtype, but 'emb.input' is float64"),
    "sine": (lambda s: rename(s, "conv1.activate.bias", "conv1.bias", (1, 10, 1, 1)), f"key 'conv1.bias' belongs .*{SINE}"),
    "sine inside": (lambda s: rename(s, "linears.2.activate.bias", "linears.2.bias", (1, 8, 1, 1)), f"key 'linears.2.bias' .*{SINE}"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_dict_is_refused_naming_the_key(tmp_path, change):
    edit, message = CHANGES[change]
    state = state_of(make())
    edit(state)
    with pytest.raises(UsageError, match=f"^state dict: {message}" if "one dtype" not in message else message):
        Generator.from_official(state)
    torch.save({"g_ema": state}, tmp_path / "000100.pt")
    with pytest.raises(UsageError, match=rf"000100\.pt: g_ema: .*{message}"):
        Generator.from_official(tmp_path / "000100.pt")


@pytest.mark.parametrize(
    "gone, missing",
    [
        ("linears.0.", "linears.0.conv.weight"),
        ("linears.2.conv1.", "linears.2.conv1.conv.weight"),
        ("linears.2.skip.", "linears.2.skip.0.weight"),
        ("to_rgb_last.", "to_rgb_last.bias"),
    ],
)
def test_a_residual_state_dict_with_something_missing(gone, missing):
    state = {key: value for key, value in state_of(make(True)).items() if not key.startswith(gone)}
    with pytest.raises(UsageError, match=f"key '{missing}' is missing"):
        Generator.from_official(state)


def test_sines_in_residual_blocks_are_named():
    state = state_of(make(True))
    rename(state, "linears.2.conv1.activate.bias", "linears.2.conv1.bias", (1, 8, 1, 1))
    with pytest.raises(UsageError, match=f"key 'linears.2.conv1.bias' .*{SINE}"):
        Generator.from_official(state)


def test_an_activation_that_the_keys_contradict():
    with pytest.raises(UsageError, match="state dict: expected layers with a sine .* for activation 'sin', got leaky ReLUs"):
        Generator.from_official(state_of(make()), activation="sin")
    with pytest.raises(ValueError, match="activation: expected None, 'sin' or 'sinrelu', got 'lrelu'"):
        Generator.from_official(state_of(make()), activation="lrelu")
    state = state_of(make(activation="sin"))
    rename(state, "linears.2.bias", "linears.2.activate.bias", (8,))
    with pytest.raises(UsageError, match="key 'linears.2.bias' is missing"):
        Generator.from_official(state, activation="sinrelu")


def test_other_architectures_and_other_things():
    stylegan = {"style.1.weight": torch.zeros(2, 2), "input.input": torch.zeros(1, 2, 4, 4), "conv1.conv.weight": torch.zeros(1, 2, 2, 3, 3)}
    foreign = "not a generator of the official CIPS code: expected keys emb.input and lff.ffm.conv.weight, got style.1.weight, input.input"
    for source, which, message in (
        (stylegan, None, foreign),
        ({"g_ema": stylegan}, None, f"g_ema: {foreign}"),
        (Generator(GeneratorConfig(size=4, style_dim=4, mapping_layers=1, width=4, n_layers=3)).state_dict(), None, "not a generator of the official"),
        ({}, None, "expected a state dict g_ema or g, holds nothing"),
        ({"d": stylegan, "d_optim": {}}, None, "expected a state dict g_ema or g, holds d, d_optim"),
        ({"g": stylegan}, "g_ema", "expected a state dict g_ema, holds g"),
        (stylegan, "g", "holds one state dict and no 'g'; leave out which"),
        ({"g": {}}, None, "g: not a generator of the official CIPS code: .* got none"),
    ):
        with pytest.raises(UsageError, match=message):
            Generator.from_official(source, which=which)
    with pytest.raises(TypeError, match="state_dict_or_path: expected a path or a state dict, got int"):
        Generator.from_official(3)


class Touches:
    """A pickle that would run code when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_cannot_be_read(tmp_path, recwarn):
    path = tmp_path / "000001.pt"
    with pytest.raises(UsageError, match=r"000001\.pt: no such file"):
        Generator.from_official(path)
    torch.save({"g_ema": state_of(make())}, path)
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"000001\.pt: not a whole checkpoint of the official code"):
            Generator.from_official(path)
    path.write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(UsageError, match=r"000001\.pt: not a whole checkpoint of the official code"):
        Generator.from_official(path)
    for held, named in ((argparse.Namespace(size=256), "argparse.Namespace"), (Touches(tmp_path / "ran"), "mkdir")):
        torch.save({"g_ema": state_of(make()), "args": held}, path)
        with pytest.raises(UsageError, match=rf"000001\.pt: .*holds more than tensors and numbers, .*{named}.*could run code"):
            Generator.from_official(path)
    assert not (tmp_path / "ran").exists()
    torch.save(torch.zeros(3), path)
    with pytest.raises(UsageError, match=r"000001\.pt: expected a state dict or a dict of several, got Tensor"):
        Generator.from_official(path)
    assert not recwarn.list
