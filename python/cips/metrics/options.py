"""The metrics by name, and what the library calls them."""

from __future__ import annotations

from ..errors import UsageError

# the task of torch-fidelity that computes each
METRICS = {"fid": "fid", "kid": "kid", "precision": "prc", "recall": "prc", "is": "isc"}
DEFAULT = "fid,kid,precision,recall,is"
EXTRA = "pip install -e '.[metrics]'"


def parse_metrics(text: str) -> tuple[str, ...]:
    """("fid", "kid") from "fid,kid": in the order of `METRICS`, each once.

    Raises:
        UsageError: one is not known, or there is none.
    """
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UsageError(
            f"metrics: expected some of {','.join(METRICS)}, got {unknown[0] if unknown else text!r}"
        )
    return tuple(name for name in METRICS if name in names)
