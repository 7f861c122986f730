"""The commands of `cips` that show what a trained generator can do: each module adds its options and runs.

A module has `add(commands, command)`, which registers the subcommand, and `run(**options)`, which returns the exit
status.
"""

from __future__ import annotations

from . import blend, foveate, giga, interpolate, mix, panorama, upscale

COMMANDS = {
    "interpolate": interpolate,
    "mix": mix,
    "panorama": panorama,
    "blend": blend,
    "foveate": foveate,
    "upscale": upscale,
    "giga": giga,
}

__all__ = ["COMMANDS"]
