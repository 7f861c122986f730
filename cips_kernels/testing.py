"""What the tests and the benchmark share: an error measure, a rule for what error is allowed, poisoned memory, and a
random stack to run things on.

The rule (DESIGN section 8): against the float64 oracle, a fast path may have at most twice the error of the same
computation done eagerly in the same dtype. It needs no hand-picked tolerance, and it is as strict for float32 as for
bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

EAGER_FACTOR = 2.0  # error allowed, in multiples of eager PyTorch's


def relative_error(value: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """RMS of `value - exact` divided by the RMS of `exact`, in float64; inf where `value` is not finite.

    Lists count as one long tensor. An `exact` of zeros throughout gives the norm of `value` itself; empty tensors have no
    error.

    Raises:
        ValueError: the shapes or the lengths of the lists differ.
    """
    values, exacts = ([t] if isinstance(t, Tensor) else list(t) for t in (value, exact))
    shapes, wanted = [list(t.shape) for t in values], [list(t.shape) for t in exacts]
    if shapes != wanted:
        raise ValueError(f"value: expected the shape of exact, {wanted}, got {shapes}")
    error = norm = 0.0
    for got, want in zip(values, exacts):
        want = want.detach().to(got.device).double()
        error += (got.detach().double() - want).square().sum().item()
        norm += want.square().sum().item()
    relative = math.sqrt(error / norm if norm > 0 else error)
    return relative if math.isfinite(relative) else math.inf


def allowed_error(eager: Tensor, exact: Tensor, factor: float = EAGER_FACTOR) -> float:
    """`factor` times the error of `eager`, and no less than `factor` roundings to its dtype."""
    return factor * max(relative_error(eager, exact), torch.finfo(eager.dtype).eps)


def assert_close_as_eager(
    name: str, value: Tensor, eager: Tensor, exact: Tensor, factor: float = EAGER_FACTOR
) -> None:
    """Assert the rule of this page for one tensor.

    Args:
        name: of the tensor, for the message.
        value: the fast path's result.
        eager: the same computed by eager PyTorch in the same dtype.
        exact: the same in float64.
        factor: error allowed, in multiples of eager's.

    Raises:
        AssertionError: with both errors and the place of the largest difference.
    """
    if value.dtype != eager.dtype:
        raise AssertionError(f"{name}: expected {eager.dtype}, got {value.dtype}")
    error, allowed = relative_error(value, exact), allowed_error(eager, exact, factor)
    if error <= allowed:
        return
    difference = (value.detach().double() - exact.detach().to(value.device).double()).abs()
    flat = int(torch.where(difference.isnan(), torch.inf, difference).flatten().argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(flat), value.shape)]
    raise AssertionError(
        f"{name}: relative RMS error {error:.3e}, allowed {allowed:.3e} ({factor:g} times eager's); largest difference"
        f" at {where}: {value[tuple(where)].item():.6g} instead of {exact[tuple(where)].item():.6g}"
    )


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return with NaN (floating dtypes), so that an unwritten element is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return poisoned

    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")]
    places += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    inherited = {(owner, name): name not in vars(owner) for owner, name in places}
    originals = {(owner, name): getattr(owner, name) for owner, name in places}
    for (owner, name), original in originals.items():
        setattr(owner, name, poison(original))
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            if inherited[owner, name]:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@dataclass(frozen=True)
class StackCase:
    """The arguments of one `modfc_stack` call, by name.

    Attributes:
        x: `[B or 1, P, I_0]`.
        weights, styles, biases, noise_strengths: `[O, I]`, `[B, I]`, `[O]`, `[]`, one a layer.
        rgb_weights, rgb_styles, rgb_biases: `[C, I]`, `[B, I]`, `[C]`, one a ToRGB.
        rgb_after: layer after which each ToRGB reads.
        skip: `[B, P, C]` or None.
        noise: `[L, B, P]`, a seed, or None.
        blocks: (first, last) layer of each residual block.
        skip_weights: the matrices of the blocks whose skip is not the identity, in order.
        blend: `[P, K]` or `[B, P, K]`, or None; with it styles and rgb_styles are `[B, K, I]`.
    """

    x: Tensor
    weights: list[Tensor]
    styles: list[Tensor]
    biases: list[Tensor]
    noise_strengths: list[Tensor]
    rgb_weights: list[Tensor]
    rgb_styles: list[Tensor]
    rgb_biases: list[Tensor]
    rgb_after: Sequence[int]
    skip: Tensor | None
    noise: Tensor | int | None
    blocks: tuple[tuple[int, int], ...] = ()
    skip_weights: list[Tensor] = field(default_factory=list)
    blend: Tensor | None = None

    def map(self, change: Callable[[str, Tensor], Tensor]) -> StackCase:
        """The case with `change(field name, tensor)` in place of every tensor."""
        new: dict[str, Any] = {}
        for place in fields(self):
            value = getattr(self, place.name)
            if isinstance(value, Tensor):
                new[place.name] = change(place.name, value)
            elif isinstance(value, list):
                new[place.name] = [change(place.name, tensor) for tensor in value]
        return replace(self, **new)

    def leaves(self, requires_grad: bool = True) -> StackCase:
        """Detached copies of every tensor, floating ones with `requires_grad`."""
        return self.map(
            lambda _, t: t.detach().clone().requires_grad_(requires_grad and t.is_floating_point())
        )

    def cast(self, dtype: torch.dtype, parameters: torch.dtype | None = None) -> StackCase:
        """`x` in `dtype` and the rest in `parameters`, by default float32 (float64 with float64)."""
        wide = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
        return self.map(lambda name, t: t.to(dtype if name == "x" else wide) if t.is_floating_point() else t)

    def to(self, device: torch.device | str) -> StackCase:
        """The case on another device."""
        return self.map(lambda _, t: t.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, lists as `weights[0]`, ..."""
        named: dict[str, Tensor] = {}
        for place in fields(self):
            value = getattr(self, place.name)
            if isinstance(value, Tensor):
                named[place.name] = value
            elif isinstance(value, list):
                named.update({f"{place.name}[{k}]": tensor for k, tensor in enumerate(value)})
        return named

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        """`function`, one of the `modfc_stack`s, on this case; `x` is `[B, P, I]` unless `layout` is given."""
        groups = (self.weights, self.styles, self.biases, self.noise_strengths)
        rgbs = (self.rgb_weights, self.rgb_styles, self.rgb_biases, self.rgb_after)
        options = {"layout": "bpc", "skip": self.skip, "noise": self.noise, **options}
        if self.blocks:
            widths, rest = [self.x.shape[2], *(weight.shape[0] for weight in self.weights)], iter(self.skip_weights)
            skips = [None if widths[first] == widths[last + 1] else next(rest) for first, last in self.blocks]
            options = {"blocks": self.blocks, "skip_weights": skips, **options}
        if self.blend is not None:
            options = {"blend": self.blend, **options}
        return function(self.x, *groups, *rgbs, **options)


def random_stack(
    widths: Sequence[int],
    rgb_after: Sequence[int] = (),
    *,
    batch: int = 2,
    pixels: int = 5,
    channels: int = 3,
    shared: bool = False,
    skip: bool = False,
    noise: str | int | None = "given",
    blocks: Sequence[tuple[int, int]] = (),
    blended: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> StackCase:
    """A stack with normal random numbers everywhere: styles around 1, noise strengths and biases that are seen.

    Args:
        widths: `(I_0, O_0, ..., O_{L-1})`.
        rgb_after: layer after which each ToRGB reads.
        batch, pixels, channels: sizes B, P and C.
        shared: `x` has batch 1.
        skip: with a skip.
        noise: "given" for a tensor, or what `modfc_stack` takes.
        blocks: (first, last) layer of each residual block.
        blended: number K of styles that each pixel blends by weights that add up to one; 0 for a style an image. With
            `shared` the weights are the same for all images.
        dtype: of `x`; the rest is float32 (float64 with float64).
        device: where the case lies; the numbers are drawn on the CPU, the same for all devices.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    kinds = (batch, blended) if blended else (batch,)
    ins, outs = list(widths[:-1]), list(widths[1:])
    rgb_ins = [widths[after + 1] for after in rgb_after]
    case = StackCase(
        draw(1 if shared else batch, pixels, widths[0]),
        [draw(o, i) for i, o in zip(ins, outs)],
        [draw(*kinds, i, scale=0.5, shift=1.0) for i in ins],
        [draw(o, scale=0.3) for o in outs],
        [draw(scale=0.5) for _ in outs],
        [draw(channels, i) for i in rgb_ins],
        [draw(*kinds, i, scale=0.5, shift=1.0) for i in rgb_ins],
        [draw(channels, scale=0.3) for _ in rgb_ins],
        tuple(rgb_after),
        draw(batch, pixels, channels) if skip else None,
        draw(len(outs), batch, pixels) if isinstance(noise, str) else noise,
        tuple(blocks),
        [draw(o, i) for i, o in ((widths[first], widths[last + 1]) for first, last in blocks) if i != o],
        draw(*(() if shared else (batch,)), pixels, blended, scale=2.0).softmax(-1) if blended else None,
    )
    return case.cast(dtype).to(device)
