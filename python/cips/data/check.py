"""What a set of images consists of, and what is wrong with it: every file is decoded whole."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Any

from ..errors import UsageError
from ..grids import as_size
from .cache import default_workers, in_order, reason_of
from .container import Container
from .decode import has_alpha, open_image, orientation, to_rgb

SHOWN_SIZES, SHOWN_GROUPS = 10, 10


@dataclasses.dataclass
class Report:
    """The result of `check`.

    Attributes:
        path, kind: of the container.
        size: the training size asked about, as `--size` spells it: a number for squares, or "HEIGHTxWIDTH"; or None.
        files: images by their ending, sound or not.
        usable: images that can be decoded and have a way to RGB.
        bytes: of all encoded images that could be read.
        sizes: number of images by "WIDTHxHEIGHT", upright, the most common first.
        formats, modes: number of images by PIL's names, the most common first.
        alpha, turned, animated: images with transparency, turned by EXIF, of several frames.
        too_small: images that `size` does not fit into; None where no size was asked about.
        duplicates: names of images with the same pixels once they are upright RGB, group by group.
        broken: (name, reason) of what training would skip.
        others: number of other files by ending.
    """

    path: str
    kind: str
    size: int | str | None
    files: int
    usable: int = 0
    bytes: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    modes: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha: int = 0
    turned: int = 0
    animated: int = 0
    too_small: int | None = None
    duplicates: list[list[str]] = dataclasses.field(default_factory=list)
    broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    others: dict[str, int] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """The report to read: lines without a last line break."""
        lines = [
            f"{self.path}: {self.kind}, {self.files} images, {self.bytes / 1e6:.1f} MB",
            f"  usable      {self.usable}",
        ]
        shown = list(self.sizes.items())[:SHOWN_SIZES]
        rest = f", {len(self.sizes) - len(shown)} other sizes" if len(self.sizes) > len(shown) else ""
        lines.append(f"  sizes       {_counts(dict(shown))}{rest}")
        if self.too_small is not None:
            which = " (height x width)" if isinstance(self.size, str) else ""
            lines.append(f"  {f'below {self.size}{which}':11s} {self.too_small}")
        lines.append(f"  formats     {_counts(self.formats)}")
        lines.append(f"  modes       {_counts(self.modes)}")
        for name, count in (("alpha", self.alpha), ("EXIF-turned", self.turned), ("animated", self.animated)):
            if count:
                lines.append(f"  {name:11s} {count}")
        extra = sum(len(group) - 1 for group in self.duplicates)
        lines.append(f"  duplicates  {extra}")
        lines += [f"    {' = '.join(group)}" for group in self.duplicates[:SHOWN_GROUPS]]
        if len(self.duplicates) > SHOWN_GROUPS:
            lines.append(f"    and {len(self.duplicates) - SHOWN_GROUPS} more groups; --json lists all")
        lines.append(f"  broken      {len(self.broken)}")
        lines += [f"    {name}: {reason}" for name, reason in self.broken]
        if self.others:
            lines.append(f"  other files {_counts(self.others)}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Finding:
    bytes: int
    size: tuple[int, int]
    format: str
    mode: str
    alpha: bool
    turned: bool
    animated: bool
    digest: bytes


def check(
    container: Container, *, size: int | tuple[int, int] | None = None, workers: int | None = None
) -> Report:
    """Decodes every image of an open container.

    Args:
        container: from `open_container`.
        size: of the training images, one number or (height, width), to count those too small for it.
        workers: threads; None: one a processor.

    Raises:
        UsageError: a number below 1.
    """
    from tqdm import tqdm

    if workers is not None and workers < 1:
        raise UsageError(f"workers: expected an integer of at least 1, got {workers}")
    try:
        height, width = (0, 0) if size is None else as_size(size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    shown = None if size is None else height if height == width else f"{height}x{width}"
    report = Report(str(container.path), container.kind, shown, len(container), broken=list(container.damage))
    sizes, formats, modes = Counter(), Counter(), Counter()
    groups: dict[bytes, list[str]] = defaultdict(list)
    results = in_order(container, lambda k: _examine(container.read(k)), workers or default_workers())
    for name, found in tqdm(results, total=len(container), desc="checking images", delay=2, leave=False):
        if isinstance(found, Exception):
            report.broken.append((name, reason_of(found)))
            continue
        report.usable += 1
        report.bytes += found.bytes
        sizes[found.size] += 1
        formats[found.format] += 1
        modes[found.mode] += 1
        report.alpha += found.alpha
        report.turned += found.turned
        report.animated += found.animated
        groups[found.digest].append(name)
    report.sizes = {f"{width}x{height}": count for (width, height), count in _ordered(sizes)}
    report.formats, report.modes = dict(_ordered(formats)), dict(_ordered(modes))
    if size is not None:
        report.too_small = sum(count for (w, h), count in sizes.items() if w < width or h < height)
    report.duplicates = [group for group in groups.values() if len(group) > 1]
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in container.others)
    report.others = dict(_ordered(endings))
    return report


def _examine(data: bytes) -> _Finding:
    image = open_image(data)
    rgb = to_rgb(image)
    return _Finding(
        bytes=len(data),
        size=rgb.size,
        format=image.format or "unknown",
        mode=image.mode,
        alpha=has_alpha(image),
        turned=orientation(image) != 1,
        animated=getattr(image, "n_frames", 1) > 1,
        digest=hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).digest(),
    )


def _ordered(counter: Counter[Any]) -> list[tuple[Any, int]]:
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
