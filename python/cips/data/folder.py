"""A folder of images and its subfolders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .container import Container, split_names


class FolderFiles(Container):
    """Every file below a folder whose ending PIL knows; hidden files and folders are left out.

    Args:
        folder: an existing folder. Links to files are followed, links to folders are not.
    """

    kind = "folder"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.damage = []

        def note(error: OSError) -> None:
            self.damage.append((str(error.filename), f"cannot be listed: {error.strerror}"))

        found = []
        for here, _, files in os.walk(self.path, onerror=note):
            below = Path(here).relative_to(self.path)
            found += [(below / name).as_posix() for name in files]
        self.names, self.others = split_names(found)

    def read(self, number: int) -> bytes:
        return (self.path / self.names[number]).read_bytes()

    def stamps(self) -> Iterator[tuple[Any, ...]]:
        for name in self.names:
            try:
                status = (self.path / name).stat()
            except OSError:  # a broken link; the reader will say so
                yield name, None
            else:
                yield name, status.st_size, status.st_mtime_ns
