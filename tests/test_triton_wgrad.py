"""Weight gradients, also of gradients in fragment order: whole numbers, whose sums are exact, so that every bit is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="this machine has no triton")

from cips_kernels.testing import poisoned_empty
from cips_kernels.triton import config, descriptors, layers
from cips_kernels.triton.fragment import to_natural

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16


def fragment_order(width: int) -> list[int]:
    """The channel at each position, as threads hold them: `t` outermost, then `nb`, then `e`."""
    return [
        32 * group + 8 * nb + 2 * t + e
        for group in range(width // 32)
        for t in range(4)
        for nb in range(4)
        for e in range(2)
    ]


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Float64 of -4 to 4: products and sums over a few thousand are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def stored(t: torch.Tensor, fragment: bool, dtype: torch.dtype) -> torch.Tensor:
    """`t` `[..., C]` as memory holds it."""
    return (t[..., fragment_order(t.shape[-1])] if fragment else t).to(DEVICE, dtype).contiguous()


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the kernels load: interpreted, a chip of capability 9.0 is claimed for descriptors; a GPU is what it is."""
    if request.param == "descriptors":
        if CUDA and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("this GPU has no tensor copy engine")
        if not CUDA:
            limits = (config.device_limits(torch.device("cpu"))[0], (9, 0), 8)
            monkeypatch.setattr(descriptors, "device_limits", lambda device: limits)
    else:
        monkeypatch.setattr(descriptors, "usable", lambda *operands: False)
    return request.param


def test_the_order_is_that_of_the_threads():
    channels = torch.arange(96)
    assert to_natural(torch.tensor(fragment_order(96))).tolist() == channels.tolist()
    assert to_natural(channels).tolist() == fragment_order(96)  # its own inverse
    assert to_natural(channels.view(1, 96, 1).expand(2, 96, 3), 1)[1, :, 2].tolist() == fragment_order(96)


@pytest.mark.parametrize("fragment_u", [True, False])
@pytest.mark.parametrize(
    ("batch", "pixels", "out_features", "in_features", "shared"),
    [(2, 130, 64, 96, False), (3, 65, 32, 160, True), (1, 2500, 160, 64, False)],
    ids=["even", "shared", "split"],
)
def test_weight_gradient_in_natural_order(loads, batch, pixels, out_features, in_features, shared, fragment_u):
    dtype = FLOAT16 if loads == "descriptors" or CUDA else FLOAT32
    u = whole_numbers(batch, pixels, out_features, seed=1)
    x = whole_numbers(1 if shared else batch, pixels, in_features, seed=2)
    truth = 0.375 * torch.einsum("bpo,bpi->boi", u, x.expand(batch, -1, -1))
    room = torch.full((batch, out_features, in_features + 16), float("nan"), device=DEVICE)
    out = room[:, :, :in_features]
    operands = stored(u, fragment_u, dtype), stored(x, False, dtype)
    with poisoned_empty():
        layers.layer_wgrad(*operands, out, fragment_u=fragment_u, scale=0.375)
    assert torch.equal(out.double().cpu(), truth)
    assert room[:, :, in_features:].isnan().all()


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_rgb_weight_gradient(channels):
    drgb, x = whole_numbers(2, 130, channels, seed=3), whole_numbers(2, 130, 160, seed=4)
    with poisoned_empty():
        n = layers.rgb_wgrad(drgb.to(DEVICE, FLOAT32), stored(x, False, FLOAT32))
    assert torch.equal(n.double().cpu(), torch.einsum("bpc,bpi->bci", drgb, x))


def test_widths_without_whole_groups_are_refused():
    u, x, out = torch.zeros(1, 8, 48), torch.zeros(1, 8, 64), torch.zeros(1, 48, 64)
    with pytest.raises(ValueError, match="u has 48 channels, expected a multiple of 32"):
        layers.layer_wgrad(u, x, out, fragment_u=True)
    with pytest.raises(ValueError, match="dimension 1 of t has 8 channels"):
        to_natural(u, 1)
