"""ADA's noise and cutout against the distributions of scipy and loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from cips.training.augmentation.corruption import cutout, noise


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_noise_is_white_of_a_half_normal_deviation(p):
    images = torch.rand(600, 3, 16, 12, dtype=torch.float64) * 2 - 1
    torch.manual_seed(0)
    added = (noise(images, torch.tensor(p)) - images).numpy()
    changed = np.abs(added).max((1, 2, 3)) > 0
    assert abs(changed.mean() - p) < 0.06
    if not changed.any():
        return
    added = added[changed]
    deviations = np.sqrt((added**2).mean((1, 2, 3)))  # of 576 values: known to 3%
    assert scipy.stats.kstest(deviations / 0.1, scipy.stats.halfnorm.cdf).pvalue > 0.01
    white = added / deviations[:, None, None, None]
    assert scipy.stats.kstest(white[:, :, ::3, ::3].ravel(), scipy.stats.norm.cdf).pvalue > 0.01
    # neighbours, channels and images have nothing to do with each other
    for a, b in ((white[:, :, 1:], white[:, :, :-1]), (white[:, 1:], white[:, :-1]), (white[1:], white[:-1])):
        assert abs((a * b).mean()) < 0.02


def test_cutout_hides_what_is_near_the_centre():
    """|pixel's middle - centre| < 1/4 along both sides, by a loop."""
    count, height, width = 40, 12, 18
    images = torch.rand(count, 3, height, width, dtype=torch.float64) + 5
    torch.manual_seed(1)
    found = cutout(images, torch.tensor(0.7)).numpy()
    torch.manual_seed(1)
    happened, down, right = torch.rand(count) < 0.7, torch.rand(count, 1)[:, 0], torch.rand(count, 1)[:, 0]
    assert 0 < happened.sum() < count
    for image in range(count):
        expected = images[image].numpy().copy()
        for i in range(height):
            for j in range(width):
                near = abs((i + 0.5) / height - down[image].item()) < 0.25
                if happened[image] and near and abs((j + 0.5) / width - right[image].item()) < 0.25:
                    expected[:, i, j] = 0
        assert np.array_equal(found[image], expected)


def test_cutout_happens_with_its_probability_and_anywhere():
    images = torch.ones(4000, 1, 8, 8)
    hidden = cutout(images, torch.tensor(0.5)).numpy()[:, 0] == 0
    assert abs(hidden.any((1, 2)).mean() - 0.5) < 0.03
    # a pixel is hidden by centres within a quarter of the side, as far as they lie inside
    share = np.array([min(1, (i + 0.5) / 8 + 0.25) - max(0, (i + 0.5) / 8 - 0.25) for i in range(8)])
    np.testing.assert_allclose(hidden.mean(0), 0.5 * np.outer(share, share), atol=0.025)
