"""A prepared stack is the module's stack, with its parameters gathered once."""

from __future__ import annotations

import pytest
import torch

from cips_kernels import Encoding, FusedModFCStack, PreparedStack

WIDTHS = [9, 10, 8, 8]


def make(**options) -> FusedModFCStack:
    torch.manual_seed(0)
    stack = FusedModFCStack(WIDTHS, 5, **{"rgb_after": [0, 2], **options})
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return stack


def make_encoding(**places) -> Encoding:
    torch.manual_seed(1)
    return Encoding(torch.randn(4, 2), torch.randn(4), torch.randn(3, 4, 5), **(places or {"size": (3, 4)}))


@pytest.mark.parametrize("noise", ["off", 7])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"noise": False}, {"demodulate": False, "gain": 1.0, "negative_slope": 0.1}])
@pytest.mark.parametrize("in_w_plus", [False, True])
def test_colours_are_the_modules(options, noise, in_w_plus):
    stack, e = make(**options), make_encoding()
    style = torch.randn(2, 5, 5)[:, :5] if in_w_plus else torch.randn(2, 5)
    with torch.no_grad():
        expected = stack(e, style, noise)
    torch.testing.assert_close(PreparedStack(stack)(e, style, noise), expected, rtol=1e-5, atol=1e-5)


def test_given_and_fresh_noise():
    stack, e = make(), make_encoding()
    prepared, style, noise = PreparedStack(stack), torch.randn(2, 5), torch.randn(3, 2, 12)
    with torch.no_grad():
        torch.testing.assert_close(prepared(e, style, noise), stack(e, style, noise), rtol=1e-5, atol=1e-5)
    assert not torch.equal(prepared(e, style), prepared(e, style)), "fresh noise is drawn in each call"


def test_refresh_takes_the_parameters_over():
    stack, e = make(), make_encoding()
    prepared, style = PreparedStack(stack), torch.randn(2, 5)
    before = prepared(e, style, "off")
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.mul_(1.3)
    assert torch.equal(prepared(e, style, "off"), before), "its parameters are copies"
    prepared.refresh()
    with torch.no_grad():
        torch.testing.assert_close(prepared(e, style, "off"), stack(e, style, "off"), rtol=1e-5, atol=1e-5)


def test_nothing_gives_nothing():
    prepared = PreparedStack(make())
    assert prepared(make_encoding(), torch.zeros(0, 5)).shape == (0, 12, 3)
    assert prepared(make_encoding(coords=torch.zeros(0, 2)), torch.zeros(2, 5)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("encoding", "style", "noise", "error", "words"),
    [
        ({}, torch.zeros(2, 6), None, ValueError, r"style: expected \[B, 5\] or \[B, 5, 5\]"),
        ({}, torch.zeros(2, 4, 5), None, ValueError, r"style: expected \[B, 5\] or \[B, 5, 5\]"),
        ({}, torch.zeros(2, 5).double(), None, TypeError, "style: expected torch.float32"),
        ({}, torch.full((2, 5), torch.nan), None, ValueError, "style: expected finite values"),
        ({}, torch.zeros(2, 5), "loud", ValueError, "noise: expected None, 'fresh', 'off'"),
        ({}, torch.zeros(2, 5), torch.zeros(3, 2, 11), ValueError, r"noise: expected \[L, B, P\]"),
        ({"coords": torch.zeros(3, 7, 2)}, torch.zeros(2, 5), None, ValueError, "coords: expected points for each of 2 images"),
        ({"size": (0, 4)}, torch.zeros(2, 5), None, ValueError, "size: expected"),
    ],
)
def test_errors_name_the_argument(encoding, style, noise, error, words):
    with pytest.raises(error, match=words):
        PreparedStack(make())(make_encoding(**encoding), style, noise)


def test_other_refusals():
    with pytest.raises(ValueError, match="stack: expected one with ToRGBs"):
        PreparedStack(make(rgb_after=[]))
    with pytest.raises(ValueError, match="encoding: expected 9 channels, got 4"):
        PreparedStack(make())(make_encoding()._replace(table=None), torch.zeros(2, 5))
