"""WebDataset shards: tar files whose members are images, with whatever lies beside them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .container import Container, split_names


class TarShards(Container):
    """The images of one or many uncompressed tar files, read in place by their offsets.

    A shard that breaks off keeps the members before the break, and the break is in `damage`. Of a sample of
    several files (`0001.jpg`, `0001.json`, `0001.cls`) the images are taken, all of them. The package webdataset
    is not needed: it streams, and everything here is read once into a cache.

    Args:
        path: for messages.
        shards: the tar files.

    Raises:
        UsageError: a shard is missing, compressed, or no tar at all.
    """

    def __init__(self, path: str | os.PathLike[str], shards: Sequence[Path]) -> None:
        from tqdm import tqdm

        self.path, self.shards, self.damage = Path(path), sorted(shards), []
        self.kind = f"{len(self.shards)} WebDataset shard{'s' if len(self.shards) != 1 else ''}"
        places: dict[str, tuple[int, int, int]] = {}
        for number, shard in enumerate(tqdm(self.shards, desc="listing shards", delay=2, leave=False)):
            for name, start, length in self._members(shard):
                places[f"{shard.name}/{name}"] = number, start, length
        self.names, self.others = split_names(places)
        self._places = [places[name] for name in self.names]
        self._files = [os.open(shard, os.O_RDONLY) for shard in self.shards]

    def _members(self, shard: Path) -> Iterator[tuple[str, int, int]]:
        try:
            file = tarfile.open(shard, "r:")
        except (OSError, tarfile.TarError) as error:
            reason = _why_not(shard, error)
            raise UsageError(f"data: {shard} is not an uncompressed tar ({reason})") from error
        count = 0
        with file:
            try:
                for member in file:
                    count += 1
                    if member.isreg() and not member.issparse():
                        yield member.name.removeprefix("./"), member.offset_data, member.size
            except (OSError, tarfile.TarError) as error:
                self.damage.append((shard.name, f"breaks off after {count} members ({error})"))

    def read(self, number: int) -> bytes:
        shard, start, length = self._places[number]
        # by position, not by seeking: threads share the descriptor
        data = os.pread(self._files[shard], length, start)
        if len(data) != length:
            raise EOFError(f"the shard ends after {len(data)} of {length} bytes")
        return data

    def stamps(self) -> Iterator[tuple[Any, ...]]:
        for shard in self.shards:
            status = shard.stat()
            yield shard.name, status.st_size, status.st_mtime_ns
        yield from zip(self.names, self._places)

    def close(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        self._files = []


def _why_not(shard: Path, error: Exception) -> str:
    try:
        with tarfile.open(shard):
            return "it is compressed: unpack it first, with gunzip or the like"
    except (OSError, tarfile.TarError):
        return str(error)
