"""The network whose features are compared: opened from files that are here, never downloaded, and named in results."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..states import read_torch_file
from .options import EXTRA, METRICS

AUTO = "auto"
OFFLINE = "effnet-lite0"
INCEPTION = "inception-v3-compat"
NICKNAMES = {"inception": INCEPTION, "inception-v3": INCEPTION}
LABELS = {OFFLINE: "EffNetLite0", INCEPTION: "Inception-v3", "vgg16": "VGG16"}
# weights-inception-2015-12-05-6726825d.pth and pt_inception-2015-12-05-6726825d.pth are one file
INCEPTION_2015 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network and which of its layers each task reads.

    Attributes:
        module: called with uint8 `[B, 3, H, W]`, returns a tuple of float32 `[B, F]`, one a layer of `names`.
        label: short, for the names of results and files; contains a digest of the weights where they are not known.
        standard: whether these are the weights that "FID", "KID" and "IS" mean in the literature.
        layers: by task of the library: "fid", "kid", "prc", "isc".
        weights: the file they came from, or None.
        identity: digest of the parameters, the code and the library's version; equal identities give equal features.
    """

    module: nn.Module
    label: str
    standard: bool
    layers: dict[str, str]
    weights: str | None
    identity: str

    @property
    def names(self) -> list[str]:
        """Layers that `features` returns, in order."""
        return list(self.module.features_list)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 `[B, H, W, 3]` on any device -> float32 `[B, F]` on the extractor's, one a layer."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).contiguous()
        with torch.autocast(self.device.type, enabled=False):
            return tuple(rows.float() for rows in self.module(pixels))

    def title(self, metric: str) -> str:
        """What a metric measured with this extractor is called: "FID" only for the weights that the name stands for."""
        if metric in ("precision", "recall"):
            return f"{metric}-{self.label}"
        plain = metric.upper()
        return plain if self.standard else f"{plain.replace('ID', 'D')}-{self.label}"


def open_extractor(
    name: str = AUTO,
    weights: str | None = None,
    metrics: Sequence[str] = tuple(METRICS),
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor called `name`, on a device. torch's random numbers are left as they were.

    Args:
        name: "effnet-lite0", whose weights a package carries; "inception" or another name registered with
            torch-fidelity, with `weights`; "module:Class", a `torch_fidelity.FeatureExtractorBase` of the user's; "auto":
            inception where `weights` are given, effnet-lite0 otherwise.
        weights: file of its weights.
        metrics: what is to be measured, of `METRICS`.
        device: where it computes.

    Raises:
        UsageError: a package or file is missing; the weights are another network's; a name is unknown; it has no features
            for a metric.
    """
    if name == AUTO:
        name = INCEPTION if weights else OFFLINE
    name = NICKNAMES.get(name, name)
    if weights is not None and not Path(weights).is_file():
        raise UsageError(f"weights: {weights}: no such file")
    cls = _find(name, weights)
    tasks = dict.fromkeys(METRICS[metric] for metric in metrics)
    try:
        layers = {task: str(cls.get_default_feature_layer_for_metric(task)) for task in tasks}
    except (KeyError, ValueError, NotImplementedError) as error:
        raise UsageError(f"extractor: {name!r} has no features for {','.join(metrics)} ({error})") from error
    wanted = list(dict.fromkeys(layers.values()))
    with torch.random.fork_rng(devices=[]):  # its layers are drawn at random before they are loaded
        try:
            module = cls(name, wanted, feature_extractor_weights_path=weights, verbose=False)
        except UsageError:
            raise
        except Exception as error:  # the library's and the user's own extractors raise what they like
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UsageError(f"extractor: {name!r} cannot be made of {weights}: {reason}") from error
    module = module.requires_grad_(False).eval()
    label, standard = LABELS.get(name, name.rpartition(":")[2]), False
    if weights is not None:
        digest = _file_digest(Path(weights))
        standard = name == INCEPTION and digest == INCEPTION_2015
        label += "" if standard else f"-{digest[:8]}"
    return Extractor(module.to(device), label, standard, layers, weights, _identity(module))


def _find(name: str, weights: str | None) -> Any:
    """The class called `name`; what would make the library download something is refused here."""
    try:
        from torch_fidelity import FeatureExtractorBase, registry
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"metrics: need torch-fidelity ({reason}); install the extra: {EXTRA}") from error
    if name == OFFLINE:
        try:
            from .effnet import EffNetLite0
        except ImportError as error:
            raise UsageError(
                f"extractor: {OFFLINE!r} needs the packages that carry it ({error}); install the extra: {EXTRA}"
            ) from error
        return EffNetLite0
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"extractor: {name!r} cannot be imported ({error})") from error
        if not (isinstance(cls, type) and issubclass(cls, FeatureExtractorBase)):
            raise UsageError(
                f"extractor: expected a subclass of torch_fidelity.FeatureExtractorBase, got {name!r}"
            )
        return cls
    known = registry.FEATURE_EXTRACTORS_REGISTRY
    if name not in known:
        raise UsageError(
            f"extractor: expected {AUTO}, {OFFLINE}, module:Class, or {', '.join(sorted(known))}; got {name!r}"
        )
    if weights is None:
        raise UsageError(f"extractor: {name!r} needs --weights FILE; nothing is downloaded")
    if name == INCEPTION:
        read_torch_file(
            weights, "state dict"
        )  # the library would unpickle anything: only tensors get through to it
    return known[name]


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _identity(module: nn.Module) -> str:
    """Digest of what determines the features."""
    digest = hashlib.sha256(importlib.metadata.version("torch-fidelity").encode())
    source = inspect.getsourcefile(type(module))
    digest.update(Path(source).read_bytes() if source else type(module).__qualname__.encode())
    for key, value in sorted(module.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{key}{array.dtype}{list(array.shape)}".encode())
        digest.update(array.view(torch.uint8).numpy().data if array.dim() else str(array.item()).encode())
    return digest.hexdigest()
