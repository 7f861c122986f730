"""Folders of PNGs: the same files however many processes encode them, whole or absent whatever happens."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cips import Generator, GeneratorConfig, UsageError, save_generator
from cips.apps import draw
from cips.cli import main
from cips.folders import PngFolder, default_workers, on_host, processors

posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
CONFIG = GeneratorConfig(
    size=(6, 8), style_dim=16, mapping_layers=2, fourier_features=4, table_features=4, widths=(8, 6, 6)
)


def batches(count: int, batch: int, side: int = 40) -> list[np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [images[start : start + batch] for start in range(0, count, batch)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def checkpoint(tmp_path) -> str:
    torch.manual_seed(0)
    save_generator(tmp_path / "g.safetensors", Generator(CONFIG).eval())
    return str(tmp_path / "g.safetensors")


def test_files_are_in_order_and_the_same_by_any_number_of_workers(tmp_path):
    given = batches(70, 16, side=150)  # 67 kB each, fifteen to a task: several tasks a batch
    for workers in (0, 2):
        buffer = np.empty_like(given[0])
        with PngFolder(tmp_path / str(workers), workers=workers) as folder:
            for pixels in given:
                reused = buffer[: len(pixels)]
                reused[:] = pixels
                folder.write(reused)
                assert len(folder._tasks) <= 4 * workers
            buffer[:] = 0  # nothing reads it any more
    files = contents(tmp_path / "0")
    assert sorted(files) == [f"{k:06d}.png" for k in range(70)]
    assert files == contents(tmp_path / "2")
    for k, image in enumerate(np.concatenate(given)):
        with Image.open(tmp_path / "2" / f"{k:06d}.png") as found:
            assert np.array_equal(np.asarray(found), image), k


def test_the_level_compresses(tmp_path):
    smooth = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None], (1, 100, 100, 3))
    sizes = {}
    for level in (0, 1, 9):
        with PngFolder(tmp_path / str(level), level=level) as folder:
            folder.write(smooth)
        sizes[level] = (tmp_path / str(level) / "000000.png").stat().st_size
        with Image.open(tmp_path / str(level) / "000000.png") as found:
            assert np.array_equal(np.asarray(found), smooth[0])
    assert sizes[0] > 30000 > sizes[1] >= sizes[9]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_written_is_named(tmp_path, workers):
    (tmp_path / "out" / "000007.png").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"000007\.png: cannot be written: .*directory"):
        with PngFolder(tmp_path / "out", workers=workers) as folder:
            for pixels in batches(200, 4, side=300):
                folder.write(pixels)
    assert folder.count < 200, "it went on to the end"
    for path in (tmp_path / "out").iterdir():
        assert path.suffix == ".png"
        if path.is_file():
            with Image.open(path) as image:
                image.load()


@posix
def test_a_worker_that_dies_is_reported(tmp_path):
    folder = PngFolder(tmp_path, workers=1)
    folder.write(batches(1, 1)[0])
    folder._finish_one()
    for pid in list(folder._pool._processes):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(UsageError, match=r"0000\d\d\.png.*: cannot be written: a process that encodes has ended"), folder:
        for pixels in batches(40, 1, side=600):
            folder.write(pixels)


def test_bad_arguments_are_named(tmp_path):
    for name, value in (("workers", -1), ("workers", 1.5), ("level", 10), ("level", True)):
        with pytest.raises(ValueError, match=f"{name}: expected an integer"):
            PngFolder(tmp_path, **{name: value})


def test_few_pictures_start_no_process():
    assert default_workers(36 * 256 * 256) == 0
    assert default_workers(10_000 * 256 * 256) == processors() - 1


def test_on_host_passes_every_batch_on_in_order():
    given = [torch.full((3, 2), k) for k in range(5)] + [torch.full((1, 2), 5)]
    found = [array.copy() for array in on_host(iter(given))]
    assert [a.shape for a in found] == [(3, 2)] * 5 + [(1, 2)]
    assert all((a == k).all() for k, a in enumerate(found))
    assert list(on_host([])) == []


@pytest.mark.gpu
def test_on_host_overwrites_nothing_that_is_still_being_copied():
    scratch = torch.empty(64, 512, 512, dtype=torch.uint8, device="cuda")

    def made():
        for k in range(20):
            scratch.fill_(k)
            yield scratch[: 64 if k < 19 else 3]

    for k, array in enumerate(on_host(made())):
        assert array.shape[0] == (64 if k < 19 else 3) and (array == k).all(), k
    assert k == 19


def test_latents_do_not_depend_on_count_or_batch():
    whole = torch.randn(37, 16, generator=torch.Generator().manual_seed(3))
    for count, batch in ((37, 37), (37, 1), (20, 6), (1, 16)):
        found = list(draw.latent_batches(16, count, batch, 3))
        assert [start for start, _ in found] == list(range(0, count, batch))
        assert torch.equal(torch.cat([z for _, z in found]), whole[:count])
    odd = torch.cat([z for _, z in draw.latent_batches(5, 7, 3, 3)])
    assert torch.equal(odd, torch.randn(7, 5, generator=torch.Generator().manual_seed(3)))


def test_the_command_writes_the_same_files_with_and_without_workers(checkpoint, tmp_path):
    for name, count, options in (("a", 21, ["--workers=0"]), ("b", 21, ["--workers=2"]), ("c", 9, ["--workers=0"])):
        arguments = [f"--count={count}", "--batch=4", "--seed=5", "--device=cpu", *options]
        assert main(["sample", checkpoint, "--out", str(tmp_path / name), *arguments]) == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and sorted(a) == [f"{k:06d}.png" for k in range(21)]
    assert c == {name: a[name] for name in sorted(a)[:9]}, "an image depends on how many there are"


def command(checkpoint: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "cips", "sample", checkpoint, "--out", str(out), "--device=cpu", *options]


@posix
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(checkpoint, tmp_path):
    import resource

    def limit():  # no file may exceed it: what a full disk does, to this process and its workers
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    out = tmp_path / "out"
    arguments = command(checkpoint, out, "--count=8", "--size=64", "--workers=2")
    done = subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"cips: error: {out}/000000.png: cannot be written")
    assert "Traceback" not in done.stderr and list(out.iterdir()) == []


def test_every_process_is_started_where_no_interrupt_can_come_between(tmp_path):
    """A worker that Ctrl-C cuts off from the pool while it is being started would be waited for without end."""
    before = set(multiprocessing.active_children())
    with PngFolder(tmp_path, workers=3) as folder:
        folder.wait_for_workers()
        assert len(set(multiprocessing.active_children()) - before) == 3
        folder.write(np.zeros((9, 4, 4, 3), np.uint8))
    assert len(list(tmp_path.iterdir())) == 9


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_whole_files_only(checkpoint, tmp_path, number):
    out = tmp_path / "out"
    arguments = command(checkpoint, out, "--count=100000", "--size=200", "--workers=2")
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in a shell's background ignores it
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heard)
    try:
        deadline = time.monotonic() + 100
        while not (out.is_dir() and len(list(out.glob("0*.png"))) >= 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        # Ctrl-C reaches the workers too; a kill only the one process, whose workers must notice
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        # the output ends when the last worker has: they hold it open
        said = process.communicate(timeout=60)[1].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said
    files = list(out.iterdir())
    assert len(files) >= 5
    for path in files:
        assert path.suffix == ".png", path
        with Image.open(path) as image:
            image.load()


@pytest.mark.gpu
def test_a_gpu_writes_the_same_files_with_and_without_workers(tmp_path):
    torch.manual_seed(0)
    config = GeneratorConfig(size=(32, 48), style_dim=32, mapping_layers=2, fourier_features=16, table_features=16, widths=(32,) * 4)
    save_generator(tmp_path / "g.safetensors", Generator(config).eval())
    for workers in (0, 3):
        options = ["--count=150", "--batch=8", "--device=cuda", "--dtype=bfloat16", f"--workers={workers}"]
        assert main(["sample", str(tmp_path / "g.safetensors"), "--out", str(tmp_path / str(workers)), *options]) == 0
    files = contents(tmp_path / "0")
    assert len(files) == 150 and files == contents(tmp_path / "3") and len(set(files.values())) == 150
