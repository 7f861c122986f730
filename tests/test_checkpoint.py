"""Files that hold what was saved, and damaged ones that are refused by name."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from cips import Generator, GeneratorConfig, UsageError, load_generator, save_generator
from cips.checkpoint import atomic_file, load_training, remove_leftovers, save_training, training_files

TINY = GeneratorConfig(
    size=(4, 6),
    style_dim=8,
    mapping_layers=2,
    fourier_features=4,
    table_features=4,
    widths=(8, 6),
    table_size=3,
)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    g = Generator(TINY).eval()
    g.estimate_w_mean(50)
    return g


def metadata(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, change) -> None:
    """Saves the file again after `change(tensors, metadata)`."""
    tensors, notes = load_file(path), metadata(path)
    change(tensors, notes)
    save_file(tensors, path, notes)


def test_a_generator_comes_back_from_its_file_alone(generator, tmp_path):
    path = tmp_path / "deep" / "g.safetensors"
    save_generator(path, generator, step=7)
    again = load_generator(path)
    assert again.config == TINY and not again.training
    for key, value in generator.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    z = torch.randn(2, 8)
    assert torch.equal(generator(z, truncation=0.5, noise=1), again(z, truncation=0.5, noise=1))
    assert json.loads(metadata(path)["notes"]) == {"step": 7}
    assert json.loads(metadata(path)["config"])["size"] == [4, 6]
    assert os.listdir(path.parent) == ["g.safetensors"]


def test_a_run_folder_stands_for_its_generator(generator, tmp_path):
    save_generator(tmp_path / "generator.safetensors", generator)
    assert load_generator(tmp_path).config == TINY


def test_every_truncation_is_refused_by_name(generator, tmp_path):
    path = tmp_path / "g.safetensors"
    save_generator(path, generator)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"g\.safetensors: not a whole safetensors file"):
            load_generator(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, m: t.pop("encoding.table.weight"), "key 'encoding.table.weight' is missing"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "key 'extra' is not expected"),
        (lambda t, m: t.update(w_mean=torch.zeros(9)), r"key 'w_mean': expected shape \[8\], got \[9\]"),
        (lambda t, m: m.update(format="other"), "metadata 'format' is 'other'"),
        (lambda t, m: m.pop("format"), "metadata 'format' is None"),
        (lambda t, m: m.update(version="9"), "format version 9"),
        (lambda t, m: m.pop("config"), "metadata 'config'"),
        (lambda t, m: m.update(config="{"), "metadata 'config'"),
        (lambda t, m: m.update(config='{"depth": 3}'), "metadata 'config': .*unknown fields depth"),
        (lambda t, m: m.update(config='{"size": [0, 4]}'), "metadata 'config': size"),
    ],
)
def test_a_foreign_or_changed_file_is_refused_naming_file_and_key(generator, tmp_path, change, message):
    path = tmp_path / "g.safetensors"
    save_generator(path, generator)
    rewrite(path, change)
    with pytest.raises(UsageError, match=rf"g\.safetensors: .*{message}"):
        load_generator(path)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="nothing.safetensors: no such file"):
        load_generator(tmp_path / "nothing.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        load_training(tmp_path / "nothing.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_file(path) as file:
        file.write(b"new and")
        raise RuntimeError("halfway")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with open(path, "rb") as reader:
        with atomic_file(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old", "nothing is seen before the end"
        assert reader.read() == b"old", "the old file was replaced, not written over"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_reported_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UsageError, match="file: cannot be written: No space left on device"),
        atomic_file(path) as file,
    ):
        file.write(b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_unwritable_folder_is_named(generator, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"file/g\.safetensors: cannot be written"):
        save_generator(tmp_path / "file" / "g.safetensors", generator)


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    for name in (".step-1.pt.77.tmp", "step-1.pt", ".hidden", "a.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a.tmp", "step-1.pt"]


def test_training_states_newest_first_and_as_many_as_wanted(tmp_path):
    for step in (5, 900, 20, 100_000_000):
        save_training(tmp_path, step, {"x": torch.full((2,), step)}, keep=9)
    (tmp_path / "step-abc.pt").write_bytes(b"")
    assert [p.name for p in training_files(tmp_path)] == [
        "step-100000000.pt",
        "step-00000900.pt",
        "step-00000020.pt",
        "step-00000005.pt",
    ]
    save_training(tmp_path, 100_000_001, {"x": 1}, keep=2)
    assert [p.name for p in training_files(tmp_path)] == ["step-100000001.pt", "step-100000000.pt"]
    state = load_training(training_files(tmp_path)[1])
    assert state["step"] == 100_000_000 and state["x"].tolist() == [100_000_000] * 2


class Touches:
    """A pickle that would run code when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_holds_more_than_tensors_is_refused_unrun(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"format": "cips.training", "x": Touches(marker)}, tmp_path / "step-1.pt")
    (tmp_path / "step-2.pt").write_bytes(pickle.dumps(Touches(marker), protocol=2))
    for name in ("step-1.pt", "step-2.pt"):
        with pytest.raises(UsageError, match=rf"{name}: not a whole training state"):
            load_training(tmp_path / name)
    assert not marker.exists()


def test_damaged_and_foreign_training_states(tmp_path):
    path = save_training(tmp_path, 1, {"x": torch.randn(1000)})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="step-00000001.pt: not a whole training state"):
            load_training(path)
    torch.save({"g": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="no 'format'"):
        load_training(path)
    torch.save({"format": "cips.training", "version": 99}, path)
    with pytest.raises(UsageError, match="format version 99"):
        load_training(path)
