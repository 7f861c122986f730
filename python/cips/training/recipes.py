"""What a run trains with where nothing else is said: as the paper writes, or as the official code does.

Both take the non-saturating logistic loss, R1 every 16th step times 16, Adam with beta_1 = 0 and eps 1e-8, equalised
learning rates, noise in every layer, and neither path-length nor style-mixing regularisation. They part where the
official code does something else than the paper says (docs/training.md lists every difference and its option).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import presets

AUTO = "auto"
EMA_HALF_LIFE = 10_000  # images, StyleGAN2's
OFFICIAL_BATCH = 32  # 8 GPUs x 4, for which the official code's average is


@dataclass(frozen=True)
class Recipe:
    """Settings in which paper and official code differ, and those that an option may change beside them.

    Attributes:
        lr: learning rate of Adam before any correction; beta_2 is 0.99.
        g_lazy_every: the generator's Adam is corrected for a regulariser every so many steps; 0: it is not.
        d_lazy: the discriminator's Adam is corrected for the lazy R1 penalty.
        r1: weight gamma of the R1 penalty, gamma / 2 |grad D|^2.
        r1_every: steps between penalties, each times that number.
        ema_by_images: the average's half-life is 10,000 images, whatever the batch; otherwise the official 312.5 steps.
        lookup: how the table is read between its points and when the averaged generator is evaluated.
    """

    lr: float
    g_lazy_every: int
    d_lazy: bool
    r1: float
    r1_every: int
    ema_by_images: bool
    lookup: str

    def ema_decay(self, batch: int) -> float:
        """Of the averaged generator, a step of `batch` images."""
        return 0.5 ** ((batch if self.ema_by_images else OFFICIAL_BATCH) / EMA_HALF_LIFE)


RECIPES = {
    "paper": Recipe(0.002, 0, False, 10.0, 16, True, "exact"),
    "official": Recipe(0.002, 4, True, 10.0, 16, False, "compat"),
}


@dataclass(frozen=True)
class Defaults:
    """What a generator preset trains with where nothing else is said.

    Attributes:
        recipe: one of `RECIPES`.
        ema_decay: instead of the recipe's.
        lookup: instead of the recipe's.
    """

    batch: int
    steps: int
    d_width: float
    log_every: int
    sample_every: int
    checkpoint_every: int
    recipe: str = "paper"
    ema_decay: float | None = None
    lookup: str | None = None


_FULL_SIZE = {
    "batch": 32,
    "steps": 100_000,
    "d_width": 1.0,
    "log_every": 50,
    "sample_every": 500,
    "checkpoint_every": 2000,
}
PRESET_DEFAULTS = {
    **{name: Defaults(**_FULL_SIZE) for name in presets if name not in ("official", "small")},
    "official": Defaults(**_FULL_SIZE, recipe="official"),
    "small": Defaults(
        batch=16,
        steps=1000,
        d_width=1 / 32,
        log_every=10,
        sample_every=50,
        checkpoint_every=200,
        recipe="official",
        ema_decay=0.99,  # of a run this short the official average would still show the beginning
        lookup="exact",
    ),
}
