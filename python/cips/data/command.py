"""The command `cips data check PATH`."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError
from ..grids import parse_size
from .check import check
from .recognise import EARTH, open_container

USAGE = "cips data check PATH [options]"
DESCRIPTION = "Decode every image of a set and report sizes, formats, duplicates and broken files."


def add_arguments(parser: Any) -> None:
    """Adds the command's arguments to an argparse-like parser."""
    parser.add_argument("action", type=Literal["check"], help="what to do")
    parser.add_argument("path", type=str, help="a folder, zip, LMDB or WebDataset shards")
    parser.add_argument("--json", action="store_true", help="print JSON, with every list in full")
    parser.add_argument(
        "--size", type=str, default=None, help="training size, or HEIGHTxWIDTH: count images too small for it"
    )
    parser.add_argument("--workers", type=int, default=None, help="threads; by default one a processor")


def run(action: str, path: str, json: bool, size: str | None, workers: int | None) -> int:
    """Runs `cips data ACTION` and returns the exit status: 0, with broken files too.

    Raises:
        UsageError: a size of another form; nothing known lies there, no images, or none that can be used; in the
            last case the report has been printed.
    """
    assert action == "check", "the parser allows no other"
    if path == EARTH and not Path(path).exists():
        raise UsageError("data: 'earth' is built in and needs no check; expected a path")
    try:
        pixels = None if size is None else parse_size(size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with open_container(path, None if pixels is None else max(pixels)) as container:
        report = check(container, size=pixels, workers=workers)
    print(json_format.dumps(dataclasses.asdict(report), indent=1) if json else report.text())
    if not report.usable:
        raise UsageError(f"data: none of the {report.files} images in {path} can be used")
    return 0
