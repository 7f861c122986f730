"""What is timed: the cases, their random tensors, and the arithmetic they need.

`stack` is the paper's generator without its encodings: 1024 -> 512 and 14 times 512 -> 512, with 7 ToRGBs.
Its input is `[1, P, 1024]`, since all images of a batch share one grid of coordinates; Fourier features fill
the first half and a table of embeddings the second. `layer` is one 512 -> 512 layer, `modulate` only its
weights. A stack may have fewer layers of the same widths, where compiling fifteen would take the time that
measuring needs. Everything is random, never zero: zeros hide unwritten outputs and draw less power.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

BASELINE = "bmm_compiled"  # the provider that all are compared with
COMPILED = ("grouped_conv_compiled", "bmm_compiled", "bmm_autotuned")
RIVALS = ("grouped_conv", "bmm", *COMPILED)  # what is not ours; see `providers.py`
GENERATOR = "generator"  # from latents to images: see `generator_cases.py`
GENERATOR_ONLY = ("sampler",)  # providers of no other case
CASES = ("stack", "layer", "modulate")
FORWARD = "forward"
TRAINING = "forward+backward"
MODES = (FORWARD, TRAINING)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DEPTH = 15
RGB_CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """One thing to time.

    `widths` is `(I_0, O_0, ..., O_{L-1})`; `rgb_after` names the layers (0-based) that a ToRGB reads.
    `inputs` is the batch of the input: 1 where all images share it, else `batch`.
    """

    name: str
    widths: tuple[int, ...]
    rgb_after: tuple[int, ...]
    batch: int
    inputs: int
    height: int
    width: int
    dtype: torch.dtype

    @property
    def family(self) -> str:
        """Cases of one family take about equally long to compile."""
        return self.name

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return self.height * self.width

    @property
    def layers(self) -> int:
        """How many there are, ToRGBs left out."""
        return len(self.widths) - 1

    @property
    def dtype_name(self) -> str:
        """Such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        name = f"{self.name} of {self.layers}" if self.name == "stack" else self.name
        return f"{name}, {self.dtype_name}, {self.batch} x {self.height}x{self.width}"

    @property
    def weights(self) -> int:
        """Elements of all layers' weights of one image, ToRGBs left out."""
        return sum(i * o for i, o in zip(self.widths[:-1], self.widths[1:]))

    def flops(self, mode: str) -> int:
        """Floating-point operations of one call.

        Layers and ToRGBs: two for each weight and pixel, three times that with the backward (the gradients of
        input and weight are products of the same size). What is small beside it (modulation, noise, bias,
        activation) counts nothing. `modulate` itself: four for each element (scale, square and add,
        normalise), and three times that.
        """
        if self.name == "modulate":
            forward = 4 * self.batch * self.weights
        else:
            rgb = sum(self.widths[after + 1] * RGB_CHANNELS for after in self.rgb_after)
            forward = 2 * self.pixels * self.batch * (self.weights + rgb)
        return forward * (3 if mode == TRAINING else 1)

    def bytes_moved(self, mode: str) -> int:
        """Fewest bytes of `modulate`, the one case that is bound by memory.

        Forward reads the weight and writes every image's modulated weight; backward reads a gradient of that
        size, reads the weight and writes its gradient.
        """
        element = torch.finfo(self.dtype).bits // 8
        modulated, master = self.batch * self.weights * element, self.weights * 4
        forward = modulated + master
        return forward + (modulated + 2 * master if mode == TRAINING else 0)


@dataclass(frozen=True)
class Problem:
    """The tensors of one case, pixels first.

    `x [1 or B, P, I]` and `noise [L, B, P]` are in the case's dtype; weights `[O, I]`, styles `[B, I]`,
    biases `[O]`, strengths `[]` and the ToRGBs' are float32 (float64 where the case is). `grad` is the
    gradient given to the output; `seed` a 0-d int64 tensor. All but the last three require gradients.
    `modulate` has no `x`.
    """

    case: Case
    x: Tensor | None
    weights: tuple[Tensor, ...]
    styles: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    strengths: tuple[Tensor, ...]
    rgb_weights: tuple[Tensor, ...]
    rgb_styles: tuple[Tensor, ...]
    rgb_biases: tuple[Tensor, ...]
    noise: Tensor
    grad: Tensor
    seed: Tensor

    @property
    def parameters(self) -> dict[str, tuple[Tensor, ...]]:
        """The tensors that get gradients, by kind, `x` left out."""
        if self.case.name == "modulate":
            return {"weights": self.weights, "styles": self.styles}
        kinds = {name: getattr(self, name) for name in ("weights", "styles", "biases", "strengths")}
        if self.case.rgb_after:
            kinds |= {name: getattr(self, name) for name in ("rgb_weights", "rgb_styles", "rgb_biases")}
        return kinds

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that gets a gradient: `x` first, then the parameters in their order."""
        first = [] if self.x is None else [self.x]
        return first + [t for kind in self.parameters.values() for t in kind]

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs, which peak memory leaves out."""
        return sum(t.numel() * t.element_size() for t in self.leaves)

    def without_noise(self) -> Problem:
        """The same with all noise strengths zero: whatever noise is drawn adds nothing."""
        zeros = tuple(torch.zeros_like(t).requires_grad_() for t in self.strengths)
        return dataclasses.replace(self, strengths=zeros)


def make_case(
    name: str,
    *,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    channels: int = 512,
    layers: int = DEPTH,
) -> Case:
    """A case by name.

    Args:
        name: one of `CASES`.
        batch, height, width: images and their size in pixels.
        dtype: compute dtype.
        channels: width of the layers; the stack's input has twice as many.
        layers: of the stack, an odd number: a ToRGB reads every second one from the third on, the last too.
    """
    if name not in CASES:
        raise ValueError(f"case: expected one of {', '.join(CASES)}, got {name!r}")
    for argument, value in (("batch", batch), ("height", height), ("width", width), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{argument}: expected a positive number, got {value}")
    if layers < 3 or layers % 2 == 0:
        raise ValueError(f"layers: expected an odd number from 3 on, got {layers}")
    if name == "stack":
        widths = (2 * channels,) + (channels,) * layers
        return Case(name, widths, tuple(range(2, layers, 2)), batch, 1, height, width, dtype)
    return Case(name, (channels, channels), (), batch, batch, height, width, dtype)


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """Random tensors for a case; the same seed gives the same tensors on the same device."""
    draw = torch.Generator(device).manual_seed(seed)
    master = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = master) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32, device=device).to(dtype)

    batch, pixels = case.batch, case.pixels
    x = None
    output = (batch, case.widths[1], case.widths[0])
    if case.name != "modulate":
        # Sines of random phases beside normal embeddings; a lone layer sees a normal input.
        x = normal(case.inputs, pixels, case.widths[0], dtype=case.dtype)
        if case.name == "stack":
            half = case.widths[0] // 2
            x[..., :half] = torch.sin(2.0 * normal(case.inputs, pixels, half)).to(case.dtype)
        output = (batch, pixels, RGB_CHANNELS if case.rgb_after else case.widths[-1])
    grad_dtype = master if case.rgb_after else case.dtype
    layers = list(zip(case.widths[:-1], case.widths[1:]))
    rgb_in = [case.widths[after + 1] for after in case.rgb_after]
    weights = tuple(normal(o, i) for i, o in layers)
    styles = tuple(1 + 0.5 * normal(batch, i) for i, _ in layers)
    biases = tuple(0.2 * normal(o) for _, o in layers)
    strengths = tuple(0.1 + 0.05 * normal() for _ in layers)
    rgb_weights = tuple(normal(RGB_CHANNELS, i) for i in rgb_in)
    rgb_styles = tuple(1 + 0.5 * normal(batch, i) for i in rgb_in)
    rgb_biases = tuple(0.2 * normal(RGB_CHANNELS) for _ in rgb_in)
    problem = Problem(
        case, x, weights, styles, biases, strengths, rgb_weights, rgb_styles, rgb_biases,
        noise=normal(len(layers), batch, pixels, dtype=case.dtype),
        grad=normal(*output, dtype=grad_dtype),
        seed=torch.tensor(seed, dtype=torch.int64, device=device),
    )  # fmt: skip
    for leaf in problem.leaves:
        leaf.requires_grad_()
    return problem
