"""A sampler draws the generator's images."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cips import Generator, GeneratorConfig, Sampler, grids
from cips_kernels import encoding
from cips_kernels.testing import assert_close_as_eager

TINY = GeneratorConfig(
    size=(6, 5), style_dim=12, mapping_layers=3, fourier_features=7, table_features=9, widths=(10, 8, 8, 6, 6)
)
WIDE = GeneratorConfig(
    size=(40, 24), style_dim=64, mapping_layers=3, fourier_features=512, table_features=512, widths=(512, 512, 256, 128, 128)
)


def make(config: GeneratorConfig = TINY, **options) -> Generator:
    torch.manual_seed(0)
    generator = Generator(config, **options).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        generator.w_mean.normal_()
    return generator


PLACES = {
    "own grid": {},
    "another size": {"size": (4, 9)},
    "patch": {"coords": grids.patch((6, 5), 2, 2)},
    "points": {"coords": torch.rand(17, 2) * 2 - 1},
    "points an image": {"coords": torch.rand(2, 17, 2) * 2 - 1, "per_image": True},
    "compat": {"lookup": "compat"},
}


@pytest.mark.parametrize("options", [{}, {"noise": "off", "truncation": 0.6}])
@pytest.mark.parametrize("where", PLACES)
def test_images_are_the_generators(where, options):
    g, z = make(), torch.randn(2, 12)
    options = {"noise": 5, **options}
    found = Sampler(g, 2, **PLACES[where])(z, **options)
    with torch.no_grad():
        expected = g(z, **PLACES[where], **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"coords": torch.rand(17, 2) * 2 - 1}, {"size": (4, 6)}, {"size": (3, 5), "lookup": "compat"}])
def test_few_points_are_looked_up_once(options, monkeypatch):
    """Their embeddings are the sampler's table; many points keep the generator's."""
    g, z = make(), torch.randn(2, 12)
    few, many = Sampler(g, 2, **options), Sampler(g, 2, size=(40, 50))
    assert few._encoding.lookup == "own" and many._encoding.lookup == "exact"
    assert few._encoding.table.nbytes <= g.encoding.table.weight.nbytes

    def refuse(*_arguments):
        raise AssertionError("a lookup")

    with torch.no_grad():
        g.encoding.table.weight.mul_(1.3)
        few.refresh()
        expected = g(z, noise=5, **options)
        monkeypatch.setattr(encoding, "table_lookup", refuse)
        torch.testing.assert_close(few(z, noise=5), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError, match="a lookup"):
            many(z)


@pytest.mark.parametrize("missing", ["fourier_features", "table_features"])
def test_one_encoding_may_be_missing(missing):
    g, z = make(dataclasses.replace(TINY, **{missing: 0})), torch.randn(2, 12)
    sampler = Sampler(g, 2)
    with torch.no_grad():
        for parameter in g.encoding.parameters():
            parameter.mul_(1.1)
        sampler.refresh()
        torch.testing.assert_close(sampler(z, noise=5), g(z, noise=5), rtol=1e-4, atol=1e-4)


def test_seeds_in_any_order():
    """A seed is written where the last call had another one, or drew its own."""
    g, z = make(), torch.randn(2, 12)
    sampler, images = Sampler(g, 2), {}
    for seed in (0, 3, 3, "fresh", 3, 0, "off", 0, 3):
        found = sampler(z, noise=seed)
        if seed != "fresh":
            torch.testing.assert_close(found, images.setdefault(seed, found), rtol=0, atol=0)
    with torch.no_grad():
        for seed, image in images.items():
            torch.testing.assert_close(image, g(z, noise=seed), rtol=1e-4, atol=1e-4)
    assert not torch.equal(images[0], images[3])


def test_fresh_noise_changes_and_refresh_takes_over():
    g, z = make(), torch.randn(2, 12)
    sampler = Sampler(g, 2)
    assert not torch.equal(sampler(z), sampler(z))
    before = sampler(z, noise="off", truncation=0.5)
    with torch.no_grad():
        for tensor in (*g.parameters(), g.w_mean):
            tensor.mul_(1.2)
    assert torch.equal(sampler(z, noise="off", truncation=0.5), before)
    sampler.refresh()
    with torch.no_grad():
        expected = g(z, noise="off", truncation=0.5)
    torch.testing.assert_close(sampler(z, noise="off", truncation=0.5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "call", "error", "words"),
    [
        (dict(batch=0), {}, ValueError, "batch: expected an integer of at least 1, got 0"),
        (dict(size=(4, 0)), {}, ValueError, "size: expected one or two integers"),
        (dict(coords=torch.zeros(3, 4, 2), per_image=True), {}, ValueError, "coords: expected one set for each of 2"),
        (dict(graph=True), {}, ValueError, "graph: expected False for a generator on cpu"),
        ({}, dict(z=torch.zeros(3, 12)), ValueError, r"z: expected \[2, 12\], got \[3, 12\]"),
        ({}, dict(noise=torch.zeros(2)), TypeError, "noise: expected 'fresh', 'off' or an int seed, got a tensor"),
        ({}, dict(noise="loud"), ValueError, "noise: expected 'fresh', 'off'"),
    ],
)
def test_errors_name_the_argument(build, call, error, words):
    with pytest.raises(error, match=words):
        Sampler(make(), **{"batch": 2, **build})(**{"z": torch.zeros(2, 12), **call})


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["own grid", "another size", "points"])
def test_a_graph_draws_the_generators_images(where):
    places = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in PLACES[where].items()}
    g, eager = (make(WIDE, dtype=torch.bfloat16, backend=name).cuda() for name in ("auto", "reference"))
    oracle = make(WIDE, backend="reference").double().cuda()
    sampler, z = Sampler(g, 3, **places), torch.randn(3, 64, device="cuda")

    def check(seed: int, truncation: float) -> torch.Tensor:
        found, options = sampler(z, noise=seed, truncation=truncation), dict(noise=seed, truncation=truncation, **places)
        with torch.no_grad():
            assert_close_as_eager(f"{options}", found, eager(z, **options), oracle(z.double(), **options))
        return found

    for seed, truncation in ((5, 1.0), (6, 1.0), (5, 0.7)):
        check(seed, truncation)
    found = check(5, 1.0)
    again = sampler(z, noise=5)
    assert torch.equal(again, found) and again.data_ptr() != found.data_ptr()
    assert not torch.equal(sampler(z), sampler(z)), "fresh noise is drawn in each call"
    with torch.no_grad():
        for model in (g, eager, oracle):
            for parameter in model.parameters():
                parameter.mul_(1.1)
    sampler.refresh()
    check(5, 1.0)
