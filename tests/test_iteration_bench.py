"""The benchmark of a training iteration: the published formulation is ours, a tiny run, its numbers, its options."""

from __future__ import annotations

import json

import pytest
import torch

import benchmark_helpers  # noqa: F401  (puts benchmarks/ on the path)
import iteration_bench
import machine
from cips import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from cips.training import TrainConfig
from cips.training.state import TrainingState
from cips_kernels.testing import relative_error
from iteration_rivals import PublishedDiscriminator, PublishedGenerator, PublishedIteration

TINY = ["--device", "cpu", "--preset", "small", "--size", "8", "--batch", "2", "--d-width", "0.002", "--width", "8"]
TINY += ["--layers", "3", "--rounds", "1", "--budget", "20"]


def test_the_published_formulation_is_ours():
    torch.manual_seed(0)
    g = Generator(GeneratorConfig(size=(8, 8), style_dim=6, width=8, n_layers=3, fourier_features=4, table_features=4))
    d = Discriminator(DiscriminatorConfig(size=8, width=1 / 128))
    for module in (g, d):
        module.double()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
    z, images = torch.randn(4, 6).double(), torch.randn(8, 3, 8, 8).double()
    published = PublishedGenerator(g)
    torch.testing.assert_close(published(z, noise=None), g(z, noise="off"))
    torch.testing.assert_close(PublishedDiscriminator(d)(images), d(images))
    assert sum(p.numel() for p in published.parameters()) == sum(p.numel() for p in g.parameters())


@pytest.mark.parametrize("penalty", [False, True])
def test_its_iteration_is_the_trainers(penalty):
    """The same parameters after one iteration, from the same random numbers; noise strengths start at zero."""
    config = TrainConfig(size=8, batch=4, preset="small", width=8, n_layers=3, d_width=1 / 512, device="cpu").resolve()
    torch.manual_seed(0)
    state = TrainingState(config)
    for module in (state.generator, state.discriminator, state.average.module):
        module.double()
    published = PublishedIteration(
        state.generator, state.discriminator, config.r1, config.r1_every, state.average.decay
    )
    real = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 2 - 1
    # the two draw their noise in different ways, but the same latents first
    latents = [torch.randn(4, 128, dtype=torch.float64) for _ in range(2)]
    ours, theirs = iter(latents), iter(latents)
    state.latents = lambda count: next(ours)
    published._latents = lambda real: next(theirs)
    for module in (state.generator, published.generator):
        for name, p in module.named_parameters():
            if name.endswith("noise_strength"):
                p.requires_grad_(False)
    state.step = 0 if penalty else 1
    start = [p.detach().clone() for p in published.discriminator.parts.parameters()]
    state.train_step(real)
    published.iteration(real, penalty)
    for a, b, c in zip(state.discriminator.parameters(), published.discriminator.parts.parameters(), start, strict=True):
        assert not torch.equal(b, c)
        assert relative_error(a - c, b - c) < 1e-4
    for name, p in state.generator.named_parameters():
        other = published.generator.named[name]
        other = other[0].permute(1, 2, 0) if "table" in name else other
        if not name.endswith("noise_strength"):
            torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-7, msg=name)


def test_a_tiny_run(tmp_path, capsys):
    assert iteration_bench.main([*TINY, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == f"{machine.slug(machine.device_name(torch.device('cpu')))}-iteration.json"
    results = json.loads(path.read_text())
    assert results["torch"] == torch.__version__ and len(results["source_digest"]) == 64
    assert results["left_out"] == []
    found = {(row["case"], row["provider"]) for row in results["rows"]}
    parts = ("d_step", "r1_step", "g_step", "iteration", "iteration_r1", "discriminator", "r1")
    assert {(case, provider) for case in parts for provider in ("published", "ours")} <= found
    assert {("filter", "ours"), ("block", "folded"), ("r1", "depthwise")} <= found
    assert all(row["ms"] > 0 and row["samples"] >= 1 for row in results["rows"])
    ms = {(row["provider"], row["case"]): row["ms"] for row in results["rows"]}
    ours = (15 * ms["ours", "iteration"] + ms["ours", "iteration_r1"]) / 16
    theirs = (15 * ms["published", "iteration"] + ms["published", "iteration_r1"]) / 16
    assert results["summary"]["ours"]["ratio"] == pytest.approx(theirs / ours)
    assert results["summary"]["ours"]["images_per_second"] == pytest.approx(2000 / ours)
    assert f"{theirs / ours:.2f}x published" in capsys.readouterr().out
    assert path not in machine.stack_results(tmp_path), "tables of the stack do not read it"


def test_a_provider_that_errs_is_not_timed(tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        return 1.1 * blur(*arguments, **options)

    blur = iteration_bench.filters.blur
    monkeypatch.setattr(iteration_bench.filters, "blur", wrong)
    assert iteration_bench.main([*TINY, "--cases", "block", "--out", str(tmp_path)]) == 1
    results = json.loads(next(tmp_path.iterdir()).read_text())
    assert [item["provider"] for item in results["left_out"]] == ["ours", "ours"]
    assert "check failed" in results["left_out"][0]["reason"]
    assert not any(row["provider"] == "ours" for row in results["rows"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch: expected an integer of at least 1, got 0"),
        (["--batch", "6"], "--batch: expected a multiple of 4, or at most 4, got 6"),
        (["--rounds", "-1"], "--rounds: expected an integer of at least 1"),
        (["--budget", "0"], "--budget: expected seconds above 0"),
        (["--dtype", "int8"], "--dtype: expected bfloat16 or float32, got 'int8'"),
        (["--cases", "iteration,all"], "--cases: expected some of iteration, discriminator, block, got 'all'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        iteration_bench.main([*TINY, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
