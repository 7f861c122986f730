"""A zip of images, such as StyleGAN's `dataset_tool` writes: nested folders, stored or deflated."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .container import Container, split_names

LABELS = "dataset.json"  # StyleGAN's labels, of no use to a generator without classes


class ZipFiles(Container):
    """The images of one zip, read in place.

    Args:
        path: a zip. Its `dataset.json`, if any, is passed over.

    Raises:
        UsageError: not a whole zip.
    """

    kind = "zip"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.damage = []
        try:
            self._file = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UsageError(f"data: {self.path} is not a whole zip ({error})") from error
        # of two entries with one name the later counts, as everywhere
        entries = {entry.filename: entry for entry in self._file.infolist() if not entry.is_dir()}
        self.names, others = split_names(entries)
        self.others = [name for name in others if name != LABELS]
        self._entries = [entries[name] for name in self.names]

    def read(self, number: int) -> bytes:
        return self._file.read(self._entries[number])

    def stamps(self) -> Iterator[tuple[Any, ...]]:
        status = self.path.stat()
        yield status.st_size, status.st_mtime_ns
        for entry in self._entries:
            yield entry.filename, entry.file_size, entry.CRC

    def close(self) -> None:
        self._file.close()
