"""The cache serves the second start, notices every change, survives damage and kills; cuts are the images' pixels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from cips import UsageError
from cips.data import Preparation, cache_folder, decoded_images, open_container, open_source
from cips.data import cache as cache_module
from cips.data import cache_folder as where
from cips.data import prepare as prepare_module
from cips.data import stored as stored_module
from pictures_made import encoded, noise_image, write_folder, write_zip


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set", {f"{k}.png": encoded(noise_image(8, 8, k)) for k in range(5)})


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded."""
    calls, real = [], prepare_module.open_image
    monkeypatch.setattr(prepare_module, "open_image", lambda data: calls.append(1) or real(data))
    return calls


def opened(path, cache, size=8, **options):
    lines = []
    source = open_source(str(path), size, cache=str(cache), say=lines.append, **options)
    return source, "\n".join(lines)


def images(source):
    return source.images(np.arange(len(source)))


def test_the_second_start_decodes_nothing(folder, cache, decoded):
    first, said = opened(folder, cache)
    assert len(decoded) == 5 and "not cached yet: reading 5 files" in said
    second, said = opened(folder, cache)
    assert len(decoded) == 5 and "images from the cache" in said
    assert torch.equal(images(first), images(second)) and first.names == second.names
    for k, image in enumerate(images(second).numpy()):
        assert np.array_equal(image, np.asarray(noise_image(8, 8, k)))
    kinds = sorted(path.suffix for path in cache.iterdir())
    assert kinds == [".json", ".lock", ".u8"], "nothing temporary is left"
    [data] = cache.glob("*.u8")
    assert data.stat().st_size == 5 * 8 * 8 * 3


def test_writing_to_the_images_leaves_the_cache_alone(folder, cache):
    source, _ = opened(folder, cache)
    before = images(source).clone()
    source.pixels.zero_()
    assert torch.equal(images(opened(folder, cache)[0]), before)


def change(folder, what):
    if what == "added":
        (folder / "x.png").write_bytes(encoded(noise_image(8, 8, 9)))
    elif what == "removed":
        (folder / "0.png").unlink()
    elif what == "renamed":
        (folder / "0.png").rename(folder / "7.png")
    elif what == "resized":
        (folder / "0.png").write_bytes(encoded(noise_image(9, 9, 0)))
    else:
        os.utime(folder / "0.png", (1, 1))


@pytest.mark.parametrize("what", ["added", "removed", "renamed", "resized", "touched"])
def test_a_changed_folder_is_read_again(folder, cache, what):
    opened(folder, cache)
    change(folder, what)
    source, said = opened(folder, cache)
    assert "the files have changed since they were cached: reading" in said
    fresh = open_source(str(folder), 8, cache="off")
    assert source.names == fresh.names and torch.equal(images(source), images(fresh))
    assert len(list(cache.glob("*.u8"))) == 1, "the old pixels are gone"
    assert "images from the cache" in opened(folder, cache)[1]


def test_a_changed_zip_is_read_again(tmp_path, cache):
    path = write_zip(tmp_path / "set.zip", {"a.png": encoded(noise_image(8, 8, 0))})
    opened(path, cache)
    times = path.stat()
    write_zip(path, {"a.png": encoded(noise_image(8, 8, 1))})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the checksum of the entry tells
    source, said = opened(path, cache)
    assert "have changed" in said
    assert np.array_equal(images(source)[0].numpy(), np.asarray(noise_image(8, 8, 1)))


def test_each_preparation_and_each_folder_has_its_own(folder, cache, tmp_path):
    other = write_folder(tmp_path / "other" / "set", {"0.png": encoded(noise_image(8, 8, 0))})
    calls = [(folder, {}), (folder, {"size": 4}), (folder, {"crop": "random"}), (folder, {"load_size": 8, "size": 4})]
    for path, options in [*calls, (other, {})]:
        assert "not cached yet" in opened(path, cache, **options)[1]
    for path, options in [*calls, (other, {})]:
        assert "images from the cache" in opened(path, cache, **options)[1]


@pytest.mark.parametrize("damage", ["short", "gone", "json", "keys", "version"])
def test_a_damaged_cache_is_built_anew(folder, cache, damage):
    before = images(opened(folder, cache)[0]).clone()
    [index], [data] = cache.glob("*.json"), cache.glob("*.u8")
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-3])
    elif damage == "gone":
        data.unlink()
    elif damage == "json":
        index.write_text(index.read_text()[:-20])
    elif damage == "keys":
        index.write_text("{}")
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "version": -1}))
    source, said = opened(folder, cache)
    assert "another version" in said if damage == "version" else "the cache is damaged" in said
    assert torch.equal(images(source), before)
    assert "images from the cache" in opened(folder, cache)[1]


def test_skipped_files_are_told_of_again(folder, cache):
    (folder / "broken.png").write_bytes(b"no")
    first, second = opened(folder, cache), opened(folder, cache)
    assert "images from the cache" in second[1]
    for source, said in (first, second):
        assert "broken.png: cannot be read as an image" in said and source.skipped == first[0].skipped


def test_the_number_of_threads_changes_nothing(folder):
    found = []
    for workers in (1, 2, 7):
        with open_container(str(folder)) as container:
            found.append(decoded_images(container, Preparation(8, "random"), cache="off", workers=workers))
    assert all(np.array_equal(found[0].pixels, other.pixels) for other in found)
    assert all(other.names == [f"{k}.png" for k in range(5)] for other in found)
    with pytest.raises(UsageError, match="workers: expected an integer of at least 1, got 0"):
        open_source(str(folder), 8, workers=0)


def test_off_writes_nothing(folder, cache, monkeypatch):
    monkeypatch.setenv("CIPS_CACHE", str(cache))
    open_source(str(folder), 8, cache="off")
    assert not cache.exists()
    open_source(str(folder), 8)
    assert list(cache.glob("*.u8")), "the variable names the cache"


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("CIPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert where() == tmp_path / "cips"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert where() == tmp_path / ".cache" / "cips" and where("~/x") == tmp_path / "x"


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cache: .*file.* cannot be made .*; expected a folder to write to, or 'off'"):
        open_source(str(folder), 8, cache=str(tmp_path / "file" / "below"))


def test_a_failed_reading_leaves_no_cache(folder, cache):
    (folder / "small.png").write_bytes(encoded(noise_image(3, 3)))
    with pytest.raises(UsageError, match="small.png: is 3x3"):
        opened(folder, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_leftovers_of_killed_readers_go(folder, cache):
    opened(folder, cache)
    [index] = cache.glob("*.json")
    left = cache / f".{index.stem}-0123.u8.99.tmp"
    left.write_bytes(b"half")
    other = cache / ".another.u8.99.tmp"
    other.write_bytes(b"being written")
    change(folder, "added")
    opened(folder, cache)
    assert not left.exists() and other.exists()


def test_two_at_once_read_once(folder, cache, decoded, monkeypatch):
    real = prepare_module.to_rgb
    monkeypatch.setattr(prepare_module, "to_rgb", lambda image: time.sleep(0.05) or real(image))
    results = []
    threads = [threading.Thread(target=lambda: results.append(opened(folder, cache))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 5
    said = sorted("images from the cache" in text for _, text in results)
    assert said == [False, True, True]
    assert sum("another process is reading these images" in text for _, text in results) >= 1
    assert all(torch.equal(images(results[0][0]), images(source)) for source, _ in results)


def test_a_killed_reader_leaves_nothing_that_is_taken_for_whole(folder, cache):
    code = (
        "import os, sys\nfrom cips.data import open_source, prepare\nreal, seen = prepare.to_rgb, []\n"
        "def slow(image):\n    seen.append(1)\n    return os._exit(9) if len(seen) == 4 else real(image)\n"
        "prepare.to_rgb = slow\nopen_source(sys.argv[1], 8, cache=sys.argv[2], workers=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(cache)])
    assert done.returncode == 9
    source, said = opened(folder, cache)
    assert "not cached yet" in said and len(source) == 5
    assert not list(cache.glob(".*.tmp"))


def mixed_sizes(tmp_path):
    shapes = [(8, 8), (20, 9), (8, 30), (12, 12)]  # width, height
    files = {f"{k}.png": encoded(noise_image(*shape, k)) for k, shape in enumerate(shapes)}
    return write_folder(tmp_path / "mixed", files), [np.asarray(noise_image(*s, k)) for k, s in enumerate(shapes)]


def test_random_cuts_lie_anywhere_in_the_image(tmp_path, cache):
    folder, truth = mixed_sizes(tmp_path)
    source, _ = opened(folder, cache, crop="random")
    index = np.arange(4).repeat(300)
    cuts = source.images(index, np.random.default_rng(5)).numpy()
    corners = source.corners(index, np.random.default_rng(5))
    for k, cut, (top, left) in zip(index, cuts, corners):
        assert np.array_equal(cut, truth[k][top : top + 8, left : left + 8])
    for k, pixels in enumerate(truth):
        mine = corners[index == k]
        places = (pixels.shape[0] - 7) * (pixels.shape[1] - 7)
        assert len({tuple(corner) for corner in mine}) == places, "every position is met"
    still = source.images(np.arange(4)).numpy()
    for cut, pixels in zip(still, truth):
        top, left = (pixels.shape[0] - 8) // 2, (pixels.shape[1] - 8) // 2
        assert np.array_equal(cut, pixels[top : top + 8, left : left + 8])


def test_the_devices_way_cuts_what_the_hosts_does(tmp_path, cache):
    source, _ = opened(mixed_sizes(tmp_path)[0], cache, crop="random")
    index = np.arange(4).repeat(20)
    expected = source.images(index, np.random.default_rng(5))
    corners, widths = source.corners(index, np.random.default_rng(5)), source.shapes[index, 1]
    starts = np.array([0, 64, 64 + 180, 64 + 180 + 240])[index]
    first = starts + corners[:, 0] * widths + corners[:, 1]
    found = stored_module.gather(source.pixels, torch.from_numpy(first), torch.from_numpy(widths), 8)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [10, 2**30])
def test_on_the_gpu_and_from_the_host(tmp_path, cache, monkeypatch, limit):
    source, _ = opened(mixed_sizes(tmp_path)[0], cache, crop="random")
    index = np.arange(4).repeat(20)
    expected = source.images(index, np.random.default_rng(5))
    monkeypatch.setattr(stored_module, "DEVICE_BYTES", limit)
    source.to("cuda")
    assert source.pixels.is_cuda == (limit > 10)
    found = source.images(index, np.random.default_rng(5))
    assert found.is_cuda and torch.equal(found.cpu(), expected)


def test_a_set_too_large_for_the_device_travels_by_batch(folder, cache, monkeypatch):
    monkeypatch.setattr(stored_module, "DEVICE_BYTES", 10)
    source = opened(folder, cache)[0].to("meta")  # stands for another device
    assert source.pixels.device.type == "cpu" and source.images(np.array([2, 0])).device.type == "meta"


@pytest.mark.parametrize("size, stored", [(256, 300), (256, 512)])
def test_the_papers_satellite_crops(tmp_path, cache, size, stored):
    folder = write_folder(tmp_path / "sat", {"0.png": encoded(noise_image(stored, stored))})
    source, _ = opened(folder, cache, size=size, crop="random")
    assert source.shapes.tolist() == [[stored, stored]]
    corners = source.corners(np.zeros(4000, np.int64), np.random.default_rng(0))
    assert corners.min() == 0 and corners.max() == stored - size


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_images_that_lie_on_the_device_stay_there(folder, cache, monkeypatch, name):
    """A device has names with and without its number; whichever is given, nothing is pinned or moved for a batch."""
    source = opened(folder, cache)[0].to(name)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda *_: pytest.fail("pinned what is on the device already"))
    assert source._device == source.pixels.device == torch.empty(0, device=name).device
    batch = source.images(np.array([0, 0]))
    assert batch.device == source.pixels.device
    if batch.device.type != "meta":
        assert np.array_equal(batch[1].cpu().numpy(), np.asarray(noise_image(8, 8, 0)))


def test_without_locks_it_still_works(folder, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert "not cached yet" in opened(folder, cache)[1] and "images from the cache" in opened(folder, cache)[1]
    assert cache_module.default_workers() >= 1 and cache_folder(str(cache)) == cache
