"""The library's formulas on features of generated and of real images."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from .options import METRICS
from .share import exchange_values, rank_and_world

NEIGHBOURS = 3  # of Kynkaanniemi et al. 2019, and the library's default
FEWEST = {"fid": 2, "kid": 2, "prc": NEIGHBOURS + 1, "isc": 2}
OUTPUTS = {
    "fid": ("fid",),
    "kid": ("kid", "kid_std"),
    "prc": ("precision", "recall"),
    "isc": ("is", "is_std"),
}


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What the formulas depend on beside the features; the library's defaults where the sets are large enough.

    Attributes:
        kid_subsets: number of random subsets.
        kid_subset_size: images of each: 1,000, or as many as the smaller set has.
        isc_splits: parts of the generated images: 10, or as many as give each two images.
        prc_neighborhood: which neighbour's distance is a sample's radius.
        rng_seed: of the subsets and the shuffling.
    """

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    isc_splits: int = 10
    prc_neighborhood: int = NEIGHBOURS
    rng_seed: int = 2020

    @classmethod
    def of(cls, generated: int, real: int) -> ScoreOptions:
        """Those for sets of so many images."""
        return cls(kid_subset_size=min(1000, generated, real), isc_splits=max(min(10, generated // 2), 1))


def check_counts(metrics: Sequence[str], generated: int, real: int) -> None:
    """Raise UsageError where a metric needs more images."""
    for metric in metrics:
        fewest = FEWEST[METRICS[metric]]
        for what, count in (("generated", generated), ("real", real)):
            if count < fewest and not (metric == "is" and what == "real"):
                raise UsageError(f"metrics: {metric} needs at least {fewest} {what} images, got {count}")


def scores(
    metrics: Sequence[str],
    generated: Mapping[str, Tensor],
    real: Mapping[str, Tensor],
    layers: Mapping[str, str],
    options: ScoreOptions,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Values by name: "fid", "kid" and "kid_std", "precision", "recall", "is" and "is_std", as far as asked for.

    The tasks are dealt out to the processes of `torch.distributed`; each gets all values.

    Args:
        metrics: of `METRICS`.
        generated, real: float32 features `[N, F]` by layer, on the CPU, the same in every process.
        layers: by task of the library.
        options: see there.
        device: where distances between all pairs of features are taken, in full float32.
    """
    rank, world = rank_and_world()
    tasks = list(dict.fromkeys(METRICS[metric] for metric in metrics))
    names = [name for task in tasks for name in OUTPUTS[task]]
    mine = {name: math.nan for name in names}
    for number, task in enumerate(tasks):
        if number % world == rank:
            layer = layers[task]
            mine |= zip(OUTPUTS[task], _task(task, generated[layer], real.get(layer), options, device))
    everyone = exchange_values(torch.tensor(list(mine.values()), dtype=torch.float64))
    values = {}
    for number, task in enumerate(tasks):
        for name in OUTPUTS[task]:
            values[name] = float(everyone[number % world][names.index(name)])
    return {name: value for name, value in values.items() if name.removesuffix("_std") in metrics}


def _task(
    task: str, generated: Tensor, real: Tensor | None, options: ScoreOptions, device: torch.device | str
) -> list[float]:
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    settings = {**dataclasses.asdict(options), "verbose": False}
    if task == "isc":
        found = metric_isc.isc_featuresdict_to_metric({"": generated}, "", **settings)
    elif task == "fid":
        statistics = [metric_fid.fid_features_to_statistics(features) for features in (generated, real)]
        found = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    elif task == "kid":
        found = metric_kid.kid_features_to_metric(generated, real, **settings)
    else:
        # in parts: 50,000 images against as many would otherwise take 40 GB
        assert real is not None
        pair = [features.to(device) for features in (generated, real)]
        with _full_float32():
            found = metric_prc.prc_features_to_metric(*pair, save_cpu_ram=True, **settings)
    return list(found.values())[: len(OUTPUTS[task])]


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32, which a distance taken from a product of nearly equal features would not survive."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
