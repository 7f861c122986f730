"""Folders, zips, LMDBs and shards hold the same images; what is none of them is refused, what is damaged listed."""

from __future__ import annotations

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cips import UsageError
from cips.data import Batches, data_name, open_container, open_source
from pictures_made import encoded, noise_image, write_folder, write_lmdb, write_tar, write_zip

SIZE = 8
NAMES = ("b/two.png", "a.png", "b/c/three.bmp", "z.webp")


@pytest.fixture
def files() -> dict[str, bytes]:
    kinds = {"webp": {"lossless": True}}
    return {
        name: encoded(noise_image(SIZE, SIZE, seed), name.split(".")[1].upper(), **kinds.get(name.split(".")[1], {}))
        for seed, name in enumerate(NAMES)
    }


def pixels(names) -> list[np.ndarray]:
    """The truth: what was drawn under each of NAMES."""
    return [np.asarray(noise_image(SIZE, SIZE, NAMES.index(name))) for name in names]


def contents(source) -> list[np.ndarray]:
    return list(source.images(np.arange(len(source))).numpy())


def assert_images(source, names) -> None:
    assert len(source) == len(names)
    for got, expected in zip(contents(source), pixels(names)):
        assert np.array_equal(got, expected)


IN_ORDER = ("a.png", "b/c/three.bmp", "b/two.png", "z.webp")


def test_a_folder_is_read_with_its_subfolders_in_order(tmp_path, files):
    write_folder(tmp_path, {**files, "notes.txt": b"no", ".hidden.png": b"no", ".git/a.png": b"no"})
    lines = []
    source = open_source(str(tmp_path), SIZE, say=lines.append)
    assert tuple(source.names) == IN_ORDER and not source.skipped
    assert_images(source, IN_ORDER)
    assert lines[0] == f"data {tmp_path}: folder, 4 images, 1 other files"
    with open_container(str(tmp_path)) as container:
        assert container.kind == "folder" and container.others == ["notes.txt"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_holds_the_same_images(tmp_path, files, compression):
    more = {"dataset.json": b'{"labels": null}', "__MACOSX/a.png": b"", "b/.DS_Store": b"", "readme.md": b""}
    path = write_zip(tmp_path / "set.zip", {**files, **more}, compression)
    source = open_source(str(path), SIZE)
    assert tuple(source.names) == IN_ORDER and source.name == "set"
    assert_images(source, IN_ORDER)
    with open_container(str(path)) as container:
        assert container.kind == "zip" and container.others == ["readme.md"]
    renamed = path.rename(tmp_path / "set")
    assert_images(open_source(str(renamed), SIZE), IN_ORDER)


def test_shards_hold_the_same_images(tmp_path, files):
    items = list(files.items())
    side = {"a.json": b"{}", "a.cls": b"3"}
    write_tar(tmp_path / "set-000.tar", {**dict(items[:2]), **side})
    write_tar(tmp_path / "set-001.tar", {f"./{name}": data for name, data in items[2:]})
    order = ("a.png", "b/two.png", "b/c/three.bmp", "z.webp")
    for name in (tmp_path, tmp_path / "set-*.tar", tmp_path / "set-{000..001}.tar"):
        with open_container(str(name)) as container:
            assert container.kind == "2 WebDataset shards"
            assert container.names[0] == "set-000.tar/a.png"
            assert container.others == ["set-000.tar/a.cls", "set-000.tar/a.json"]
        assert_images(open_source(str(name), SIZE), order)
    assert_images(open_source(str(tmp_path / "set-000.tar"), SIZE), order[:2])
    with pytest.raises(UsageError, match=r"shard .*set-002\.tar of .* is not there"):
        open_source(str(tmp_path / "set-{000..002}.tar"), SIZE)
    with pytest.raises(UsageError, match=r"no file matches '.*none-\*\.tar'"):
        open_source(str(tmp_path / "none-*.tar"), SIZE)


def test_webdataset_reads_the_same_shards(tmp_path, files):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "set-0.tar"
    with open(path, "wb") as file, webdataset.TarWriter(file) as writer:
        for k in range(3):
            writer.write({"__key__": f"{k:04d}", "png": noise_image(SIZE, SIZE, k), "cls": k})
    got = contents(open_source(str(path), SIZE))
    assert len(got) == 3 and all(np.array_equal(a, np.asarray(noise_image(SIZE, SIZE, k))) for k, a in enumerate(got))


def test_the_official_lmdb_of_one_size_and_of_several(tmp_path):
    pytest.importorskip("lmdb")

    def entries(size):
        images = {f"{k:07d}": encoded(noise_image(size, size, k), "JPEG", quality=85) for k in range(3)}
        return {**images, "length": b"3"}

    one = write_lmdb(tmp_path / "one", entries(SIZE))
    truth = [Image.open(io.BytesIO(entries(SIZE)[f"{k:07d}"])).convert("RGB") for k in range(3)]
    before = (one / "data.mdb").read_bytes()
    for path in (one, one / "data.mdb"):
        source = open_source(str(path), SIZE)
        assert source.names == ["0000000", "0000001", "0000002"] and source.name == "one"
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(contents(source), truth))
    assert (one / "data.mdb").read_bytes() == before
    several = tmp_path / "several"
    for size in (8, 16, 32):
        write_lmdb(several / f"ffhq{size}", entries(size))
    for wanted, taken in ((8, 8), (12, 16), (64, 32), (None, 32)):
        with open_container(str(several), wanted) as container:
            assert container.kind == f"LMDB of {taken} px" and len(container) == 3
            assert Image.open(io.BytesIO(container.read(0))).size == (taken, taken)
    write_lmdb(tmp_path / "file.lmdb", entries(SIZE), subdir=False)
    assert len(open_source(str(tmp_path / "file.lmdb"), SIZE)) == 3


def test_an_lmdb_with_sizes_in_its_keys_with_gaps_and_with_strange_keys(tmp_path):
    pytest.importorskip("lmdb")
    entries = {f"{s}-{k:05d}": encoded(noise_image(s, s, k)) for s in (8, 16) for k in range(3)}
    path = write_lmdb(tmp_path / "sized", {**entries, "length": b"4"})
    lines = []
    source = open_source(str(path), SIZE, say=lines.append)
    assert source.names == ["8-00000", "8-00001", "8-00002"]
    assert all(np.array_equal(a, np.asarray(noise_image(8, 8, k))) for k, a in enumerate(contents(source)))
    assert [name for name, _ in source.skipped] == ["8-00003"] and "no such key" in source.skipped[0][1]
    assert "data" in lines[0] and "LMDB of 8 px, 4 images" in lines[0]
    assert len(open_source(str(path), 16)) == 3
    write_lmdb(tmp_path / "strange", {"key": b"value"})
    with pytest.raises(UsageError, match="expected an LMDB with keys such as .* found 'key'"):
        open_source(str(tmp_path / "strange"), SIZE)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"no data base" * 1000)
    with pytest.raises(UsageError, match="broken cannot be opened as an LMDB"):
        open_source(str(tmp_path / "broken"), SIZE)


def test_an_lmdb_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UsageError, match="needs the package lmdb; install it with: pip install lmdb"):
        open_source(str(tmp_path), SIZE)


def test_damaged_and_foreign_files_are_listed_and_skipped(tmp_path, files):
    sound = encoded(noise_image(SIZE, SIZE, 1))
    bad = {"cut.png": sound[:-40], "text.png": b"not an image", "empty.jpg": b"", "float.tif": b""}
    bad["float.tif"] = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    everything = {**files, **bad}
    tar = write_tar(tmp_path / "set.tar", everything)
    cases = {
        "folder": write_folder(tmp_path / "folder", everything),
        "zip": write_zip(tmp_path / "set.zip", everything),
        "tar": tar,
    }
    for path in cases.values():
        lines = []
        source = open_source(str(path), SIZE, say=lines.append)
        assert {name.removeprefix("set.tar/") for name, _ in source.skipped} == set(bad)
        assert_images(source, IN_ORDER)
        assert "skipped 4 of 8 images:" in lines
        text = "\n".join(lines)
        assert "text.png: cannot be read as an image (not an image that PIL knows)" in text
        assert "empty.jpg: cannot be read as an image (the file is empty)" in text
        assert "float.tif: cannot be read as an image (floating-point pixels" in text
    data = bytearray(cases["zip"].read_bytes())
    data[data.index(files["a.png"]) + 30] ^= 1  # the zip's checksum notices
    cases["zip"].write_bytes(data)
    source = open_source(str(cases["zip"]), SIZE)
    assert "a.png" in [name for name, _ in source.skipped] and len(source) == 3


def test_a_shard_that_breaks_off_keeps_what_came_before(tmp_path):
    images = {f"{k}.png": encoded(noise_image(SIZE, SIZE, k)) for k in range(4)}
    path = write_tar(tmp_path / "set.tar", images)
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 600])
    source = open_source(str(path), SIZE)
    assert source.names == ["set.tar/0.png", "set.tar/1.png", "set.tar/2.png"]
    assert [name for name, _ in source.skipped] == ["set.tar", "set.tar/3.png"]
    assert "breaks off after 4 members" in source.skipped[0][1]
    assert "the shard ends after 88 of" in source.skipped[1][1]


def test_many_skipped_files_are_counted(tmp_path):
    write_folder(tmp_path, {f"{k}.png": b"no" for k in range(9)} | {"z.png": encoded(noise_image(8, 8))})
    lines = []
    open_source(str(tmp_path), SIZE, say=lines.append)
    assert lines[-1] == f"  and 4 more; see cips data check {tmp_path}"


def test_unusable_sources_say_what_came_and_what_was_expected(tmp_path, files):
    folder = write_folder(tmp_path / "folder", files)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "texts", {"a.txt": b"", "b.txt": b""})
    write_folder(tmp_path / "broken", {"a.png": b"no", "b.png": b""})
    write_zip(tmp_path / "empty.zip", {})
    whole = write_zip(tmp_path / "whole.zip", files).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-50])
    write_tar(tmp_path / "packed.tar", files, "w:gz")
    (tmp_path / "nothing.bin").write_bytes(b"")
    (tmp_path / "text.bin").write_bytes(b"hello")
    (tmp_path / "text.tar").write_bytes(b"hello" * 300)
    for name, message in {
        "none": r"data: expected 'earth' .* got '.*none' \(no such folder or file\)",
        "folder/a.png": r"one image; give the folder it lies in",
        "empty": "no images in the folder '.*empty' or below it",
        "texts": r"no images in the folder '.*texts' or below it \(2 files with other endings\)",
        "broken": r"none of the 2 images in .*broken can be used; a\.png: cannot be read",
        "empty.zip": "no images in the zip",
        "cut.zip": r"cut\.zip is not a whole zip",
        "packed.tar": "not an uncompressed tar .*it is compressed: unpack it first",
        "nothing.bin": "an empty file",
        "text.bin": "a file of no known kind",
        "text.tar": r"text\.tar is not an uncompressed tar",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / name), SIZE)
    assert folder.is_dir()


def test_a_single_image_fills_a_batch(tmp_path):
    write_folder(tmp_path, {"one.png": encoded(noise_image(SIZE, SIZE))})
    batch = Batches(open_source(str(tmp_path), SIZE), 5, flip=False)(0)
    assert batch.shape == (5, 3, SIZE, SIZE) and torch.equal(batch, batch[:1].expand_as(batch))


def test_names_of_sets():
    for path, name in {
        "earth": "earth",
        "a/ffhq.zip": "ffhq",
        "a/ffhq-{00..12}.tar": "ffhq",
        "a/ffhq-*.tar": "ffhq",
        "a/lsun/": "lsun",
        "a/lsun/data.mdb": "lsun",
        "a/v1.5": "v1.5",
        "*.tar": "images",
    }.items():
        assert data_name(path) == name
