"""State dicts from files and elsewhere: read without running anything, and checked key by key."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

_REFUSED = re.compile(r"GLOBAL (\S+)")


def read_torch_file(path: str | os.PathLike[str], what: str, *, lazy: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU; only tensors, numbers, strings and their containers are read.

    Args:
        path: the file.
        what: what it should hold, for the message.
        lazy: leave tensors on the disk until they are looked at, where the file's form allows it.

    Raises:
        UsageError: no such file, a file that is not whole, or one that holds objects of other classes.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols: they fail or they are read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy and zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        text = str(error).strip()
        if refused := _REFUSED.search(text):
            reason = (
                f"it holds more than tensors and numbers, {refused[1]}, and is not read since that could run code;"
                " save its state dicts alone"
            )
        elif "weights_only" in text:  # torch's advice here, to read it in a way that runs code, is not ours
            reason = "torch.save has not written it, or it is damaged"
        else:
            reason = text.splitlines()[0] if text else type(error).__name__
        raise UsageError(f"{path}: not a whole {what} ({reason})") from error


def check_state(source: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UsageError, naming `source` and the key, unless both have the same keys with the same shapes."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for kind, keys in (("is missing", missing), ("is not expected", extra)):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise UsageError(f"{source}: key {keys[0]!r} {kind}{more}")
    for key, want in expected.items():
        if found[key].shape != want.shape:
            raise UsageError(
                f"{source}: key {key!r}: expected shape {list(want.shape)}, got {list(found[key].shape)}"
            )
