"""Stages of growing size, as text."""

from __future__ import annotations

import re

from ...config import DiscriminatorConfig
from ...errors import UsageError
from ...grids import parse_size

_STAGE = re.compile(r"\s*([0-9x]+)\s*:\s*(\d+)\s*", re.IGNORECASE)


def parse_stages(text: str) -> list[tuple[str, int]]:
    """(size, steps) of each stage from "256:100000,512:50000".

    Raises:
        UsageError: another form, a size that the discriminator cannot have, or sizes that do not grow.
    """
    found: list[tuple[str, int]] = []
    last = (0, 0)
    for part in text.split(","):
        match = _STAGE.fullmatch(part)
        if not match or int(match[2]) < 1:
            raise UsageError(f"stages: expected SIZE:STEPS,SIZE:STEPS,..., got {part!r}")
        try:
            size = parse_size(match[1], "stages")
            DiscriminatorConfig(size)
        except ValueError as error:
            raise UsageError(f"stages: {str(error).removeprefix('stages: ').removeprefix('size: ')}") from error
        if min(a - b for a, b in zip(size, last)) < 0 or size == last:
            raise UsageError(f"stages: expected sizes that grow, got {match[1]} in {text!r}")
        found.append((match[1].lower(), int(match[2])))
        last = size
    return found
