"""docs/grids.md: its examples run as they stand, it leaves no grid out, and its pictures are those of its script."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cips import grids

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "grids.md").read_text(encoding="utf-8")


@torch.no_grad()
def test_the_examples_run():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(block, names)
        for shape in re.findall(r"^(\w+) = .*# (\[[\d, ]+\])", block, re.MULTILINE):
            assert str(list(names[shape[0]].shape)) == shape[1], shape


def test_every_grid_is_there():
    helpers = {"WRAPS", "as_size", "coordinate", "parse_size"}
    for name in set(grids.__all__) - helpers:
        assert f"`{name}(" in TEXT, name


@pytest.fixture(scope="module")
def drawn() -> dict[str, Image.Image]:
    spec = importlib.util.spec_from_file_location("draw_grids", DOCS / "draw_grids.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pictures()


def test_every_picture_is_shown_and_up_to_date(drawn):
    assert set(re.findall(r"\(grids/(\w+)\.png\)", TEXT)) == set(drawn)
    assert {path.stem for path in (DOCS / "grids").iterdir()} == set(drawn)
    for name, image in drawn.items():
        with Image.open(DOCS / "grids" / f"{name}.png") as kept:
            difference = np.asarray(kept.convert("RGB")).astype(int) - np.asarray(image)
        # kept with fewer colours
        assert np.abs(difference).mean() < 2, name
