"""What holds the files of a data set: a folder, an archive, a data base."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any


class Container(ABC):
    """Encoded images by number, wherever they lie. Reading is safe from several threads at once.

    Attributes:
        path: what was opened.
        kind: in words, for messages: "folder", "zip", ...
        names: of the images, sorted; a name is unique.
        others: names of files that are not images by their ending.
        damage: (name, reason) of parts of the container that cannot be read at all.
    """

    path: Path
    kind: str
    names: list[str]
    others: list[str]
    damage: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The encoded image `names[number]`.

        Raises:
            Exception: of any kind, where this one image is damaged.
        """

    @abstractmethod
    def stamps(self) -> Iterable[tuple[Any, ...]]:
        """What changes when the content does: names, sizes, times, in an order of its own."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of the kind and the stamps."""
        digest = hashlib.sha256(self.kind.encode())
        for stamp in self.stamps():
            digest.update(repr(stamp).encode())
        return digest.hexdigest()

    def close(self) -> None:  # noqa: B027 (a folder has nothing to close)
        """Gives back files and locks; nothing can be read after it."""

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def image_endings() -> set[str]:
    """Every file ending, such as ".png", that PIL can open."""
    from PIL import Image

    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder it lies in, is one that systems leave behind: `.name`, `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def split_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Images and other files, both sorted; hidden ones are left out."""
    endings = image_endings()
    images: list[str] = []
    others: list[str] = []
    for name in sorted(names):
        if not is_hidden(name):
            (images if PurePosixPath(name).suffix.lower() in endings else others).append(name)
    return images, others
