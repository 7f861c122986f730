"""A generator measured against a set of real images, and what is said about it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import atomic_file
from ..data import ImageSource
from ..errors import UsageError
from ..pictures import to_uint8
from .extractors import Extractor
from .kept import features_file, features_key, images_digest, read_features, size_name, write_features
from .scores import ScoreOptions, check_counts, scores
from .share import all_agree, rank_and_world, share_rows

Draw = Callable[[Tensor, int], Tensor]
Say = Callable[[str], None]
CACHE_OFF = "off"
PACKAGES = ("cips-kernels", "torch", "torch-fidelity", "torchvision", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results and all that they depend on.

    Attributes:
        values: by title, such as "FD-EffNetLite0"; spreads end in "_std": of KID over its subsets, of IS over its splits.
        extractor: its label, layers, weights and identity, and whether it is the standard one.
        data: name, size, number and digest of the real images.
        generated: number, seed and batch of the generated ones, and what else the caller noted.
        options: of the formulas.
        versions: of the packages, of Python, and the device.
        seconds: from the first generated image to the last value.
    """

    values: dict[str, float]
    extractor: dict[str, Any]
    data: dict[str, Any]
    generated: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def table(self) -> str:
        """For people: a line a metric under two about what was compared."""
        weights = self.extractor["weights"]
        lines = [
            f"{self.generated['count']} generated images against {self.data['count']} of {self.data['name']}, "
            f"{self.data['size']} px",
            f"extractor {self.extractor['label']}{f', {Path(weights).name}' if weights else ''}; "
            f"torch-fidelity {self.versions['torch-fidelity']}, torch {self.versions['torch']}",
        ]
        shown = {name: value for name, value in self.values.items() if not name.endswith("_std")}
        width = max(map(len, shown))
        for name, value in shown.items():
            spread = self.values.get(f"{name}_std")
            lines.append(
                f"  {name:{width}}  {value:10.5g}" + (f"  +- {spread:.3g}" if spread is not None else "")
            )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, written whole."""
        with atomic_file(path) as file:
            file.write((json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())


class Evaluator:
    """Measures generators against one set of real images, whose features it computes once and keeps.

    Where `torch.distributed` is initialised, every process makes one with the same arguments and calls it at the same
    time: each generates, extracts and computes its share, and each gets the result, which does not depend on how many
    they are.

    Args:
        source: the real images, each as it is shown without anything random: not mirrored, cut out of the middle.
        extractor: opened for the metrics.
        metrics: of `METRICS`.
        count: images to generate.
        batch: images at a time.
        seed: of the latents; batch k is drawn with noise seed `seed + k * batch`, as `cips sample` does.
        cache: folder of real features, by default that of the data; "off": none.
        say: is told in one line where the real features came from.
        progress: show bars (the first process alone does).

    Raises:
        UsageError: too few images for a metric.
    """

    def __init__(
        self,
        source: ImageSource,
        extractor: Extractor,
        metrics: Sequence[str],
        *,
        count: int = 50_000,
        batch: int = 16,
        seed: int = 0,
        cache: str | None = None,
        say: Say = lambda text: None,
        progress: bool = False,
    ) -> None:
        for name, value in (("count", count), ("batch", batch)):
            if value < 1:
                raise UsageError(f"{name}: expected an integer of at least 1, got {value}")
        check_counts(metrics, count, len(source))
        self.source, self.extractor, self.metrics = source, extractor, tuple(metrics)
        self.count, self.batch, self.seed, self.cache, self.say = count, min(batch, count), seed, cache, say
        self.options = ScoreOptions.of(count, len(source))
        self.progress = progress and rank_and_world()[0] == 0
        self._real: dict[str, Tensor] | None = None
        self._digest = ""

    def __call__(self, draw: Draw, style_dim: int, **notes: Any) -> Evaluation:
        """Measures what `draw` makes.

        Args:
            draw: gets latents `[batch, style_dim]` on the CPU, always so many, and a noise seed; returns images
                `[batch, 3, H, W]` in [-1, 1] on any device.
            style_dim: of the latents.
            notes: about the generator, for the result.
        """
        real = self.real_features()
        began = time.perf_counter()
        generated = self.generated_features(draw, style_dim)
        found = scores(
            self.metrics, generated, real, self.extractor.layers, self.options, self.extractor.device
        )
        titles = {name: self.extractor.title(name.removesuffix("_std")) for name in found}
        extractor = self.extractor
        return Evaluation(
            values={titles[name] + "_std" * name.endswith("_std"): value for name, value in found.items()},
            extractor={
                "label": extractor.label,
                "class": f"{type(extractor.module).__module__}.{type(extractor.module).__qualname__}",
                "standard": extractor.standard,
                "layers": extractor.layers,
                "weights": extractor.weights,
                "identity": extractor.identity,
            },
            data={
                "name": self.source.name,
                "size": size_name(self.source),
                "count": len(self.source),
                "digest": self._digest,
            },
            generated={"count": self.count, "seed": self.seed, "batch": self.batch, **notes},
            options=dataclasses.asdict(self.options),
            versions=_versions(extractor.device),
            seconds=round(time.perf_counter() - began, 3),
        )

    @torch.no_grad()
    def generated_features(self, draw: Draw, style_dim: int) -> dict[str, Tensor]:
        """Features of the generated images by layer, float32 `[count, F]` on the CPU."""
        random = torch.Generator().manual_seed(self.seed)
        latents = torch.randn(self.count, style_dim, generator=random)

        def compute(start: int, stop: int) -> tuple[Tensor, ...]:
            # the last batch may be short: what draws has one shape
            z = torch.nn.functional.pad(
                latents[start:stop], (0, 0, 0, self.batch - (stop - start)), value=1.0
            )
            return self.extractor.features(to_uint8(draw(z, self.seed + start)[: stop - start]))

        return self._rows(self.count, compute, "generated images")

    @torch.no_grad()
    def real_features(self) -> dict[str, Tensor]:
        """Features of the real images by layer: from memory, from the cache, or computed and kept there."""
        if self._real is None:
            self._digest = images_digest(self.source)
            layers = {layer for task, layer in self.extractor.layers.items() if task != "isc"}
            self._real = self._find_real([name for name in self.extractor.names if name in layers])
        return self._real

    def _find_real(self, layers: list[str]) -> dict[str, Tensor]:
        if not layers:
            return {}
        keys = {layer: features_key(self._digest, self.extractor, layer) for layer in layers}
        paths = {k: features_file(self.cache, self.source, self.extractor, k, key) for k, key in keys.items()}
        kept = self.cache != CACHE_OFF
        found = {
            k: read_features(paths[k], keys[k], len(self.source)) if kept else (None, "no cache")
            for k in layers
        }
        reasons = [reason for _, reason in found.values() if reason]
        # all or none: where one process finds nothing, all of them compute
        if all_agree(not reasons):
            self.say(
                f"features of {len(self.source)} real images from the cache {' '.join(map(str, paths.values()))}"
            )
            return {layer: features for layer, (features, _) in found.items() if features is not None}
        self.say(
            f"{reasons[0] if reasons else 'not cached everywhere'}: computing features of {len(self.source)} real images"
        )

        def compute(start: int, stop: int) -> tuple[Tensor, ...]:
            return self.extractor.features(self.source.images(np.arange(start, stop)))

        computed = self._rows(len(self.source), compute, "real images")
        if kept and os.environ.get("LOCAL_RANK", "0") == "0":  # one process a machine
            for layer in layers:
                try:
                    write_features(paths[layer], keys[layer], computed[layer])
                except (
                    UsageError
                ) as error:  # no reason to lose the result, nor to leave the other processes waiting
                    self.say(f"not cached: {error}")
        return {layer: computed[layer] for layer in layers}

    def _rows(self, count: int, compute: Any, what: str) -> dict[str, Tensor]:
        from tqdm import tqdm

        # on a terminal redraw often, in a log file seldom
        every = 0.2 if sys.stderr.isatty() else 15.0
        with tqdm(
            total=count,
            desc=what,
            unit="image",
            delay=2,
            mininterval=every,
            leave=False,
            disable=not self.progress,
        ) as bar:
            return dict(zip(self.extractor.names, share_rows(count, self.batch, compute, bar.update)))


def _versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return found
