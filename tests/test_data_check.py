"""`cips data check`: every number of the report against files whose making is known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cips.cli import main
from cips.data import open_source
from cips.grids import parse_size
from pictures_made import encoded, noise_image, write_folder, write_lmdb, write_tar, write_zip


def make() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise_image(10, 10, seed).quantize(8) for seed in range(2)]
    clear = noise_image(9, 9, 4).convert("RGBA")
    clear.putalpha(100)
    return {
        "a.png": encoded(noise_image(8, 8, 0)),
        "sub/copy of a.png": encoded(noise_image(8, 8, 0)),
        "as bmp.bmp": encoded(noise_image(8, 8, 0), "BMP"),
        "b.png": encoded(noise_image(8, 8, 1)),
        "grey.png": encoded(noise_image(8, 8, 2).convert("L")),
        "deep.png": encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16))),
        "wide.jpg": encoded(noise_image(12, 8, 3), "JPEG", exif=exif),
        "clear.png": encoded(clear),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "inks.jpg": encoded(noise_image(16, 16, 5).convert("CMYK"), "JPEG"),
        "cut.png": encoded(noise_image(8, 8, 6))[:-40],
        "text.jpg": b"hello",
        "notes.txt": b"hello",
        "list.TXT": b"hello",
    }


def report(path, capsys, *options) -> dict:
    assert main(["data", "check", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(params=["folder", "zip", "tar"])
def source(request, tmp_path):
    writers = {"folder": write_folder, "zip": write_zip, "tar": write_tar}
    return writers[request.param](tmp_path / f"set.{request.param}", make())


def test_the_report_counts_what_was_made(source, capsys):
    found = report(source, capsys, "--size=10")
    prefix = "set.tar/" if source.suffix == ".tar" else ""
    files = make()
    assert found["files"] == 12 and found["usable"] == 10
    assert found["sizes"] == {"8x8": 6, "8x12": 1, "9x9": 1, "10x10": 1, "16x16": 1}
    assert next(iter(found["sizes"])) == "8x8", "the most common first"
    assert found["formats"] == {"PNG": 6, "JPEG": 2, "BMP": 1, "GIF": 1}
    modes = found["modes"]
    assert modes.pop("RGB") + modes.pop("P", 0) == 6 and modes == {"CMYK": 1, "I;16": 1, "L": 1, "RGBA": 1}
    assert (found["alpha"], found["turned"], found["animated"]) == (1, 1, 1)
    assert found["too_small"] == 8
    [group] = found["duplicates"]
    assert sorted(group) == [prefix + name for name in ("a.png", "as bmp.bmp", "sub/copy of a.png")]
    assert [name for name, _ in found["broken"]] == [prefix + "cut.png", prefix + "text.jpg"]
    assert found["broken"][1][1] == "cannot be read as an image (not an image that PIL knows)"
    assert found["others"] == {".txt": 2}
    sound = set(files) - {"cut.png", "text.jpg", "notes.txt", "list.TXT"}
    assert found["bytes"] == sum(len(files[name]) for name in sound)


def test_the_text_says_the_same(tmp_path, capsys):
    path = write_folder(tmp_path / "set", make())
    assert main(["data", "check", str(path), "--size", "10", "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{path}: folder, 12 images, 0.0 MB\n  usable      10\n")
    assert "  sizes       8x8 (6), 8x12 (1), 9x9 (1), 10x10 (1), 16x16 (1)\n  below 10    8\n" in text
    assert "  formats     PNG (6), JPEG (2), BMP (1), GIF (1)\n" in text
    assert "  alpha       1\n  EXIF-turned 1\n  animated    1\n  duplicates  2\n" in text
    assert "    a.png = as bmp.bmp = sub/copy of a.png\n" in text
    assert "  broken      2\n    cut.png: cannot be read as an image (" in text
    assert text.endswith("  other files .txt (2)\n")


def test_many_sizes_and_groups_are_cut_short_in_the_text_alone(tmp_path, capsys):
    files = {f"{k}-{n}.png": encoded(noise_image(8 + k, 8)) for k in range(12) for n in range(2)}
    path = write_folder(tmp_path / "set", files)
    assert main(["data", "check", str(path)]) == 0
    text = capsys.readouterr().out
    assert ", 2 other sizes" in text and "and 2 more groups; --json lists all" in text and "below" not in text
    found = report(path, capsys)
    assert len(found["sizes"]) == len(found["duplicates"]) == 12 and found["too_small"] is None


@pytest.mark.parametrize("size, count", [("10x12", 3), ("12x10", 4), ("8X8", 0), ("1x13", 4), ("13x1", 5)])
def test_what_is_too_small_is_what_training_refuses(tmp_path, capsys, size, count):
    """HEIGHTxWIDTH, while `sizes` are WIDTHxHEIGHT as everywhere of pictures."""
    shapes = [(8, 30), (12, 10), (13, 9), (10, 12), (12, 12), (14, 11), (64, 64)]  # width, height
    path = write_folder(tmp_path / "set", {f"{k}.png": encoded(noise_image(*s, k)) for k, s in enumerate(shapes)})
    found = report(path, capsys, f"--size={size}")
    skipped = len(open_source(str(path), parse_size(size), too_small="skip", cache="off").skipped)
    assert found["too_small"] == skipped == count
    assert found["size"] == (8 if size == "8X8" else size)
    assert main(["data", "check", str(path), "--size", size]) == 0
    line = "  below 8     0\n" if size == "8X8" else f"  below {size} (height x width) {count}\n"
    assert line in capsys.readouterr().out


def test_damage_to_the_container_is_listed(tmp_path, capsys):
    path = write_tar(tmp_path / "set.tar", {f"{k}.png": encoded(noise_image(8, 8, k)) for k in range(4)})
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 600])
    found = report(path, capsys)
    assert found["usable"] == 3 and found["broken"][0][0] == "set.tar"


def test_an_lmdb_is_checked_at_its_largest_size(tmp_path, capsys):
    pytest.importorskip("lmdb")
    for size in (8, 16):
        write_lmdb(tmp_path / str(size), {"0000000": encoded(noise_image(size, size)), "length": b"1"})
    assert report(tmp_path, capsys)["sizes"] == {"16x16": 1}
    assert report(tmp_path, capsys, "--size=8")["sizes"] == {"8x8": 1}
    assert report(tmp_path, capsys, "--size=4x12")["sizes"] == {"16x16": 1}, "as training takes it"


def test_unusable_sources_leave_with_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "broken", {"a.png": b"no"})
    for arguments, message in {
        (str(tmp_path / "none"),): "no such folder or file",
        (str(tmp_path / "empty"),): "no images in the folder",
        (str(tmp_path / "broken"),): "data: none of the 1 images in",
        ("earth",): "data: 'earth' is built in and needs no check",
        (str(tmp_path / "broken"), "--workers=0"): "workers: expected an integer of at least 1, got 0",
        (str(tmp_path / "broken"), "--size=0"): "size: expected a number of at least 1 or HEIGHTxWIDTH, got '0'",
        (str(tmp_path / "broken"), "--size=8by8"): "size: expected a number of at least 1 or HEIGHTxWIDTH, got '8by8'",
    }.items():
        assert main(["data", "check", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("cips: error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert main(["data", "weigh", str(tmp_path)]) == 2
    assert "action" in capsys.readouterr().err


def test_skimages_pictures(capsys, tmp_path):
    skimage = pytest.importorskip("skimage.data")
    for name in ("astronaut", "camera", "coffee"):
        Image.fromarray(getattr(skimage, name)()).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "camera.png", tmp_path / "again.png")
    found = report(tmp_path, capsys)
    assert found["sizes"] == {"512x512": 3, "600x400": 1} and found["modes"] == {"L": 2, "RGB": 2}
    assert found["duplicates"] == [["again.png", "camera.png"]] and not found["broken"]


def test_the_benchmark_prints_its_table_and_leaves_nothing(tmp_path):
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "data_bench.py"
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    small = ["--images=6", "--side=40", "--size=16", "--workers", "1", "2", "--rounds=1", "--batch=4", "--device=cpu"]
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(script), *small, f"--json={out}"],
        env={**os.environ, "TMPDIR": str(scratch)},
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["what"], row["threads"]) for row in rows] == [
        *((f"decode {name}", threads) for name in ("folder", "zip") for threads in (1, 2)),
        ("cache", None),
        ("batches, cpu", None),
    ]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert all(f"| {row['what']} |" in done.stdout for row in rows)
    assert not list(scratch.iterdir())
