"""From the bytes of any image file to upright 8-bit RGB: what happens to every other kind of picture.

| picture | becomes |
|---|---|
| 8-bit RGB | itself |
| grey, black and white | the same value in all three channels |
| palette | its colours |
| alpha (any mode, a palette's or a grey's transparent entry too) | blended over white |
| 16-bit grey | round(value / 257): the whole range, scaled and not clipped |
| 16-bit colour | its high bytes, as PIL reads it: at most one level beside round(value / 257) |
| CMYK, YCbCr, HSV | PIL's formulas; colour profiles are not applied |
| turned by EXIF | upright |
| animated, several pages | the first frame |
| floating point, 32-bit integers beyond 16 bits | refused: their range is not known |
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def open_image(data: bytes) -> Image.Image:
    """The first frame of an encoded image, decoded whole, in the mode and direction of the file.

    Raises:
        ValueError: not an image, damaged, or truncated; the message says which, without a name.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError("not an image that PIL knows" if data else "the file is empty") from error
    except Exception as error:  # PIL raises many kinds for damaged files
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return image


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image once it is upright, from the head of the file alone where its format allows.

    Raises:
        Exception: of any kind, where it is no image or its head is damaged.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    return image.size[::-1] if orientation(image) >= 5 else image.size


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or its EXIF cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF beside a sound picture
        return 1
    return value if value in _TURNS else 1


def has_alpha(image: Image.Image) -> bool:
    """Whether some of its pixels may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as upright RGB, by the rules of this module.

    Raises:
        ValueError: a mode with no known way to RGB.
    """
    from PIL import Image

    turn = orientation(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    elif has_alpha(image):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    return image.transpose(Image.Transpose[_TURNS[turn]]) if turn != 1 else image


def _eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit integer pixels beyond 0 to 65535, whose range is not known")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
