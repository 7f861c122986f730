"""Architectures with a name: their numbers of parameters, counted by hand from the paper's and the released classes' shapes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from cips import Generator, GeneratorConfig, grids, official_config, presets

TABLE_512 = 512 * 256 * 256


def parameters(config: GeneratorConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Generator(config).parameters())


@pytest.mark.parametrize(
    "name, count",
    [
        ("paper", 45_911_076),
        ("official", 44_317_092),
        ("base", 44_325_906),
        ("ne", 10_246_674),
        ("no-fourier", 43_799_570),
        ("residual", 44_325_906),
        ("sine", 43_799_570),
    ],
)
def test_parameters_of_the_presets(name, count):
    assert parameters(presets[name]) == count


@pytest.mark.parametrize(
    "arguments, count",
    [
        ((64,), 11_824_154),
        ((128,), 18_838_815),
        ((256,), 44_317_092),
        ((512,), 145_124_329),
        ((1024,), 547_846_414),
        ((256, 1), 43_146_212),
        ((256, 2, True), 43_027_858),
    ],
)
def test_parameters_of_the_released_classes(arguments, count):
    assert parameters(official_config(*arguments)) == count


def test_the_four_readings_of_the_papers_base():
    """43.8 M is none of base as the text has it, and any of four with something left out (counted, not built)."""
    mapping, features, projection = 8 * (512 * 512 + 512), 2 * 512 + 512, 3 * 512 + 513 * 512 + 3

    def layer(inputs: int, modulated: bool = True) -> int:
        return inputs * 512 + (513 * inputs if modulated else 0) + 1 + 512

    base = mapping + features + TABLE_512 + layer(1024) + 14 * layer(512) + projection
    assert base == parameters(presets["base"]) and round(base / 1e6, 1) == 44.3
    readings = {
        "table alone": base - features - layer(1024) + layer(512),
        "summed": base - layer(1024) + layer(512),
        "first layer not modulated": base - layer(1024) + layer(1024, modulated=False),
        "a layer less": base - layer(512),
    }
    assert all(round(count / 1e6, 1) == 43.8 for count in readings.values()), readings
    assert parameters(presets["no-fourier"]) == readings["table alone"]
    assert parameters(presets["base"]) - parameters(presets["ne"]) == TABLE_512 + layer(1024) - layer(512)


def test_what_the_presets_are_made_of():
    for name, (fourier, table, rgb) in {
        "base": (512, 512, (14,)),
        "ne": (512, 0, (14,)),
        "no-fourier": (0, 512, (14,)),
        "official": (512, 512, tuple(range(2, 15, 2))),
        "sine": (0, 512, (14,)),
    }.items():
        config = presets[name]
        assert (config.fourier_features, config.table_features, config.rgb_layers) == (fourier, table, rgb), name
    assert {name for name, config in presets.items() if getattr(config, "activation", "lrelu") != "lrelu"} == {"sine"}
    assert presets["sine"] == dataclasses.replace(presets["no-fourier"], activation="sin")
    assert official_config(256, activation="sinrelu") == dataclasses.replace(presets["official"], activation="sinrelu")
    assert presets["official"].layer_widths == (512,) * 11 + (256, 256, 128, 128)
    assert official_config(1024).layer_widths[-4:] == (64, 64, 32, 32)
    assert official_config(1024, 2, True).layer_widths[-6:] == (128, 128, 128, 128, 64, 64)
    assert official_config(64).layer_widths == (512,) * 11


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((96,), "size: expected a power of two from 4 to 1024, got 96"),
        ((2048,), "size: expected a power of two from 4 to 1024, got 2048"),
        ((2,), "size: .* got 2"),
        ((256.0,), "size: expected an integer"),
        ((256, 0), "channel_multiplier: expected an integer of at least 1, got 0"),
        ((256, 2, False, "relu"), "activation: expected lrelu, sin, sinrelu, got 'relu'"),
    ],
)
def test_sizes_that_were_never_released(arguments, message):
    with pytest.raises(ValueError, match=message):
        official_config(*arguments)


def test_arithmetic_without_one_of_the_encodings():
    for name, inputs in (("ne", 512), ("no-fourier", 512), ("base", 1024)):
        products = inputs * 512 + 14 * 512 * 512 + 3 * 512
        assert presets[name].flops() == 2 * products * 65536, name


@pytest.mark.parametrize("fourier, table", [(0, 5), (5, 0)])
@pytest.mark.parametrize("size", [None, (4, 7)])
def test_a_generator_without_one_of_the_encodings_is_the_whole_one_with_a_first_layer_that_reads_no_other(
    fourier, table, size
):
    config = GeneratorConfig(
        size=(6, 3), style_dim=8, mapping_layers=2, fourier_features=5, table_features=5, widths=(6, 4, 4)
    )
    torch.manual_seed(0)
    whole = Generator(config).double().eval()
    part = Generator(dataclasses.replace(config, fourier_features=fourier, table_features=table)).double().eval()
    kept = slice(5, 10) if table else slice(0, 5)
    state = {key: value.clone() for key, value in whole.state_dict().items() if key in part.state_dict()}
    with torch.no_grad():
        # a style of zero for a channel closes it; the factor 1 / sqrt(I) is half as many channels'
        first = whole.synthesis.layers[0]
        for name in ("affine.weight", "affine.bias"):
            state[f"synthesis.layers.0.{name}"] = first.get_parameter(name)[kept] / 2**0.5
            closed = torch.ones(10, dtype=torch.bool)
            closed[kept] = False
            first.get_parameter(name)[closed] = 0
        state["synthesis.layers.0.weight"] = first.weight[:, kept].clone()
    part.load_state_dict(state)
    z = torch.randn(2, 8, dtype=torch.float64)
    options = {"noise": 3} if size is None else {"noise": 3, "size": size}
    torch.testing.assert_close(part(z, **options), whole(z, **options), rtol=1e-10, atol=1e-10)
    points = grids.full(6, 3).flatten(0, 1)[:7]
    torch.testing.assert_close(part(z, points, noise=3), whole(z, points, noise=3), rtol=1e-10, atol=1e-10)
    assert not any(name.startswith("encoding.table" if table == 0 else "encoding.fourier") for name in state)


def test_rgb_after_counts_from_the_end_too():
    config = GeneratorConfig(n_layers=5, rgb_after=(0, -1))
    assert config.rgb_layers == (0, 4)
    assert dataclasses.replace(config, n_layers=3).rgb_layers == (0, 2)
    assert GeneratorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="rgb_after: expected layers from 0 to 4, got \\(-6,\\)"):
        GeneratorConfig(n_layers=5, rgb_after=(-6,))


def test_one_encoding_must_be_there():
    with pytest.raises(ValueError, match="fourier_features, table_features: expected at least one above 0"):
        GeneratorConfig(fourier_features=0, table_features=0)
    with pytest.raises(ValueError, match="table_features: expected an integer of at least 0, got -1"):
        GeneratorConfig(table_features=-1)


def test_the_configuration_in_the_docs_makes_a_generator():
    """Not square, and a table of another shape: docs/generators.md, run as it stands."""
    text = (Path(__file__).parents[1] / "docs" / "generators.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(code, names)
    g, wide = names["g"].eval(), names["wide"]
    assert g.config.size == (192, 320) and g.encoding.table.size == (96, 100) and g.config.rgb_layers == (2, 5, 8)
    assert wide.size == (256, 512) and wide.table_size is None
    with torch.no_grad():
        z, corner = torch.randn(1, 256), grids.tile((192, 320), 188, 310, 4, 10)
        pixels = g(z, corner, noise=1)
        # the table's last entry is the last pixel's embedding, whatever lies between
        last = g.encoding(corner[-1:, -1])[0, 0, 512:]
        assert pixels.shape == (1, 3, 4, 10) and torch.equal(last, g.encoding.table.weight[-1, -1])
