"""Counter noise: known answers of Philox, which counter each value comes from, its distribution, and its independence of
how an image is cut."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from cips_kernels import noise

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def seed_of(key: tuple[int, int]) -> int:
    """The signed 64-bit seed whose low and high words are `key`."""
    return struct.unpack("<q", struct.pack("<II", *key))[0]


def philox_in_python(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(c)


def normal_in_python(counter: tuple[int, ...], key: tuple[int, int]) -> float:
    """Box and Muller's transform of the first two words."""
    r0, r1, _, _ = philox_in_python(counter, key)
    return math.sqrt(-2 * math.log(((r0 >> 8) + 0.5) / 2**24)) * math.cos(2 * math.pi * (r1 >> 8) / 2**24)


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert philox_in_python(counter, key) == answer
    words = noise.philox(torch.tensor(seed_of(key)), *(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 5, 2**63 - 1, -(2**63)])
def test_value_comes_from_index_image_and_layer(seed):
    key = struct.unpack("<II", struct.pack("<q", seed))
    values = noise.normal(torch.tensor(seed), 3, 2, 5)
    assert values.shape == (2, 5) and values.dtype == torch.float32
    for image in range(2):
        for pixel in range(5):
            want = normal_in_python((pixel, 0, image, 3), key)
            assert values[image, pixel].item() == pytest.approx(want, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("per_image", [False, True])
def test_value_comes_from_the_bits_of_the_coordinates(per_image):
    coords = torch.tensor([[0.0, -1.0], [0.25, 1.0], [-0.7, 1e-30]])
    if per_image:
        coords = torch.stack([coords, coords.flip(0)])
    values = noise.normal(torch.tensor(77), 1, 2, 3, coords)
    for image in range(2):
        points = (coords[image] if per_image else coords).tolist()
        for pixel, (x, y) in enumerate(points):
            want = normal_in_python((bits(x), bits(y), image, 1), (77, 0))
            assert values[image, pixel].item() == pytest.approx(want, rel=2e-5, abs=2e-5)


def test_negative_zero_is_zero():
    plus = torch.tensor([[0.0, 0.5], [0.5, 0.0], [0.0, 0.0]])
    minus = torch.tensor([[-0.0, 0.5], [0.5, -0.0], [-0.0, -0.0]])
    seed = torch.tensor(5)
    assert torch.equal(noise.normal(seed, 0, 1, 3, plus), noise.normal(seed, 0, 1, 3, minus))
    # the sign matters elsewhere
    assert not torch.equal(
        noise.normal(seed, 0, 1, 3, plus + 0.1), noise.normal(seed, 0, 1, 3, -(plus + 0.1))
    )


def grid(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], -1)


def test_a_patch_has_the_noise_of_the_full_image():
    seed, coords = torch.tensor(99), grid(12, 10)
    full = noise.normal(seed, 4, 2, 120, coords.reshape(-1, 2)).view(2, 12, 10)
    patch = coords[3:9, 2:7]
    cut = noise.normal(seed, 4, 2, 30, patch.reshape(-1, 2)).view(2, 6, 5)
    assert torch.equal(cut, full[:, 3:9, 2:7])
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    shuffled = noise.normal(seed, 4, 2, 120, coords.reshape(-1, 2)[order])
    assert torch.equal(shuffled, full.flatten(1)[:, order])


def test_more_pixels_or_images_do_not_change_the_first():
    seed = torch.tensor(3)
    full = noise.normal(seed, 0, 4, 100)
    assert torch.equal(noise.normal(seed, 0, 4, 37), full[:, :37])
    assert torch.equal(noise.normal(seed, 0, 2, 100), full[:2])


def test_pixel_counters():
    low, high = noise.pixel_counters(4, None, torch.device("cpu"))
    assert low.tolist() == [0, 1, 2, 3] and high.tolist() == [0, 0, 0, 0]
    low, high = noise.pixel_counters(3, None, torch.device("cpu"), first=2**32 - 1)
    assert low.tolist() == [0xFFFFFFFF, 0, 1] and high.tolist() == [0, 1, 1]
    low, high = noise.pixel_counters(1, torch.tensor([[-1.0, 0.5]]), torch.device("cpu"))
    assert (low.item(), high.item()) == (bits(-1.0), bits(0.5))
    # float64 coordinates are keyed by their float32 value
    exact, rounded = torch.tensor([[0.1, 0.3]], dtype=torch.float64), torch.tensor([[0.1, 0.3]])
    device = torch.device("cpu")
    assert [c.item() for c in noise.pixel_counters(1, exact, device)] == [
        c.item() for c in noise.pixel_counters(1, rounded, device)
    ]


def assert_standard_normal(values: Tensor) -> None:
    """Moments within five standard errors, and Kolmogorov and Smirnov's distance below its 0.1% quantile."""
    values = values.flatten().double()
    n = values.numel()
    assert values.isfinite().all()
    moments = {
        1: (0.0, 1.0),
        2: (1.0, 2.0),
        3: (0.0, 15.0),
        4: (3.0, 96.0),
    }  # power: mean, variance of that power
    for power, (mean, variance) in moments.items():
        assert abs(values.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / n), power
    levels = torch.special.ndtr(values.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(steps[1:] - levels, levels - steps[:-1]).max().item()
    assert distance < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("keyed", ["index", "coords"])
def test_standard_normal(keyed):
    coords = grid(256, 256).reshape(-1, 2) if keyed == "coords" else None
    assert_standard_normal(noise.normal(torch.tensor(2024), 2, 2, 65536, coords))


def test_layers_images_seeds_and_neighbours_are_uncorrelated():
    pixels = 40000

    def draw(seed: int, layer: int) -> Tensor:
        return noise.normal(torch.tensor(seed), layer, 2, pixels).double()

    base = draw(1, 0)
    others = {
        "image": base[1],
        "layer": draw(1, 1)[0],
        "seed": draw(2, 0)[0],
        "high word of the seed": draw(1 + 2**32, 0)[0],
        "neighbour": base[0].roll(1),
        "row": base[0].roll(200),
    }
    for name, other in others.items():
        assert abs((base[0] * other).mean().item()) < 5 / math.sqrt(pixels), name
        assert abs((base[0].square() * other.square()).mean().item() - 1) < 5 * math.sqrt(8 / pixels), name


@pytest.mark.gpu
@pytest.mark.parametrize("keyed", ["index", "coords"])
def test_on_a_gpu_as_on_the_cpu(keyed):
    coords = grid(20, 30).reshape(-1, 2) if keyed == "coords" else None
    seed = torch.tensor(-123456789)
    here = noise.normal(seed, 5, 3, 600, coords)
    there = noise.normal(seed.cuda(), 5, 3, 600, None if coords is None else coords.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)


# --- counter noise, many layers and a part of the pixels at once ----------------------------------------------------


def plain_normal(seed: int, layer: int, image: int, c0: Tensor, c1: Tensor) -> Tensor:
    """The formula of `noise` written plainly, every word masked, every counter broadcast first."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (c + torch.zeros_like(c0) for c in (c0, c1, torch.tensor(image), torch.tensor(layer)))
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & mask) ^ c1 ^ k0, b & mask, ((a >> 32) & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    radius = torch.sqrt(-2.0 * torch.log(((c0 >> 8).float() + 0.5) * 2.0**-24))
    return radius * torch.cos((2.0 * torch.pi * 2.0**-24) * (c1 >> 8).float())


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63), 123456789012345])
@pytest.mark.parametrize("first, pixels", [(0, 1), (0, 1000), (2**32 - 3, 7), (54321, 4097)])
def test_noise_has_the_bits_of_the_plain_formula(seed, first, pixels):
    c0, c1 = noise.pixel_counters(pixels, None, torch.device("cpu"), first)
    layers = torch.arange(3, 8)[:, None]
    block = noise.normal_at(torch.tensor(seed), c0, c1, torch.tensor(2), layers)
    assert block.shape == (5, pixels)
    for row, layer in zip(block, layers.flatten().tolist()):
        assert torch.equal(row, plain_normal(seed, layer, 2, c0, c1))
    if first == 0:
        assert torch.equal(block[1], noise.normal(torch.tensor(seed), 4, 3, pixels)[2])


def test_noise_of_coordinates_has_the_bits_of_the_plain_formula():
    coords = torch.rand(2, 500, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    bits = coords.view(torch.int32).long() & 0xFFFFFFFF
    values = noise.normal(torch.tensor(99), 6, 2, 500, coords)
    for image in range(2):
        assert torch.equal(values[image], plain_normal(99, 6, image, bits[image, :, 0], bits[image, :, 1]))
    counters = bits[1, :, 0].clone(), bits[1, :, 1].clone()
    noise.normal_at(torch.tensor(99), *counters, torch.tensor(1), torch.tensor(6))
    assert torch.equal(counters[0], bits[1, :, 0]) and torch.equal(counters[1], bits[1, :, 1]), (
        "arguments are left as they are"
    )
