"""The official CIPS data base (LMDB): JPEGs under numbers, one data base a size, opened for reading only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .container import Container

LENGTH = "length"  # the key that holds the number of images
_NUMBER = re.compile(r"\d{7,}")  # of the official prepare_data.py
_SIZED = re.compile(r"(\d+)-\d{5,}")  # of StyleGAN2 in PyTorch: several sizes in one data base


class LmdbFiles(Container):
    """The images of an LMDB.

    Two sets of keys are known: `0000000`, `0000001`, ... (official CIPS) and `256-00000`, `256-00001`, ...
    (several sizes in one data base, of which the smallest that is not below `size` is taken, else the largest).
    `length`, where it is there, is the number of images; keys that are missing count as damaged images.

    Args:
        path: a folder with data.mdb in it, or a data base of one file; or a folder of such folders, one a size,
            with the size at the end of their names.
        size: of the training images; None: the largest.

    Raises:
        UsageError: the package lmdb is missing; not an LMDB; keys of neither kind.
    """

    def __init__(self, path: str | os.PathLike[str], size: int | None = None) -> None:
        self.path, self.others, self.damage = Path(path), [], []
        base, self.kind = self.path, "LMDB"
        if self.path.is_dir() and not (self.path / "data.mdb").is_file():
            sizes = sized_folders(self.path)
            chosen = choose_size(sizes, size)
            base, self.kind = sizes[chosen], f"LMDB of {chosen} px"
        self._environment = _open(base)
        self._data_file = base / "data.mdb" if base.is_dir() else base
        try:
            self._list_keys(size)
        except BaseException:
            self.close()
            raise

    def _list_keys(self, size: int | None) -> None:
        with self._environment.begin() as transaction:
            length = transaction.get(LENGTH.encode())
            keys = [
                bytes(key).decode(errors="replace") for key in transaction.cursor().iternext(values=False)
            ]
        numbers = [key for key in keys if _NUMBER.fullmatch(key)]
        sized = {key: int(match[1]) for key in keys if (match := _SIZED.fullmatch(key))}
        if numbers:
            names, form = numbers, "{:07d}"
        elif sized:
            chosen = choose_size({value: value for value in sized.values()}, size)
            names, form = [key for key, value in sized.items() if value == chosen], f"{chosen}-{{:05d}}"
            self.kind = f"LMDB of {chosen} px"
        else:
            shown = ", ".join(repr(key) for key in keys[:3]) or "none"
            raise UsageError(
                f"data: {self.path}: expected an LMDB with keys such as '0000000' or '256-00000', found {shown}"
            )
        if length is not None:
            try:
                count = int(length)
            except ValueError:
                self.damage.append((LENGTH, f"expected a number, got {bytes(length)[:20]!r}"))
            else:
                # what `length` promises and is not there is reported when it is read
                names = sorted({*names, *(form.format(k) for k in range(count))})
        self.names = names

    def read(self, number: int) -> bytes:
        with self._environment.begin() as transaction:
            data = transaction.get(self.names[number].encode())
        if data is None:
            raise KeyError("the data base has no such key")
        return bytes(data)

    def stamps(self) -> Iterator[tuple[Any, ...]]:
        status = self._data_file.stat()
        yield status.st_size, status.st_mtime_ns
        for name in self.names:
            yield (name,)

    def close(self) -> None:
        self._environment.close()


def sized_folders(folder: Path) -> dict[int, Path]:
    """Folders with an LMDB just below `folder`, by the number at the end of their names; `{}`: none."""
    found = {}
    for path in sorted(folder.iterdir()):
        number = re.search(r"(\d+)\D*$", path.name)
        if number and (path / "data.mdb").is_file():
            found[int(number[1])] = path
    return found


def choose_size(sizes: dict[int, Any], wanted: int | None) -> int:
    """The smallest of `sizes` that is at least `wanted`, else the largest."""
    return min((s for s in sizes if wanted is not None and s >= wanted), default=max(sizes))


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UsageError(
            f"data: {path} is an LMDB and needs the package lmdb; install it with: pip install lmdb"
        ) from error
    try:
        # nothing is locked or written: the data base may lie on a medium that cannot be written
        return lmdb.open(
            str(path), readonly=True, lock=False, readahead=False, meminit=False, subdir=path.is_dir()
        )
    except lmdb.Error as error:
        raise UsageError(f"data: {path} cannot be opened as an LMDB ({error})") from error
