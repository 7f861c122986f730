"""docs/gallery.md: its pictures are there, its commands are those of make.sh, its example and its configuration run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from cips import Generator, checkpoint
from cips.cli import main

DOCS = Path(__file__).parents[1] / "docs"
GALLERY = DOCS / "gallery"
TEXT = (DOCS / "gallery.md").read_text(encoding="utf-8")
COMMANDS = {"sample", "interpolate", "mix", "panorama", "blend", "foveate", "upscale", "giga"}


def test_every_picture_is_there_and_shown():
    shown = set(re.findall(r"gallery/(\w+\.(?:png|gif))", TEXT))
    assert shown == {path.name for path in GALLERY.iterdir() if path.suffix in {".png", ".gif"}}


def test_every_command_has_a_picture_of_its_own():
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        pictures = re.findall(r"gallery/(\w+)\.(?:png|gif)", part)
        lines = re.findall(r"^    cips (\w+) runs/earth-128 --out (\S+)", part, re.MULTILINE)
        assert {Path(out).stem for _, out in lines} == set(pictures), part.splitlines()[0]
    assert set(re.findall(r"^    cips (\w+) runs/earth-128 ", TEXT, re.MULTILINE)) == COMMANDS


def test_the_commands_are_those_that_drew_the_pictures():
    script = (GALLERY / "make.sh").read_text(encoding="utf-8")
    drawn = re.sub(r'"\$(?:out|work)/(\S+)"', r"\1", script).replace('"$run"', "runs/earth-128")
    drawn = set(re.findall(r"^cips .*", drawn, re.MULTILINE))
    told = set(re.findall(r"^    (cips \w+ runs/.*)", TEXT, re.MULTILINE))
    told = {line.replace("circle-mask.png", "mask.png") for line in told if "--count 10000" not in line}
    assert told == drawn
    for number in ("128, 128", "28, 28, 99, 99"):  # the mask
        assert number in script and number in TEXT


def test_the_example_runs(tmp_path, monkeypatch):
    (tmp_path / "runs" / "earth-128").mkdir(parents=True)
    checkpoint.save_generator(tmp_path / "runs" / "earth-128" / "generator.safetensors", Generator("small"))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict = {}
    with torch.no_grad():
        exec(example, names)
    assert names["picture"].shape[0] == 3 and names["colours"].shape == (3, len(names["points"]), 3)


def test_the_configuration_is_that_of_the_command(capsys):
    (command,) = re.findall(r"^    (cips train .*)", TEXT, re.MULTILINE)
    kept = yaml.safe_load((GALLERY / "earth-128.yaml").read_text(encoding="utf-8"))
    for name, value in re.findall(r"--(\S+) (\S+)", command):
        assert str(kept[name.replace("-", "_")]) == value, name
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(GALLERY / "earth-128.yaml"), "--print_config"])
    assert stop.value.code == 0
    read = yaml.safe_load(capsys.readouterr().out)
    assert {key: read[key] for key in kept} == kept
