"""Image files, decoded safely: which formats, how large, upright.

Imports no torch, so that a packing worker starts quickly.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from multidomain_cct.errors import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
"""Allowed formats, whatever the file's name is. Some others of Pillow start programs (EPS) or are little tested."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, AttributeError, struct.error, zlib.error)
"""What Pillow raises for damaged files, found by damaging files of every format."""
_TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of masks that hold ids."""
_GREY_STEPS: dict[Any, int] = {"L;2": 85, "L;4": 17}
"""Pillow stretches grey values of 2 and 4 bits to the range of 8; dividing by the step gives the stored ids back."""


def load_image(source: bytes | Path, name: str) -> Image.Image:
    """The image as 8-bit RGB, turned upright as its EXIF tag asks.

    Raises UserError, starting with `name`, when it cannot be read.
    """
    # A loaded image outlives its file.
    with open_image(source, name) as image:
        return decoded(image, name)


def open_image(source: bytes | Path, name: str) -> Image.Image:
    """The image with only its header read, for `decoded`.

    Raises UserError, starting with `name`, when it cannot be read.
    """
    with _errors_that_name(name):
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)


def upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an opened image after it is turned upright."""
    # Pillow gives the upright size of a TIFF.
    return image.size if image.format == "TIFF" or _orientation(image, name) < 5 else (image.height, image.width)


def decode_smaller(image: Image.Image, name: str, wanted: tuple[int, int]) -> tuple[float, float]:
    """Prepare an opened JPEG to be decoded at a half, a quarter or an eighth of its size, if that is at least `wanted`.

    Returns (width, height) of the whole picture in decoded pixels. They are fractions where the factor does not divide
    the size: the last column or row is then covered in part only. A JPEG that has to be turned is left at full size,
    since its partial pixels would lie on another side.
    """
    if image.format == "JPEG" and _orientation(image, name) == 1 and (drafted := image.draft(None, wanted)) is not None:
        return drafted[1][2], drafted[1][3]
    return upright_size(image, name)


def decoded(image: Image.Image, name: str) -> Image.Image:
    """An opened image as 8-bit RGB, turned upright. Raises UserError, starting with `name`, when it cannot be read."""
    with _errors_that_name(name):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            # Pillow clips 16 bits to 255 instead of scaling them.
            return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


def load_mask(source: bytes | Path, name: str, formats: tuple[str, ...]) -> tuple[Image.Image, int]:
    """A mask with the pixels that its file holds, and the step by which they have to be divided.

    Raises UserError, starting with `name`, when it cannot be read.
    """
    with _errors_that_name(name, "mask"):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            # Before loading, which forgets how the pixels were stored.
            step = _grey_step(image)
            image.load()
    return image, step


def _grey_step(image: Image.Image) -> int:
    stored = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else None
    return _GREY_STEPS.get(stored[0] if isinstance(stored, tuple) else stored, 1)


def _orientation(image: Image.Image, name: str) -> int:
    """The EXIF tag: 1 is upright, 5 to 8 lie on their side."""
    with _errors_that_name(name):
        tag: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return tag if tag in range(1, 9) else 1


@contextmanager
def _errors_that_name(name: str, what: str = "image") -> Iterator[None]:
    """Pillow's errors become UserErrors of one line."""
    try:
        with warnings.catch_warnings():
            # Pillow goes on after a warning. Broken EXIF is no reason to fail; a size that would fill the memory is.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except _TOO_LARGE as error:
        raise UserError(
            f"{name}: the {what} is too large to be read safely ({error}). Cut image and mask into tiles."
        ) from None
    except _UNREADABLE as error:
        reason = "not an image of a known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: the {what} cannot be read ({reason}). Fetch or export it again.") from None
