"""How a set of images is named on the command line, and how what lies there is recognised."""

from __future__ import annotations

import glob
import re
import tarfile
import zipfile
from pathlib import Path

from ..errors import UsageError
from .container import Container, image_endings
from .folder import FolderFiles
from .lmdb_files import LmdbFiles, sized_folders
from .shards import TarShards
from .zipped import ZipFiles

EARTH = "earth"
EXPECTED = "'earth' (built in), a folder of images, a zip, an LMDB, or WebDataset shards (.tar)"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_container(name: str, size: int | None = None) -> Container:
    """What lies at a path, recognised by its content.

    | path | taken for |
    |---|---|
    | a folder with data.mdb, or with such folders just below it; a file that is an LMDB | LMDB |
    | a folder without images whose files just below it include .tar | WebDataset shards |
    | any other folder | folder of images |
    | a zip | zip |
    | a tar; a pattern such as `set-*.tar` or `set-{000..012}.tar` | WebDataset shards |

    Args:
        name: a path, or a pattern of shards.
        size: of the training images, for an LMDB with several.

    Raises:
        UsageError: nothing there, nothing known, or no images in it.
    """
    container = _recognise(name, size)
    if not container.names:
        container.close()
        broken = "; ".join(f"{part} {reason}" for part, reason in container.damage[:1])
        other = f" ({len(container.others)} files with other endings)" if container.others else ""
        raise UsageError(
            f"data: no images in the {container.kind} {name!r}{' or below it' * (container.kind == 'folder')}"
            f"{other}{': ' if broken else ''}{broken}"
        )
    return container


def data_name(name: str) -> str:
    """A short name of a set for files and folders: of `sets/ffhq-{00..12}.tar` it is `ffhq`."""
    if name == EARTH:
        return name
    last = Path(name).name if _is_pattern(name) else Path(name).resolve().name
    if last == "data.mdb":
        last = Path(name).resolve().parent.name
    last = re.sub(r"\.(zip|tar|mdb|lmdb)$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^\w.]+$", "", re.split(r"[{*?\[]", last)[0]) or "images"


def _recognise(name: str, size: int | None) -> Container:
    path = Path(name)
    if path.is_dir():
        return _recognise_folder(path, size)
    if path.is_file():
        return _recognise_file(path, size)
    if _is_pattern(name):
        shards = _expand(name)
        if shards:
            return TarShards(name, shards)
        raise UsageError(f"data: no file matches {name!r}")
    raise UsageError(f"data: expected {EXPECTED}, got {name!r} (no such folder or file)")


def _recognise_folder(path: Path, size: int | None) -> Container:
    try:
        shards = sorted(path.glob("*.tar"))
        if (path / "data.mdb").is_file() or sized_folders(path):
            return LmdbFiles(path, size)
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from error
    files = FolderFiles(path)
    return TarShards(path, shards) if shards and not files.names else files


def _recognise_file(path: Path, size: int | None) -> Container:
    ending = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from error
    if ending == ".zip" or zipfile.is_zipfile(path):
        return ZipFiles(path)
    if ending == ".tar" or tarfile.is_tarfile(path):
        return TarShards(path, [path])
    if path.name == "data.mdb":
        return LmdbFiles(path.parent, size)
    if ending in (".mdb", ".lmdb"):
        return LmdbFiles(path, size)
    if not head:
        what = "an empty file"
    elif ending in image_endings():
        what = "a file: one image; give the folder it lies in"
    else:
        what = "a file of no known kind"
    raise UsageError(f"data: expected {EXPECTED}, got {str(path)!r} ({what})")


def _is_pattern(name: str) -> bool:
    return bool(re.search(r"[*?\[]", name) or _RANGE.search(name))


def _expand(name: str) -> list[Path]:
    """Files that a pattern stands for. A number that `{000..012}` names must be there; `*` takes what is."""
    span = _RANGE.search(name)
    if span is None:
        return [Path(found) for found in sorted(glob.glob(name))]
    first, last = span.groups()
    numbers = [str(k).zfill(len(first)) for k in range(int(first), int(last) + 1)]
    names = [f"{name[: span.start()]}{number}{name[span.end() :]}" for number in numbers]
    paths = [path for each in names for path in (_expand(each) if _is_pattern(each) else [Path(each)])]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"data: the shard {path} of {name!r} is not there")
    return paths
