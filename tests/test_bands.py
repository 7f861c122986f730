"""ADA's bands of frequencies against pywavelets' filter, numpy's spectra and scipy's convolutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from cips.training.augmentation.bands import SYM2, Bands, band_gains, filter_bank


def wavelet() -> np.ndarray:
    return np.array(pytest.importorskip("pywt").Wavelet("sym2").dec_lo)


def responses(w: np.ndarray) -> np.ndarray:
    """The bands' formula in terms of |H|^2, by the sum that defines a transform: `[4, len(w)]`."""
    taps = wavelet()

    def low(w):
        return np.abs(sum(h * np.exp(-1j * w * k) for k, h in enumerate(taps))) ** 2 / 2

    def high(w):
        return low(w + math.pi)

    return np.stack([low(w) * low(2 * w) * low(4 * w), low(w) * low(2 * w) * high(4 * w), low(w) * high(2 * w), high(w)])


def test_the_filter_is_the_wavelets():
    np.testing.assert_allclose(SYM2, wavelet(), atol=1e-14)


def test_the_bank_has_the_formulas_spectra_and_gives_everything_back():
    bank, w = filter_bank(), np.linspace(-math.pi, math.pi, 201)
    offsets = np.arange(43) - 21
    spectra = np.exp(-1j * w[:, None] * offsets) @ bank.T
    np.testing.assert_allclose(spectra.T, responses(w), atol=1e-12)
    np.testing.assert_allclose(bank.sum(0), offsets == 0, atol=1e-15)
    # each lets most of its own octave through
    edges = (0, math.pi / 8, math.pi / 4, math.pi / 2, math.pi)
    for band, (low, high) in enumerate(zip(edges, edges[1:])):
        inside = (abs(w) >= low) & (abs(w) <= high)
        assert spectra[inside, band].real.mean() > 3 * spectra[~inside, band].real.mean()


@pytest.mark.parametrize("height, width", [(48, 64), (24, 16), (8, 12)])
def test_images_are_filtered_as_by_scipy(height, width):
    """Smaller images than the filter is long too: reflected again and again."""
    random = np.random.default_rng(0)
    images, gains = random.normal(size=(3, 2, height, width)), random.uniform(0.2, 3, (3, 4))
    found = Bands()(torch.from_numpy(images), torch.from_numpy(gains)).numpy()
    for image, gain, result in zip(images, gains, found):
        w = 2 * math.pi * np.arange(43) / 43
        taps = np.fft.fftshift(np.fft.ifft(gain @ responses(w)).real)  # 43 points determine a filter of 43 taps
        expected = scipy.ndimage.convolve1d(image, taps, axis=1, mode="mirror")
        expected = scipy.ndimage.convolve1d(expected, taps, axis=2, mode="mirror")
        np.testing.assert_allclose(result, expected, atol=1e-12)


def test_gains_of_one_change_nothing():
    images = torch.randn(2, 3, 16, 40, dtype=torch.float64)
    torch.testing.assert_close(Bands()(images, torch.ones(2, 4)), images, rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_gains_are_the_papers(p):
    """Band after band: with probability p its gain is 2^N(0, 1), then all are divided by the root of the expected power."""
    torch.manual_seed(3)
    found = band_gains(torch.tensor(p), 500).double().numpy()
    torch.manual_seed(3)
    draws = [(torch.randn(500).double().numpy(), torch.rand(500).numpy()) for _ in range(4)]
    for image in range(500):
        expected = np.ones(4)
        for band, (normal, uniform) in enumerate(draws):
            now = np.ones(4)
            if uniform[image] < p:
                now[band] = 2 ** normal[image]
            expected *= now / math.sqrt((10 * now[0] ** 2 + now[1] ** 2 + now[2] ** 2 + now[3] ** 2) / 13)
        np.testing.assert_allclose(found[image], expected, rtol=1e-5)


def test_bands_change_independently_with_probability_p():
    gains = band_gains(torch.tensor(0.3), 20_000).double().log2()
    same = (gains.abs() < 1e-5).all(1).double().mean()
    assert abs(same - 0.7**4) < 0.015
    # what all have in common goes in differences: two changes of N(0, 1), each with probability p
    for a, b in ((0, 1), (1, 3), (2, 3)):
        assert abs((gains[:, a] - gains[:, b]).square().mean() - 0.6) < 0.04
