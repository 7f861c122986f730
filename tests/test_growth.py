"""Starting from the networks of another run: what grows, what is taken, what is new, and runs in stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cips import UsageError, grids, load_generator
from cips.checkpoint import load_training, save_training
from cips.training import TrainConfig, train, trainer
from cips.training.growth import grown_table, start_from
from cips.training.progressive import stage_configs
from cips.training.state import TrainingState

TINY = {"size": 16, "batch": 2, "width": 8, "n_layers": 3, "d_width": 1 / 512, "samples": 2, "device": "cpu"}


def trained(**options) -> TrainingState:
    """A state after two steps, so that every moment is there."""
    torch.manual_seed(0)
    state = TrainingState(TrainConfig(**{**TINY, **options}).resolve())
    height, width = state.config.image_size
    for _ in range(2):
        state.train_step(torch.rand(2, 3, height, width) * 2 - 1)
    return state


def saved(state: TrainingState, folder: Path) -> Path:
    return save_training(folder / "checkpoints", state.step, state.state_dict())


def fresh(**options) -> TrainingState:
    torch.manual_seed(99)
    return TrainingState(TrainConfig(**{**TINY, **options}).resolve())


def moments(state: TrainingState, name: str) -> dict[str, dict[str, torch.Tensor]]:
    optimizer, module = getattr(state, f"{name[0]}_optimizer"), getattr(state, name)
    return {key: dict(optimizer.state.get(p, {})) for key, p in module.named_parameters()}


def test_a_table_grows_to_what_it_gave_between_its_points():
    table = torch.randn(5, 7, 3, dtype=torch.float64)
    grown = grown_table(table, (9, 20)).numpy()
    assert grown.shape == (9, 20, 3)
    for row in range(9):
        for column in range(20):
            y, x = row * 4 / 8, column * 6 / 19
            top, left = min(int(y), 3), min(int(x), 5)
            a, b = y - top, x - left
            t = table.numpy()
            expected = (1 - a) * ((1 - b) * t[top, left] + b * t[top, left + 1]) + a * (
                (1 - b) * t[top + 1, left] + b * t[top + 1, left + 1]
            )
            np.testing.assert_allclose(grown[row, column], expected, atol=1e-12)
    assert grown_table(table, (5, 7)) is table
    with pytest.raises(UsageError, match="has 5x7 points and cannot shrink to 4x7"):
        grown_table(table, (4, 7))


@pytest.mark.parametrize("table_size", [None, 16], ids=["grow", "keep"])
def test_images_are_the_same_before_and_after(tmp_path, table_size):
    """The old generator drawn at the new size is the new one, with its table grown or kept; so is the average."""
    old = trained()
    new = fresh(size=32, table_size=table_size)
    line = start_from(new, saved(old, tmp_path))
    assert ("table grown from 16x16 to 32x32" in line) == (table_size is None)
    assert new.generator.encoding.table.size == ((32, 32) if table_size is None else (16, 16))
    z = torch.randn(2, 128)
    with torch.no_grad():
        for a, b in ((old.generator, new.generator), (old.average.module, new.average.module)):
            a.eval(), b.eval()
            expected = a(z, grids.full(32, 32), noise=3)
            torch.testing.assert_close(b(z, noise=3), expected, rtol=1e-4, atol=1e-4)
            # and the pixels of any other grid
            coords = torch.rand(20, 2) * 2 - 1
            if table_size is not None:
                assert torch.equal(b(z, coords, noise=3), a(z, coords, noise=3))
    assert new.step == 0


def test_the_discriminator_keeps_its_blocks_by_resolution_and_its_top_is_new(tmp_path):
    old = trained()
    new = fresh(size=64)
    untouched = {key: value.clone() for key, value in new.discriminator.state_dict().items()}
    line = start_from(new, saved(old, tmp_path))
    before, after = old.discriminator.state_dict(), new.discriminator.state_dict()
    assert len(old.discriminator.blocks) == 2 and len(new.discriminator.blocks) == 4
    kept = {}
    for key in after:
        source = key
        if key.startswith("blocks."):
            number, rest = key[7:].split(".", 1)
            source = f"blocks.{int(number) - 2}.{rest}"
        if source in before and not key.startswith("from_rgb"):
            kept[key] = source
            assert torch.equal(after[key], before[source]), key
        else:
            assert torch.equal(after[key], untouched[key]), f"{key} is new"
    assert {key.split(".")[0] for key in kept} == {"blocks", "final_conv", "final_linear"}
    assert f"{len(after) - len(kept)} tensors of the discriminator are new" in line
    # moments go with the weights
    old_moments, new_moments = moments(old, "discriminator"), moments(new, "discriminator")
    for key, value in new_moments.items():
        assert bool(value) == (key in kept)
        if value:
            assert torch.equal(value["exp_avg_sq"], old_moments[kept[key]]["exp_avg_sq"])
    new.train_step(torch.rand(2, 3, 64, 64) * 2 - 1)  # new parameters begin their own count
    counts = {key: float(value["step"]) for key, value in moments(new, "discriminator").items()}
    assert {counts[key] for key in kept} == {4.0 + 1} or all(counts[key] > counts["from_rgb.weight"] for key in kept)


def test_with_patches_of_one_size_the_discriminator_stays_whole(tmp_path):
    old = trained(size=16, regime="patch", patch=16)
    new = fresh(size=32, regime="patch", patch=16, table_size=16)
    line = start_from(new, saved(old, tmp_path))
    assert "are new" not in line
    for a, b in zip(old.discriminator.state_dict().values(), new.discriminator.state_dict().values()):
        assert torch.equal(a, b)
    for name in ("generator", "discriminator"):
        for key, value in moments(old, name).items():
            assert torch.equal(value["exp_avg_sq"], moments(new, name)[key]["exp_avg_sq"]), key


def test_the_tables_moments_grow_with_it(tmp_path):
    old, new = trained(), fresh(size=32)
    start_from(new, saved(old, tmp_path))
    key = "encoding.table.weight"
    expected = grown_table(moments(old, "generator")[key]["exp_avg_sq"], (32, 32))
    found = moments(new, "generator")[key]
    assert torch.equal(found["exp_avg_sq"], expected) and (expected >= 0).all() and expected.max() > 0
    assert found["exp_avg"].shape == (32, 32, 64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 16}, "its generator has another architecture: width is 8, here 16"),
        ({"n_layers": 5}, "n_layers is 3, here 5"),
        ({"fourier_bias": False}, "fourier_bias is True, here False"),
        ({"preset": "residual"}, "another architecture: style_dim is 128, here 512"),
        ({"d_width": 1 / 256}, "its discriminator has another architecture: width is"),
        ({"size": "16x32"}, "its images have another shape"),
        ({"size": 8}, "has 16x16 points and cannot shrink to 8x8; expected table_size 16x16 or larger"),
    ],
)
def test_another_architecture_is_refused_and_nothing_has_changed(tmp_path, changes, message):
    file = saved(trained(), tmp_path)
    new = fresh(**changes)
    before = [p.clone() for p in new.generator.parameters()]
    with pytest.raises(UsageError, match=message):
        start_from(new, file)
    assert all(torch.equal(a, b) for a, b in zip(before, new.generator.parameters()))


def test_files_that_cannot_serve(tmp_path):
    new = fresh()
    for path, message in (
        (tmp_path / "none", "init: no such file or folder"),
        (tmp_path, "init: no checkpoint in"),
    ):
        with pytest.raises(UsageError, match=message):
            start_from(new, path)
    state = trained().state_dict()
    del state["discriminator"]
    file = save_training(tmp_path / "checkpoints", 2, state)
    with pytest.raises(UsageError, match="key 'discriminator' is missing"):
        start_from(new, file)
    file.write_bytes(b"torn")
    with pytest.raises(UsageError, match="not a whole training state"):
        start_from(new, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for k in range(4):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / f"{k}.png")
    return str(path)


def staged(folder, out, **changes) -> TrainConfig:
    options = {**TINY, "data": folder, "out": str(out), "stages": "8:3,16:2,32:2", "sample_every": 0, "log_every": 1}
    return TrainConfig(**{**options, "regime": "patch", "patch": 8, **changes})


def test_stages_follow_one_another_and_resume(folder, tmp_path, monkeypatch):
    whole = train(staged(folder, tmp_path / "whole"), progress=False)
    assert whole.folder == tmp_path / "whole" / "3-32" and whole.step == 2
    names = ("1-8", "2-16", "3-32")
    sizes = [load_generator(tmp_path / "whole" / name).config for name in names]
    assert [config.size for config in sizes] == [(8, 8), (16, 16), (32, 32)]
    assert [config.table_size or config.size for config in sizes] == [(8, 8)] * 3, "the table keeps its points"
    # interrupted in the second stage, and once more between two
    class EnoughError(Exception):
        pass

    real, calls = TrainingState.train_step, [0]

    def limited(self, images):
        calls[0] += 1
        if calls[0] == 5:
            raise EnoughError
        return real(self, images)

    parts = staged(folder, tmp_path / "parts", resume="auto", checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "train_step", limited)
        with pytest.raises(EnoughError):
            train(parts, progress=False)
    seen = []
    inner = trainer.start_from
    monkeypatch.setattr(trainer, "start_from", lambda state, path, *how: seen.append(path) or inner(state, path, *how))
    train(parts, progress=False)
    assert seen == [str(tmp_path / "parts" / "2-16")], "the second stage goes on, the third starts from it"
    a, b = (load_training(tmp_path / run / "3-32" / "checkpoints" / "step-00000002.pt") for run in ("whole", "parts"))
    for part in ("generator", "discriminator", "average"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    # all is done: nothing is trained again
    again = train(parts, progress=False)
    assert again.step == 2 and again.folder.name == "3-32"
    with pytest.raises(UsageError, match="1-8 holds a run; add --resume auto"):
        train(dataclasses.replace(parts, resume="never"), progress=False)
    with pytest.raises(UsageError, match="resume: expected auto or never with stages"):
        train(dataclasses.replace(parts, resume=str(tmp_path / "x.pt")), progress=False)


def test_a_stages_options_are_checked_before_the_first(folder, tmp_path):
    with pytest.raises(UsageError, match="stage 8: patch: expected at most the image's shorter side, 8 pixels, got 16"):
        train(staged(folder, tmp_path / "new", patch=16), progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": "8:1,64:1"}, r"\d.png: is 32x32, smaller than the training size 64 \(too_small"),
        ({"stages": "8:1,64:1", "too_small": "skip"}, "none of the 4 images .*: is 32x32, smaller than the training size 64"),
        ({"stages": "8:1,16x64:1"}, r"is 32x32, smaller than the training size 64x16 \(width x height\)"),
        ({"steps": 5}, "steps: expected none with stages, each of which says its own, got 5"),
        ({"preset": "stylegan2", "width": None, "n_layers": None}, "preset: expected one of CIPS with stages, got 'stylegan2'"),
        ({"stages": "8:1,16x32:1", "regime": "full", "patch": None}, "stages: expected the same ratio of height and width"),
    ],
)
def test_what_a_later_stage_cannot_have_is_said_before_the_first(folder, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(staged(folder, tmp_path / "new", **changes), progress=False)
    assert not (tmp_path / "new").exists()


def test_images_may_be_enlarged_for_a_later_stage(folder, tmp_path):
    train(staged(folder, tmp_path, stages="8:1,64:1", too_small="enlarge"), progress=False)
    assert (tmp_path / "2-64" / "generator.safetensors").is_file()


def test_the_table_of_stages(folder, tmp_path):
    grow = stage_configs(staged(folder, tmp_path, stage_table="grow", stages="8:3,16x32:2"))
    assert [c.table_size for c in grow] == [None, None] and [c.size for c in grow] == [8, "16x32"]
    keep = stage_configs(staged(folder, tmp_path, table_size=12))
    assert {c.table_size for c in keep} == {12}
    assert [c.init for c in keep] == [None, f"{tmp_path}/1-8", f"{tmp_path}/2-16"]
    assert [c.steps for c in keep] == [3, 2, 2] and all(c.stages is None for c in keep)
