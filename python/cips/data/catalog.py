"""From what the command line says to a set of training images."""

from __future__ import annotations

from ..errors import UsageError
from ..grids import as_size
from .cache import Say, decoded_images, default_workers, in_order, refusal
from .decode import upright_size
from .earth import EarthCrops
from .prepare import Preparation, TooSmallError
from .recognise import EARTH, data_name, open_container
from .source import ImageSource
from .stored import StoredImages

LISTED = 5  # skipped files named one by one


def open_source(
    name: str,
    size: int | tuple[int, int],
    *,
    crop: str = "centre",
    load_size: int | None = None,
    too_small: str = "refuse",
    cache: str | None = None,
    workers: int | None = None,
    say: Say = lambda text: None,
) -> ImageSource:
    """The images called `name`: "earth", or what lies at a path (see `open_container`).

    Files that are no whole images are skipped, and `say` is told of them; a set of one image is a set.

    Args:
        name: "earth", a path, or a pattern of shards.
        size: of the training images, one number or (height, width).
        crop, load_size, too_small: see `Preparation`; of "earth", whose crops always are random, only their
            defaults.
        cache, workers: see `decoded_images`.
        say: gets lines of text: what was recognised, where images come from, what was skipped.

    Raises:
        UsageError: nothing known lies there, or the images cannot serve `size`.
    """
    preparation = Preparation(size, crop, load_size, too_small)
    if name == EARTH:
        if load_size is not None or too_small != "refuse":
            raise UsageError("data 'earth': cuts its own crops; load_size and too_small are for other data")
        return EarthCrops(preparation.size)
    with open_container(name, max(as_size(size))) as container:
        others = f", {len(container.others)} other files" if container.others else ""
        say(f"data {name}: {container.kind}, {len(container)} images{others}")
        decoded = decoded_images(container, preparation, cache=cache, workers=workers, say=say)
    if decoded.skipped:
        say(f"skipped {len(decoded.skipped)} of {len(decoded.skipped) + len(decoded.names)} images:")
        for file, why in decoded.skipped[:LISTED]:
            say(f"  {file}: {why}")
        if len(decoded.skipped) > LISTED:
            say(f"  and {len(decoded.skipped) - LISTED} more; see cips data check {name}")
    return StoredImages(decoded, preparation.size, data_name(name))


def check_fit(
    name: str,
    size: int | tuple[int, int],
    *,
    crop: str = "centre",
    load_size: int | None = None,
    too_small: str = "refuse",
    workers: int | None = None,
) -> None:
    """Whether the images called `name` can serve a size that they are to be used at later: their heads are read, nothing
    is decoded or kept.

    Args:
        name, size, crop, load_size, too_small, workers: as in `open_source`.

    Raises:
        UsageError: one is too small and is not to be, or none is left; nothing known lies there.
    """
    preparation = Preparation(size, crop, load_size, too_small)
    if name == EARTH:
        EarthCrops(preparation.size)
        return
    with open_container(name, max(as_size(size))) as container:
        left, small = 0, None
        heads = in_order(container, lambda k: upright_size(container.read(k)), workers or default_workers())
        for file, found in heads:
            if isinstance(found, Exception):  # will be skipped
                continue
            try:
                preparation.check_size(*found)
            except TooSmallError as error:
                if too_small == "refuse":
                    raise refusal(container, file, error) from error
                small = f"{file}: {error}"
            else:
                left += 1
        if small is not None and not left:
            raise UsageError(f"data: none of the {len(container)} images in {container.path} can be used; {small}")
